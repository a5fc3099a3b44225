// The copy kernels: engine blocks <-> stored chunks in device memory.
//
// Rule of this file: one thread block for each sub-block, so that its checksum, its channels' bases and
// its escapes are the thread block's own business. Work goes in groups of 16 consecutive canonical
// elements (packed) or 16 bytes (raw). A sub-block is verified whole before it is written anywhere, and
// where shared memory has room for it, device memory is read once.
#ifndef KVSTRATA_COPY_KERNELS_CUH
#define KVSTRATA_COPY_KERNELS_CUH

#include <cuda_runtime.h>

#include <cstdint>

#include "kvstrata.h"
#include "pack.h"

namespace {

constexpr int THREADS = 256;
constexpr int GROUP = 16;

// A piece of one chunk: some planes of it, stored at `data` in device memory.
struct Job {
    const kvs_plane* planes;  // in device memory
    const int32_t* first_of;  // plane -> its first thread block, and the number of them at the end
    int32_t n_planes;
    int32_t block_tokens;
    int32_t chunk_tokens;
    uint8_t* data;
    int64_t slot_offset;  // of `data` in the slot
    uint64_t* checksums;  // the slot's own table, in host memory
    uint64_t seed;
    int64_t* flag;  // in host memory: index of a sub-block that does not match, or does not fit
    int32_t room;   // bytes of shared memory for a sub-block; 0 where a larger one than that is among them
    int32_t block_ids[KVS_BLOCKS_MAX];
};

struct SubBlock {
    kvs_plane plane;
    int64_t local_head;
    int64_t index;
    uint8_t* data;
};

__device__ SubBlock sub_block_of(const Job& job, int number) {
    int low = 0, high = job.n_planes - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (job.first_of[middle] <= number) low = middle; else high = middle - 1;
    }
    SubBlock found;
    found.plane = job.planes[low];
    found.local_head = number - job.first_of[low];
    const int64_t head = found.plane.first_head + found.local_head;
    found.index = found.plane.checksum_index + head * found.plane.checksum_stride;
    found.data = job.data + found.plane.slot_offset + head * found.plane.slot_stride - job.slot_offset;
    return found;
}

