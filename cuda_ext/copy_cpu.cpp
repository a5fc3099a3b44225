// The CPU twin of the copy kernels: engine blocks <-> canonical sub-blocks (kvstrata.h says what).
//
// Rule of this file: a sub-block is copied whole, then summed (gather), or summed whole, then copied
// (scatter), so that the second pass finds its bytes in cache. A copy is between two views, and which
// of them is the engine's does not matter, except for tables.
#include "kvstrata.h"

#include <cstdint>
#include <cstring>

#include <memory>
#include <new>

#include "checksum.h"
#include "pack_cpu.h"
#include "transpose.h"

// One binary for every x86-64, at the speed of this one. Needs ifuncs, so glibc; elsewhere (Arm, musl)
// the baseline is vectorised too. -DKVS_CLONES= builds the baseline alone.
#if !defined(KVS_CLONES) && defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define KVS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef KVS_CLONES
#define KVS_CLONES
#endif

namespace {

// Tokens x dims somewhere in memory; strides in bytes.
template <class Byte>
struct View {
    Byte* data;
    int64_t stride_token;
    int64_t stride_dim;
};
using Source = View<const uint8_t>;
using Target = View<uint8_t>;

KVS_CLONES bool pack_rows(const uint16_t* rows, const kvs::Packed& shape, uint8_t* stored) {
    return kvs::pack(rows, shape, stored);
}
KVS_CLONES void unpack_rows(const uint8_t* stored, const kvs::Packed& shape, uint16_t* rows) {
    kvs::unpack(stored, shape, rows);
}
KVS_CLONES uint64_t sum_words(const uint8_t* data, size_t nbytes) { return kvs::sum_words(data, nbytes); }

template <class Item>
void copy_rows(Target to, Source from, int64_t tokens, int64_t dim) {
    const int64_t row = dim * int64_t{sizeof(Item)};
    if (to.stride_token == row && from.stride_token == row) {
        memcpy(to.data, from.data, static_cast<size_t>(tokens * row));
        return;
    }
    for (int64_t t = 0; t < tokens; ++t) {
        memcpy(to.data + t * to.stride_token, from.data + t * from.stride_token, static_cast<size_t>(row));
    }
}

template <class Item>
void copy_items(Target to, Source from, int64_t tokens, int64_t dim) {
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t d = 0; d < dim; ++d) {
            memcpy(to.data + t * to.stride_token + d * to.stride_dim,
                   from.data + t * from.stride_token + d * from.stride_dim, sizeof(Item));
        }
    }
}

template <class Item>
void copy_view(Target to, Source from, int64_t tokens, int64_t dim) {
    constexpr int64_t item = sizeof(Item);
    if (to.stride_dim == item && from.stride_dim == item) {
        copy_rows<Item>(to, from, tokens, dim);
    } else if (to.stride_dim == item && from.stride_token == item) {
        kvs::transpose<Item>(to.data, to.stride_token, from.data, from.stride_dim, dim, tokens);
    } else if (to.stride_token == item && from.stride_dim == item) {
        kvs::transpose<Item>(to.data, to.stride_dim, from.data, from.stride_token, tokens, dim);
    } else {
        copy_items<Item>(to, from, tokens, dim);
    }
}

// `table` points at the entry of the first item; canonical items follow one another.
template <class Item>
void table_to_slot(uint8_t* slot, const uint8_t* region, const int32_t* table, int64_t items) {
    for (int64_t i = 0; i < items; ++i) {
        memcpy(slot + i * int64_t{sizeof(Item)}, region + table[i] * int64_t{sizeof(Item)}, sizeof(Item));
    }
}

template <class Item>
void table_to_engine(uint8_t* region, const uint8_t* slot, const int32_t* table, int64_t items) {
    for (int64_t i = 0; i < items; ++i) {
        memcpy(region + table[i] * int64_t{sizeof(Item)}, slot + i * int64_t{sizeof(Item)}, sizeof(Item));
    }
}

