// The copy kernels: engine blocks <-> stored chunks in device memory.
//
// Rule of this file: one thread block for each sub-block, so that its checksum, its channels' bases and
// its escapes are the thread block's own business. A sub-block is verified whole before it is written
// anywhere, and where registers or shared memory have room for it, device memory is read once.
#ifndef KVSTRATA_COPY_KERNELS_CUH
#define KVSTRATA_COPY_KERNELS_CUH

#include "pack_kernels.cuh"

namespace {

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

// --- kernels ---------------------------------------------------------------------------------------

__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE) gather_kernel(const __grid_constant__ Job job) {
    const SubBlock sub = sub_block_of(job, job.first + blockIdx.x);
    const int32_t items = job.chunk_tokens * sub.plane.dim;
    const kvs::Packed shape = {items, sub.plane.dim};
    const bool packed = sub.plane.codec == KVS_PACKED;
    const int64_t nbytes = packed ? shape.nbytes() : int64_t{items} * sub.plane.item_bytes;
    bool fits = true;
    const uint64_t sum = packed ? gather_packed(job, sub, shape, &fits) : gather_raw(job, sub, nbytes);
    if (threadIdx.x != 0) return;
    const uint64_t seed = sub.chunk->seed + static_cast<uint64_t>(sub.index);
    if (fits) sub.chunk->checksums[sub.index] = kvs::finish(sum, nbytes, seed);
    else *sub.chunk->flag = sub.index;  // whoever gathers this chunk must not store it
}

__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE) scatter_kernel(const __grid_constant__ Job job) {
    SubBlock sub = sub_block_of(job, job.first + blockIdx.x);
    const int32_t items = job.chunk_tokens * sub.plane.dim;
    const bool packed = sub.plane.codec == KVS_PACKED;
    const int64_t nbytes =
        packed ? kvs::Packed{items, sub.plane.dim}.nbytes() : int64_t{items} * sub.plane.item_bytes;
    __shared__ uint64_t stored;
    if (threadIdx.x == 0) stored = sub.chunk->checksums[sub.index];  // over PCIe: once, while the others add up
    const int64_t rows_at = (nbytes + 15) / 16 * 16;
    const bool keep = rows_at + 8 * job.chunk_tokens <= job.room;
    auto** rows = keep ? reinterpret_cast<uint8_t**>(shared_bytes() + rows_at) : nullptr;
    if (keep) find_rows(job, sub, rows);
    const uint64_t sum = sum_of(sub.data, nbytes, keep);
    if (stored != kvs::finish(sum, nbytes, sub.chunk->seed + static_cast<uint64_t>(sub.index))) {
        if (threadIdx.x == 0) *sub.chunk->flag = sub.index;
        return;
    }
    if (keep) sub.data = shared_bytes();
    if (packed) unpack(job, sub, rows);
    else copy_raw(job, sub, false);
}

}  // namespace

#endif