// Where the engine keeps (token, channel) of a sub-block; null where its block takes no part.
__device__ uint8_t* engine_address(const Job& job, const SubBlock& sub, int32_t token, int32_t channel) {
    const int32_t place = token / job.block_tokens;
    const int64_t block = job.block_ids[place];
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

union Group {  // 16 bf16 elements
    uint4 vectors[2];
    uint16_t items[GROUP];
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

__device__ uint64_t word_term(uint64_t word, int64_t index) {
    return kvs::term(word, static_cast<uint64_t>(index + 1) * kvs::KEY_STEP);
}

extern __shared__ uint4 shared[];  // a sub-block, as much as `room`; when gathering, bases and escapes

__device__ uint64_t vector_term(const uint4& two, int32_t vector) {
    return word_term(uint64_t{two.y} << 32 | two.x, 2 * int64_t{vector}) +
           word_term(uint64_t{two.w} << 32 | two.z, 2 * int64_t{vector} + 1);
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
    auto* kept = reinterpret_cast<uint8_t*>(shared);
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

// --- raw -------------------------------------------------------------------------------------------

// Returns the sum of what this thread has written to the slot in whole vectors.
template <class Item>
__device__ uint64_t copy_raw(const Job& job, const SubBlock& sub, bool to_slot) {
    uint64_t share = 0;
    const int32_t dim = sub.plane.dim, items = job.chunk_tokens * dim;
    constexpr int32_t EACH = 16 / sizeof(Item);
    const bool vectors = rows_are_vectors(sub.plane, 16);
    for (int32_t first = threadIdx.x * EACH; first < items; first += THREADS * EACH) {
        Place place(first, dim);
        if (vectors) {
            auto* engine = reinterpret_cast<uint4*>(engine_address(job, sub, place.token, place.channel));
            auto* slot = reinterpret_cast<uint4*>(sub.data + first * sizeof(Item));
            if (to_slot) {
                const uint4 two = __ldcs(engine);
                __stcs(slot, two);
                share += vector_term(two, first / EACH);
            } else if (engine != nullptr) {
                *engine = *slot;
            }
            continue;
        }
        for (int32_t at = first; at < first + EACH && at < items; ++at, place.step(dim)) {
            auto* engine = reinterpret_cast<Item*>(engine_address(job, sub, place.token, place.channel));
            auto* slot = reinterpret_cast<Item*>(sub.data) + at;
            if (to_slot) *slot = *engine;
            else if (engine != nullptr) *engine = *slot;
        }
    }
    return share;
}

__device__ uint64_t copy_raw(const Job& job, const SubBlock& sub, bool to_slot) {
    switch (sub.plane.item_bytes) {
        case 1: return copy_raw<uint8_t>(job, sub, to_slot);
        case 2: return copy_raw<uint16_t>(job, sub, to_slot);
        default: return copy_raw<uint32_t>(job, sub, to_slot);
    }
}

__device__ uint64_t gather_raw(const Job& job, const SubBlock& sub, int32_t nbytes) {
    const uint64_t share = copy_raw(job, sub, true);
    if (rows_are_vectors(sub.plane, 16)) return total(share);
    __syncthreads();
    return sum_of(sub.data, nbytes, false);
}

// --- packed ----------------------------------------------------------------------------------------

// The largest ordinary exponent of each channel. With `keep`, each thread leaves its groups in shared memory.
__device__ void find_bases(const Job& job, const SubBlock& sub, bool vectors, int* bases, bool keep) {
    auto* kept = reinterpret_cast<Group*>(shared);
    const int32_t dim = sub.plane.dim, items = job.chunk_tokens * dim;
    for (int32_t d = threadIdx.x; d < dim; d += THREADS) bases[d] = 0;
    __syncthreads();
    // A thread whose stride is whole rows sees the same channels again and again: it asks once for each.
    const bool same_channels = THREADS * GROUP % dim == 0 && dim % GROUP == 0;
    int largest[GROUP] = {};
    for (int32_t first = threadIdx.x * GROUP; first < items; first += THREADS * GROUP) {
        const Group group = load_group(job, sub, first, vectors);
        if (keep) kept[first / GROUP] = group;
        Place at(first, dim);
#pragma unroll
        for (int i = 0; i < GROUP; ++i, at.step(dim)) {
            const int exponent = kvs::exponent_of(group.items[i]);
            if (exponent == kvs::EXPONENT_SPECIAL) continue;
            if (same_channels) largest[i] = max(largest[i], exponent);
            else atomicMax(&bases[at.channel], exponent);
        }
    }
    if (same_channels) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) atomicMax(&bases[(threadIdx.x * GROUP + i) % dim], largest[i]);
    }
    __syncthreads();
}

// Packs the sub-block; returns this thread's share of its checksum. `escapes` is sorted and zero-padded.
__device__ uint64_t pack_groups(const Job& job, const SubBlock& sub, bool vectors, bool kept, const int* bases,
                                uint32_t* escapes, uint32_t* count, uint32_t escapes_max) {
    const kvs::Packed shape = {int64_t{job.chunk_tokens} * sub.plane.dim, sub.plane.dim};
    const auto elements = static_cast<int32_t>(shape.elements);
    uint64_t share = 0;
    for (int32_t first = threadIdx.x * GROUP; first < elements; first += THREADS * GROUP) {
        const Group group = kept ? reinterpret_cast<const Group*>(shared)[first / GROUP]
                                 : load_group(job, sub, first, vectors);
        Place at(first, sub.plane.dim);
        uint64_t rest[2] = {}, codes = 0;
#pragma unroll
        for (int i = 0; i < GROUP; ++i, at.step(sub.plane.dim)) {
            const int exponent = kvs::exponent_of(group.items[i]);
            const int code = kvs::code_of(bases[at.channel], exponent);
            rest[i / 8] |= uint64_t{kvs::rest_of(group.items[i])} << (8 * (i % 8));
            codes |= uint64_t{static_cast<uint32_t>(code)} << (4 * i);
            if (code == kvs::ESCAPE) {
                const uint32_t place = atomicAdd(count, 1u);
                if (place < escapes_max) escapes[place] = static_cast<uint32_t>(first + i) << 8 | exponent;
            }
        }
        auto* rest_words = reinterpret_cast<uint64_t*>(sub.data + first);
        rest_words[0] = rest[0];
        rest_words[1] = rest[1];
        *reinterpret_cast<uint64_t*>(sub.data + shape.codes() + first / 2) = codes;
        share += word_term(rest[0], first / 8) + word_term(rest[1], first / 8 + 1);
        share += word_term(codes, (shape.codes() + first / 2) / 8);
    }
    return share;
}

// The bases and the escapes, in the order of their positions whatever order threads found them in.
__device__ uint64_t pack_tables(const SubBlock& sub, const kvs::Packed& shape, const int* bases,
                                const uint32_t* escapes, uint32_t count) {
    for (int64_t d = threadIdx.x; d < (shape.dim + 7) / 8 * 8; d += THREADS) {
        sub.data[shape.bases() + d] = static_cast<uint8_t>(d < shape.dim ? bases[d] : 0);
    }
    auto* table = reinterpret_cast<uint32_t*>(sub.data + shape.escapes());
    const int64_t words = (shape.nbytes() - shape.escapes()) / 4;
    for (int64_t i = threadIdx.x; i < words; i += THREADS) {
        if (i == 0) table[0] = count;
        else if (i > count) table[i] = 0;
    }
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        uint32_t before = 0;
        for (uint32_t j = 0; j < count; ++j) before += escapes[j] < escapes[i];
        table[1 + before] = escapes[i];
    }
    __syncthreads();
    uint64_t share = 0;
    const auto* from = reinterpret_cast<const uint64_t*>(sub.data);
    for (int64_t i = shape.bases() / 8 + threadIdx.x; i < shape.nbytes() / 8; i += THREADS) {
        share += word_term(from[i], i);
    }
    return share;
}