// One head of one plane: a sub-block in the slot, and its pieces in the engine's blocks.
struct Head {
    const kvs_plane& plane;
    int64_t local;  // counts the heads held here

    int64_t index() const { return plane.checksum_index + (plane.first_head + local) * plane.checksum_stride; }
    int64_t slot_offset() const { return plane.slot_offset + (plane.first_head + local) * plane.slot_stride; }
    int64_t token_bytes() const { return int64_t{plane.dim} * plane.item_bytes; }
    bool packed() const { return plane.codec == KVS_PACKED; }
    kvs::Packed shape(int64_t tokens) const { return {tokens * plane.dim, plane.dim}; }
    int64_t stored_bytes(int64_t tokens) const {
        return packed() ? shape(tokens).nbytes() : tokens * token_bytes();
    }
    uint8_t* region(int64_t block) const {
        return plane.base + block * plane.stride_block + local * plane.stride_head;
    }
};

template <class Item>
void gather_block(const Head& head, const uint8_t* region, uint8_t* rows, int64_t tokens) {
    const kvs_plane& plane = head.plane;
    if (plane.table != nullptr) {
        table_to_slot<Item>(rows, region, plane.table, tokens * plane.dim);
        return;
    }
    const Target to = {rows, head.token_bytes(), int64_t{sizeof(Item)}};
    copy_view<Item>(to, {region, plane.stride_token, plane.stride_dim}, tokens, plane.dim);
}

template <class Item>
void scatter_block(const Head& head, uint8_t* region, const uint8_t* rows, int64_t tokens) {
    const kvs_plane& plane = head.plane;
    if (plane.table != nullptr) {
        table_to_engine<Item>(region, rows, plane.table, tokens * plane.dim);
        return;
    }
    const Source from = {rows, head.token_bytes(), int64_t{sizeof(Item)}};
    copy_view<Item>({region, plane.stride_token, plane.stride_dim}, from, tokens, plane.dim);
}

template <class Item>
void gather_head(const Head& head, const int64_t* block_ids, int64_t block_tokens, int64_t blocks,
                 uint8_t* rows) {
    const int64_t block_bytes = block_tokens * head.token_bytes();
    for (int64_t b = 0; b < blocks; ++b) {
        gather_block<Item>(head, head.region(block_ids[b]), rows + b * block_bytes, block_tokens);
    }
}

template <class Item>
void scatter_head(const Head& head, const int64_t* block_ids, int64_t block_tokens, int64_t blocks,
                  const uint8_t* rows) {
    const int64_t block_bytes = block_tokens * head.token_bytes();
    for (int64_t b = 0; b < blocks; ++b) {
        if (block_ids[b] == KVS_NO_BLOCK) continue;
        scatter_block<Item>(head, head.region(block_ids[b]), rows + b * block_bytes, block_tokens);
    }
}

// Room for one unpacked sub-block, the largest of a call's; none where nothing is packed.
class Rows {
  public:
    Rows(const kvs_plane* planes, int64_t n_planes, int64_t tokens) {
        int64_t most = 0;
        for (int64_t p = 0; p < n_planes; ++p) {
            if (planes[p].codec == KVS_PACKED && planes[p].dim > most) most = planes[p].dim;
        }
        if (most > 0) items_.reset(new (std::nothrow) uint16_t[static_cast<size_t>(most * tokens)]);
    }
    uint16_t* items() const { return items_.get(); }
    uint8_t* get() const { return reinterpret_cast<uint8_t*>(items_.get()); }

  private:
    std::unique_ptr<uint16_t[]> items_;
};

void write_entry(uint8_t* table, int64_t index, uint64_t checksum) {
    memcpy(table + index * int64_t{sizeof checksum}, &checksum, sizeof checksum);
}

// The index is part of the seed: two sub-blocks that changed places, entries and all, are found out.
uint64_t entry_of(int64_t index, const uint8_t* data, int64_t nbytes, uint64_t seed) {
    return kvs_checksum(data, nbytes, seed + static_cast<uint64_t>(index));
}

