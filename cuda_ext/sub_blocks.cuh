// What a thread block of the copy kernels works on: one sub-block, in the engine and in a slab.
//
// Work goes in groups of 16 consecutive canonical elements (packed) or 16 bytes (raw).
#ifndef KVSTRATA_SUB_BLOCKS_CUH
#define KVSTRATA_SUB_BLOCKS_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "kvstrata.h"
#include "pack.h"
#include "packing_room.h"
#include "pieces.h"

namespace {

constexpr int THREADS = 32 * kvs::WARPS;
constexpr int BLOCKS_AT_ONCE = 2;  // on a multiprocessor
constexpr int GROUP = 16;
constexpr int CHUNKS_AT_ONCE = 8;

// What of a piece is each chunk's own.
struct JobChunk {
    uint64_t* checksums;  // the slot's own table, in host memory
    int64_t* flag;        // in host memory: index of a sub-block that does not match, or does not fit
    uint64_t seed;
};

// The same piece of some chunks: some planes of each, stored at `data` in device memory.
struct Job {
    const kvs_plane* planes;     // in device memory, as the next
    const kvs::Member* members;  // the sub-blocks of one chunk
    int32_t sub_blocks;          // how many
    int32_t block_tokens;
    int32_t chunk_tokens;
    int32_t first;  // sub-block of this launch
    uint8_t* data;
    int64_t stride;       // from one chunk's to the next one's
    int64_t slot_offset;  // of `data` in the slot
    int32_t room;         // bytes of shared memory; more than the least: enough for the fast ways
    JobChunk chunks[CHUNKS_AT_ONCE];
    int32_t block_ids[KVS_BLOCKS_MAX];  // of one chunk after the other
};

struct SubBlock {
    kvs_plane plane;
    int64_t local_head;
    int64_t index;
    uint8_t* data;
    const JobChunk* chunk;
    const int32_t* block_ids;
};

__device__ SubBlock sub_block_of(const Job& job, int thread_block) {
    const int chunk = thread_block / job.sub_blocks;
    const kvs::Member member = job.members[thread_block % job.sub_blocks];
    SubBlock found;
    found.plane = job.planes[member.plane];
    found.local_head = member.local_head;
    const int64_t head = found.plane.first_head + found.local_head;
    found.index = found.plane.checksum_index + head * found.plane.checksum_stride;
    found.data = job.data + chunk * job.stride + found.plane.slot_offset + head * found.plane.slot_stride -
                 job.slot_offset;
    found.chunk = job.chunks + chunk;
    found.block_ids = job.block_ids + chunk * (job.chunk_tokens / job.block_tokens);
    return found;
}

// Where the engine keeps (token, channel) of a sub-block; null where its block takes no part.
__device__ uint8_t* engine_address(const Job& job, const SubBlock& sub, int32_t token, int32_t channel) {
    const int32_t place = token / job.block_tokens;
    const int64_t block = sub.block_ids[place];
    if (block == KVS_NO_BLOCK) return nullptr;
    const kvs_plane& p = sub.plane;
    return p.base + block * p.stride_block + sub.local_head * p.stride_head +
           (token - place * job.block_tokens) * p.stride_token + channel * p.stride_dim;
}

// Whether groups of 16 elements of `item` bytes lie in one row, adjacent and aligned for vectors.
__device__ bool rows_are_vectors(const kvs_plane& p, int64_t group_bytes) {
    const auto bits = reinterpret_cast<uintptr_t>(p.base) | p.stride_block | p.stride_head | p.stride_token;
    return p.stride_dim == p.item_bytes && int64_t{p.dim} * p.item_bytes % group_bytes == 0 && bits % 16 == 0;
}

// Where the engine keeps each token's first channel; to be read after a barrier.
__device__ void find_rows(const Job& job, const SubBlock& sub, uint8_t** rows) {
    for (int32_t token = threadIdx.x; token < job.chunk_tokens; token += THREADS) {
        rows[token] = engine_address(job, sub, token, 0);
    }
}

union Group {  // 16 bf16 elements
    uint4 vectors[2];
    uint16_t items[GROUP];
    uint32_t words[GROUP / 2];
};

// A place among the canonical elements. Rows have at least 16 channels, so a group crosses one end at most.
struct Place {
    int32_t token, channel;