__device__ void unpack(const Job& job, const SubBlock& sub) {
    const kvs::Packed shape = {int64_t{job.chunk_tokens} * sub.plane.dim, sub.plane.dim};
    const bool vectors = rows_are_vectors(sub.plane, 32);
    const uint8_t* bases = sub.data + shape.bases();
    const auto elements = static_cast<int32_t>(shape.elements);
    for (int32_t first = threadIdx.x * GROUP; first < elements; first += THREADS * GROUP) {
        const auto* rest = reinterpret_cast<const uint64_t*>(sub.data + first);
        const uint64_t words[2] = {rest[0], rest[1]};
        const uint64_t codes = *reinterpret_cast<const uint64_t*>(sub.data + shape.codes() + first / 2);
        Group group;
        Place at(first, sub.plane.dim);
#pragma unroll
        for (int i = 0; i < GROUP; ++i, at.step(sub.plane.dim)) {
            const int base = bases[at.channel], code = static_cast<int>(codes >> (4 * i) & 15);
            group.items[i] = kvs::join(static_cast<uint8_t>(words[i / 8] >> (8 * (i % 8))), base - code & 0xFF);
        }
        store_group(job, sub, first, vectors, group);
    }
    __syncthreads();  // escapes overwrite what the codes gave
    const auto* table = reinterpret_cast<const uint32_t*>(sub.data + shape.escapes());
    const auto most = static_cast<uint32_t>(shape.escapes_max());
    for (uint32_t i = threadIdx.x; i < min(table[0], most); i += THREADS) {
        const auto element = min(static_cast<int32_t>(table[1 + i] >> 8), elements - 1);
        const Place at(element, sub.plane.dim);
        auto* to = engine_address(job, sub, at.token, at.channel);
        if (to != nullptr) *reinterpret_cast<uint16_t*>(to) = kvs::join(sub.data[element], table[1 + i] & 0xFF);
    }
}

// --- kernels ---------------------------------------------------------------------------------------

__device__ uint64_t gather_packed(const Job& job, const SubBlock& sub, const kvs::Packed& shape, bool* fits) {
    __shared__ uint32_t count;
    if (threadIdx.x == 0) count = 0;
    const bool vectors = rows_are_vectors(sub.plane, 32), keep = 2 * shape.elements <= job.room;
    int* bases = reinterpret_cast<int*>(shared) + job.room / sizeof(int);
    auto* escapes = reinterpret_cast<uint32_t*>(bases + shape.dim);
    const auto most = static_cast<uint32_t>(shape.escapes_max());
    find_bases(job, sub, vectors, bases, keep);
    uint64_t share = pack_groups(job, sub, vectors, keep, bases, escapes, &count, most);
    __syncthreads();
    *fits = count <= most;
    if (!*fits) return 0;
    share += pack_tables(sub, shape, bases, escapes, count);
    return total(share);
}

__global__ void __launch_bounds__(THREADS) gather_kernel(const __grid_constant__ Job job) {
    const SubBlock sub = sub_block_of(job, blockIdx.x);
    const int32_t items = job.chunk_tokens * sub.plane.dim;
    const kvs::Packed shape = {items, sub.plane.dim};
    const bool packed = sub.plane.codec == KVS_PACKED;
    const int64_t nbytes = packed ? shape.nbytes() : int64_t{items} * sub.plane.item_bytes;
    bool fits = true;
    const uint64_t sum = packed ? gather_packed(job, sub, shape, &fits) : gather_raw(job, sub, nbytes);
    if (threadIdx.x != 0) return;
    if (fits) job.checksums[sub.index] = kvs::finish(sum, nbytes, job.seed + static_cast<uint64_t>(sub.index));
    else *job.flag = sub.index;  // whoever gathers this chunk must not store it
}

__global__ void __launch_bounds__(THREADS) scatter_kernel(const __grid_constant__ Job job) {
    SubBlock sub = sub_block_of(job, blockIdx.x);
    const int32_t items = job.chunk_tokens * sub.plane.dim;
    const bool packed = sub.plane.codec == KVS_PACKED;
    const int64_t nbytes =
        packed ? kvs::Packed{items, sub.plane.dim}.nbytes() : int64_t{items} * sub.plane.item_bytes;
    __shared__ uint64_t stored;
    if (threadIdx.x == 0) stored = job.checksums[sub.index];  // over PCIe: once, while the others add up
    const bool keep = nbytes <= job.room;
    const uint64_t sum = sum_of(sub.data, nbytes, keep);
    if (stored != kvs::finish(sum, nbytes, job.seed + static_cast<uint64_t>(sub.index))) {
        if (threadIdx.x == 0) *job.flag = sub.index;
        return;
    }
    if (keep) sub.data = reinterpret_cast<uint8_t*>(shared);
    if (packed) unpack(job, sub);
    else copy_raw(job, sub, false);
}

}  // namespace

#endif