bool entry_matches(const uint8_t* table, int64_t index, const uint8_t* data, int64_t nbytes, uint64_t seed) {
    uint64_t stored;
    memcpy(&stored, table + index * int64_t{sizeof stored}, sizeof stored);
    return stored == entry_of(index, data, nbytes, seed);
}

}  // namespace

int kvs_abi_version(void) noexcept { return KVS_ABI_VERSION; }

uint64_t kvs_checksum(const uint8_t* data, int64_t nbytes, uint64_t seed) noexcept {
    const auto size = static_cast<size_t>(nbytes);
    return kvs::finish(sum_words(data, size), size, seed);
}

int64_t kvs_gather(const kvs_plane* planes, int64_t n_planes, const int64_t* block_ids, int64_t block_tokens,
                   int64_t chunk_tokens, uint8_t* slot, int64_t checksum_table_offset,
                   uint64_t seed) noexcept {
    const int64_t blocks = chunk_tokens / block_tokens;
    const Rows unpacked(planes, n_planes, chunk_tokens);
    for (int64_t p = 0; p < n_planes; ++p) {
        for (int64_t h = 0; h < planes[p].heads; ++h) {
            const Head head = {planes[p], h};
            uint8_t* stored = slot + head.slot_offset();
            uint8_t* rows = head.packed() ? unpacked.get() : stored;
            if (rows == nullptr) return KVS_NO_MEMORY;
            switch (planes[p].item_bytes) {
                case 1: gather_head<uint8_t>(head, block_ids, block_tokens, blocks, rows); break;
                case 2: gather_head<uint16_t>(head, block_ids, block_tokens, blocks, rows); break;
                default: gather_head<uint32_t>(head, block_ids, block_tokens, blocks, rows); break;
            }
            if (head.packed() && !pack_rows(unpacked.items(), head.shape(chunk_tokens), stored)) return head.index();
            const uint64_t entry = entry_of(head.index(), stored, head.stored_bytes(chunk_tokens), seed);
            write_entry(slot + checksum_table_offset, head.index(), entry);
        }
    }
    return KVS_ALL_GOOD;
}

int64_t kvs_scatter(const kvs_plane* planes, int64_t n_planes, const int64_t* block_ids,
                    int64_t block_tokens, int64_t chunk_tokens, const uint8_t* slot,
                    int64_t checksum_table_offset, uint64_t seed) noexcept {
    const int64_t blocks = chunk_tokens / block_tokens;
    const uint8_t* table = slot + checksum_table_offset;
    const Rows unpacked(planes, n_planes, chunk_tokens);
    for (int64_t p = 0; p < n_planes; ++p) {
        for (int64_t h = 0; h < planes[p].heads; ++h) {
            const Head head = {planes[p], h};
            const uint8_t* stored = slot + head.slot_offset();
            if (!entry_matches(table, head.index(), stored, head.stored_bytes(chunk_tokens), seed)) {
                return head.index();
            }
            const uint8_t* rows = stored;
            if (head.packed()) {
                if ((rows = unpacked.get()) == nullptr) return KVS_NO_MEMORY;
                unpack_rows(stored, head.shape(chunk_tokens), unpacked.items());
            }
            switch (planes[p].item_bytes) {
                case 1: scatter_head<uint8_t>(head, block_ids, block_tokens, blocks, rows); break;
                case 2: scatter_head<uint16_t>(head, block_ids, block_tokens, blocks, rows); break;
                default: scatter_head<uint32_t>(head, block_ids, block_tokens, blocks, rows); break;
            }
        }
    }
    return KVS_ALL_GOOD;
}

int64_t kvs_verify(const uint8_t* slot, const kvs_sub_block* sub_blocks, int64_t count,
                   int64_t checksum_table_offset, uint64_t seed) noexcept {
    const uint8_t* table = slot + checksum_table_offset;
    for (int64_t i = 0; i < count; ++i) {
        const kvs_sub_block& one = sub_blocks[i];
        if (!entry_matches(table, one.index, slot + one.offset, one.nbytes, seed)) return one.index;
    }
    return KVS_ALL_GOOD;
}
