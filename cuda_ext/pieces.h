// How a chunk is cut into pieces that move together, each through one slab of staging memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kvstrata.h"
#include "pack.h"
#include "packing_room.h"

namespace kvs {

struct Run {  // bytes of a slot that this pipe copies
    int64_t offset, nbytes;
};

struct Member {  // a sub-block
    int32_t plane;  // of its piece's
    int32_t local_head;
};

// Some layers.
struct Piece {
    int32_t first_plane = 0, planes = 0;
    int64_t first_sub_block = 0, sub_blocks = 0;
    int64_t stored_bytes = 0;  // of the largest sub-block, as the next two
    int64_t packing_least = 0, packing_fast = 0;
    std::vector<Run> runs;

    int64_t offset() const { return runs.front().offset; }
    int64_t end() const { return runs.back().offset + runs.back().nbytes; }
};

inline int64_t sub_block_bytes(const kvs_plane& plane, int64_t chunk_tokens) {
    const int64_t items = chunk_tokens * plane.dim;
    return plane.codec == KVS_PACKED ? Packed{items, plane.dim}.nbytes() : items * plane.item_bytes;
}

// Exactly the bytes of the planes' sub-blocks, joined where they touch: what lies between is others'.
inline std::vector<Run> runs_of(const kvs_plane* planes, int64_t n, int64_t chunk_tokens) {
    std::vector<Run> each, joined;
    for (int64_t p = 0; p < n; ++p) {
        for (int64_t h = planes[p].first_head; h < planes[p].first_head + planes[p].heads; ++h) {
            const int64_t offset = planes[p].slot_offset + h * planes[p].slot_stride;
            each.push_back({offset, sub_block_bytes(planes[p], chunk_tokens)});
        }
    }
    std::sort(each.begin(), each.end(), [](const Run& a, const Run& b) { return a.offset < b.offset; });
    for (const Run& run : each) {
        if (!joined.empty() && joined.back().offset + joined.back().nbytes == run.offset) {
            joined.back().nbytes += run.nbytes;
        } else {
            joined.push_back(run);
        }
    }
    return joined;
}

// Cuts the planes, in slot order, into pieces of whole layers of at most `limit` bytes, or of one layer.
inline std::vector<Piece> cut(const kvs_plane* planes, int64_t n, int64_t chunk_tokens, int64_t limit) {
    std::vector<Piece> pieces;
    int64_t begin = 0, end = 0;  // of the piece, in the slot
    for (int64_t p = 0; p < n; ++p) {
        const kvs_plane& plane = planes[p];
        const int64_t from = plane.slot_offset + plane.first_head * plane.slot_stride;
        const int64_t nbytes = sub_block_bytes(plane, chunk_tokens);
        const int64_t to = from + (plane.heads - 1) * plane.slot_stride + nbytes;
        // A layer's planes lie between each other's heads: they overlap.
        if (pieces.empty() || (from >= end && to - begin > limit)) {
            const int64_t before = pieces.empty() ? 0 : pieces.back().first_sub_block + pieces.back().sub_blocks;
            pieces.emplace_back();
            pieces.back().first_plane = static_cast<int32_t>(p);
            pieces.back().first_sub_block = before;
            begin = end = from;
        }
        Piece& piece = pieces.back();
        begin = std::min(begin, from);
        end = std::max(end, to);
        piece.stored_bytes = std::max(piece.stored_bytes, nbytes);
        if (plane.codec == KVS_PACKED) {
            const PackingRoom room = {chunk_tokens, plane.dim};
            piece.packing_least = std::max(piece.packing_least, room.least());
            piece.packing_fast = std::max(piece.packing_fast, room.fast());
        }
        piece.planes += 1;
        piece.sub_blocks += plane.heads;
    }
    for (Piece& piece : pieces) {
        piece.runs = runs_of(planes + piece.first_plane, piece.planes, chunk_tokens);
    }
    return pieces;
}

// As `cut`, into as few pieces, but alike: a small one at the end would leave the link idle.
inline std::vector<Piece> cut_evenly(const kvs_plane* planes, int64_t n, int64_t chunk_tokens, int64_t limit) {
    const std::vector<Piece> pieces = cut(planes, n, chunk_tokens, limit);
    int64_t largest = 0;  // layer
    for (const Piece& layer : cut(planes, n, chunk_tokens, 0)) {
        largest = std::max(largest, layer.end() - layer.offset());
    }
    const auto count = std::max<int64_t>(1, static_cast<int64_t>(pieces.size()));
    const int64_t all = pieces.empty() ? 0 : pieces.back().end() - pieces.front().offset();
    return cut(planes, n, chunk_tokens, std::min(limit, all / count + largest));
}

// The sub-blocks of all pieces, in order.
inline std::vector<Member> members_of(const std::vector<Piece>& pieces, const kvs_plane* planes) {
    std::vector<Member> members;
    for (const Piece& piece : pieces) {
        for (int32_t p = 0; p < piece.planes; ++p) {
            for (int32_t h = 0; h < planes[piece.first_plane + p].heads; ++h) members.push_back({p, h});
        }
    }
    return members;
}

}  // namespace kvs