    __device__ Place(int32_t element, int32_t dim) : token(element / dim), channel(element - token * dim) {}
    __device__ void step(int32_t dim) {
        if (++channel == dim) channel = 0, ++token;
    }
};

__device__ Group load_group(const Job& job, const SubBlock& sub, int32_t first, bool vectors) {
    Group group;
    Place at(first, sub.plane.dim);
    if (vectors) {
        const auto* from = reinterpret_cast<const uint4*>(engine_address(job, sub, at.token, at.channel));
        group.vectors[0] = from[0];
        group.vectors[1] = from[1];
        return group;
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i, at.step(sub.plane.dim)) {
        group.items[i] = *reinterpret_cast<const uint16_t*>(engine_address(job, sub, at.token, at.channel));
    }
    return group;
}

__device__ void store_group(const Job& job, const SubBlock& sub, int32_t first, bool vectors, const Group& group) {
    Place at(first, sub.plane.dim);
    if (vectors) {
        if (auto* to = reinterpret_cast<uint4*>(engine_address(job, sub, at.token, at.channel))) {
            to[0] = group.vectors[0];
            to[1] = group.vectors[1];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i, at.step(sub.plane.dim)) {
        if (auto* to = reinterpret_cast<uint16_t*>(engine_address(job, sub, at.token, at.channel))) {
            *to = group.items[i];
        }
    }
}

// The sum of all threads' shares, in every thread.
__device__ uint64_t total(uint64_t share) {
    __shared__ uint64_t shares[THREADS / 32];
    for (int step = 16; step > 0; step /= 2) share += __shfl_down_sync(0xFFFFFFFFu, share, step);
    __syncthreads();  // the shares of an earlier call have been read
    if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = share;
    __syncthreads();
    uint64_t sum = 0;
    for (int warp = 0; warp < THREADS / 32; ++warp) sum += shares[warp];
    return sum;
}

__device__ uint64_t word_term(uint64_t word, uint32_t index) {
    return kvs::term(word, (uint64_t{index} + 1) * kvs::KEY_STEP);
}

extern __shared__ uint4 shared[];  // gathering: kvs::PackingRoom; scattering: a sub-block and each token's address

__device__ uint8_t* shared_bytes() { return reinterpret_cast<uint8_t*>(shared); }

__device__ uint64_t vector_term(const uint4& two, uint32_t vector) {
    return word_term(uint64_t{two.y} << 32 | two.x, 2 * vector) +
           word_term(uint64_t{two.w} << 32 | two.z, 2 * vector + 1);
}

// The sum of a sub-block's words. With `keep` its bytes are left in shared memory, too.
__device__ uint64_t sum_of(const uint8_t* data, int32_t nbytes, bool keep) {
    uint64_t share = 0;
    const int32_t vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? nbytes / 16 : 0;
    const auto* from = reinterpret_cast<const uint4*>(data);
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < vectors; i += THREADS) {
        const uint4 two = __ldcs(from + i);
        if (keep) shared[i] = two;
        share += vector_term(two, i);
    }
    auto* kept = shared_bytes();
    for (int32_t at = vectors * 16 + threadIdx.x * 8; at < nbytes; at += THREADS * 8) {
        uint64_t word = 0;
        for (int32_t i = 0; i < min(8, nbytes - at); ++i) {
            word |= uint64_t{data[at + i]} << (8 * i);
            if (keep) kept[at + i] = data[at + i];
        }
        share += word_term(word, at / 8);
    }
    return total(share);
}

}  // namespace

#endif
