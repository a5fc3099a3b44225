// The copy kernels: engine blocks <-> stored chunks in device memory (kvstrata.h says what).
//
// Rule of this file: one thread block for each sub-block, so that its checksum, its channels' bases and
// its escapes are the thread block's own business. Work goes in groups of 16 consecutive canonical
// elements (packed) or 16 bytes (raw). A sub-block is verified whole before it is written anywhere.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <vector>

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

__device__ uint64_t sum_of(const uint8_t* data, int64_t nbytes) {
    uint64_t share = 0;
    const int64_t words = nbytes / 8;
    const auto* from = reinterpret_cast<const uint64_t*>(data);
    for (int64_t i = threadIdx.x; i < words; i += THREADS) share += word_term(from[i], i);
    if (threadIdx.x == 0 && nbytes % 8 != 0) {
        uint64_t word = 0;
        for (int64_t i = 0; i < nbytes % 8; ++i) word |= uint64_t{data[words * 8 + i]} << (8 * i);
        share += word_term(word, words);
    }
    return total(share);
}

// --- raw -------------------------------------------------------------------------------------------

template <class Item>
__device__ void copy_raw(const Job& job, const SubBlock& sub, bool to_slot) {
    const int32_t dim = sub.plane.dim, items = job.chunk_tokens * dim;
    constexpr int32_t EACH = 16 / sizeof(Item);
    const bool vectors = rows_are_vectors(sub.plane, 16);
    for (int32_t first = threadIdx.x * EACH; first < items; first += THREADS * EACH) {
        Place place(first, dim);
        if (vectors) {
            auto* engine = reinterpret_cast<uint4*>(engine_address(job, sub, place.token, place.channel));
            auto* slot = reinterpret_cast<uint4*>(sub.data + first * sizeof(Item));
            if (to_slot) *slot = *engine;
            else if (engine != nullptr) *engine = *slot;
            continue;
        }
        for (int32_t at = first; at < first + EACH && at < items; ++at, place.step(dim)) {
            auto* engine = reinterpret_cast<Item*>(engine_address(job, sub, place.token, place.channel));
            auto* slot = reinterpret_cast<Item*>(sub.data) + at;
            if (to_slot) *slot = *engine;
            else if (engine != nullptr) *engine = *slot;
        }
    }
}

__device__ void copy_raw(const Job& job, const SubBlock& sub, bool to_slot) {
    switch (sub.plane.item_bytes) {
        case 1: copy_raw<uint8_t>(job, sub, to_slot); break;
        case 2: copy_raw<uint16_t>(job, sub, to_slot); break;
        default: copy_raw<uint32_t>(job, sub, to_slot); break;
    }
}

// --- packed ----------------------------------------------------------------------------------------

__device__ void find_bases(const Job& job, const SubBlock& sub, bool vectors, int* bases) {
    const int32_t dim = sub.plane.dim, items = job.chunk_tokens * dim;
    for (int32_t d = threadIdx.x; d < dim; d += THREADS) bases[d] = 0;
    __syncthreads();
    // A thread whose stride is whole rows sees the same channels again and again: it asks once for each.
    const bool same_channels = THREADS * GROUP % dim == 0 && dim % GROUP == 0;
    int largest[GROUP] = {};
    for (int32_t first = threadIdx.x * GROUP; first < items; first += THREADS * GROUP) {
        const Group group = load_group(job, sub, first, vectors);
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
__device__ uint64_t pack_groups(const Job& job, const SubBlock& sub, bool vectors, const int* bases,
                                uint32_t* escapes, uint32_t* count, uint32_t escapes_max) {
    const kvs::Packed shape = {int64_t{job.chunk_tokens} * sub.plane.dim, sub.plane.dim};
    const auto elements = static_cast<int32_t>(shape.elements);
    uint64_t share = 0;
    for (int32_t first = threadIdx.x * GROUP; first < elements; first += THREADS * GROUP) {
        const Group group = load_group(job, sub, first, vectors);
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

extern __shared__ int scratch[];  // bases, then escapes

__global__ void __launch_bounds__(THREADS) gather_kernel(const __grid_constant__ Job job) {
    const SubBlock sub = sub_block_of(job, blockIdx.x);
    const int64_t items = int64_t{job.chunk_tokens} * sub.plane.dim;
    int64_t nbytes = items * sub.plane.item_bytes;
    uint64_t sum;
    if (sub.plane.codec == KVS_PACKED) {
        const kvs::Packed shape = {items, sub.plane.dim};
        __shared__ uint32_t count;
        if (threadIdx.x == 0) count = 0;
        const bool vectors = rows_are_vectors(sub.plane, 32);
        int* bases = scratch;
        auto* escapes = reinterpret_cast<uint32_t*>(scratch + shape.dim);
        find_bases(job, sub, vectors, bases);
        const auto most = static_cast<uint32_t>(shape.escapes_max());
        uint64_t share = pack_groups(job, sub, vectors, bases, escapes, &count, most);
        __syncthreads();
        if (count > most) {  // whoever gathers this chunk must not store it
            if (threadIdx.x == 0) *job.flag = sub.index;
            return;
        }
        share += pack_tables(sub, shape, bases, escapes, count);
        sum = total(share);
        nbytes = shape.nbytes();
    } else {
        copy_raw(job, sub, true);
        __syncthreads();
        sum = sum_of(sub.data, nbytes);
    }
    if (threadIdx.x == 0) {
        job.checksums[sub.index] = kvs::finish(sum, nbytes, job.seed + static_cast<uint64_t>(sub.index));
    }
}

__global__ void __launch_bounds__(THREADS) scatter_kernel(const __grid_constant__ Job job) {
    const SubBlock sub = sub_block_of(job, blockIdx.x);
    const int64_t items = int64_t{job.chunk_tokens} * sub.plane.dim;
    const bool packed = sub.plane.codec == KVS_PACKED;
    const int64_t nbytes = packed ? kvs::Packed{items, sub.plane.dim}.nbytes() : items * sub.plane.item_bytes;
    __shared__ uint64_t stored;
    if (threadIdx.x == 0) stored = job.checksums[sub.index];  // over PCIe: once, while the others add up
    const uint64_t sum = sum_of(sub.data, nbytes);
    if (stored != kvs::finish(sum, nbytes, job.seed + static_cast<uint64_t>(sub.index))) {
        if (threadIdx.x == 0) *job.flag = sub.index;
        return;
    }
    if (packed) unpack(job, sub);
    else copy_raw(job, sub, false);
}

// --- the pipe --------------------------------------------------------------------------------------

struct Run {  // bytes of a slot that this pipe copies
    int64_t offset, nbytes;
};

// As many layers as fit in a slab.
struct Piece {
    int32_t first_plane = 0, planes = 0, sub_blocks = 0, shared_bytes = 0;
    std::vector<Run> runs;

    int64_t offset() const { return runs.front().offset; }
    int64_t end() const { return runs.back().offset + runs.back().nbytes; }
};

struct Slab {
    uint8_t* data = nullptr;
    cudaEvent_t filled = nullptr;
    cudaEvent_t free = nullptr;
};

// What one call waits for: its end, and a flag for each chunk in host memory that kernels write to.
struct Ticket {
    cudaEvent_t end = nullptr;
    int64_t* flags = nullptr;
};

constexpr int64_t FLAGS = 1024;

}  // namespace

struct kvs_pipe {
    kvs_pipe_shape shape;
    std::vector<Piece> pieces;
    std::vector<Slab> slabs;
    std::vector<Ticket> tickets;  // not in use
    kvs_plane* planes = nullptr;
    int32_t* first_of = nullptr;
    cudaStream_t copies = nullptr, kernels = nullptr;
    size_t next_slab = 0;
    std::mutex turn;  // calls enqueue one after the other; they wait for their ends together
    std::mutex drawer;
};

namespace {

#define KVS_TRY(call)                                             \
    do {                                                          \
        const cudaError_t error_ = (call);                        \
        if (error_ != cudaSuccess) return static_cast<int>(error_); \
    } while (0)

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t sub_block_bytes(const kvs_plane& plane, int64_t chunk_tokens) {
    const int64_t items = chunk_tokens * plane.dim;
    return plane.codec == KVS_PACKED ? kvs::Packed{items, plane.dim}.nbytes() : items * plane.item_bytes;
}

// Cuts the planes into pieces. A plane's bytes lie between those of the same layer's others, so planes
// that overlap stay together.
std::vector<Piece> cut(const kvs_pipe_shape& shape, const kvs_plane* planes, int64_t n,
                       std::vector<int32_t>* first_of) {
    std::vector<Piece> pieces;
    for (int64_t p = 0; p < n; ++p) {
        const kvs_plane& plane = planes[p];
        const int64_t begin = plane.slot_offset + plane.first_head * plane.slot_stride;
        const int64_t end =
            begin + (plane.heads - 1) * plane.slot_stride + sub_block_bytes(plane, shape.chunk_tokens);
        const bool overlaps = !pieces.empty() && begin < pieces.back().end();
        if (pieces.empty() || (!overlaps && end - pieces.back().offset() > shape.slab_bytes)) {
            pieces.emplace_back();
            pieces.back().first_plane = static_cast<int32_t>(p);
        }
        Piece& piece = pieces.back();
        if (!piece.runs.empty() && begin <= piece.end()) {
            piece.runs.back().nbytes = std::max(end, piece.end()) - piece.runs.back().offset;
        } else {
            piece.runs.push_back({begin, end - begin});
        }
        if (plane.codec == KVS_PACKED) {
            const kvs::Packed size = {shape.chunk_tokens * int64_t{plane.dim}, plane.dim};
            const auto bytes = static_cast<int32_t>(sizeof(int32_t) * (plane.dim + size.escapes_max()));
            piece.shared_bytes = std::max(piece.shared_bytes, bytes);
        }
        first_of->push_back(piece.sub_blocks);
        piece.planes += 1;
        piece.sub_blocks += plane.heads;
    }
    return pieces;
}

Job job_of(const kvs_pipe& pipe, const Piece& piece, const Slab& slab, const kvs_chunk& chunk, int64_t* flag) {
    Job job = {};
    job.planes = pipe.planes + piece.first_plane;
    job.first_of = pipe.first_of + piece.first_plane;
    job.n_planes = piece.planes;
    job.block_tokens = pipe.shape.block_tokens;
    job.chunk_tokens = pipe.shape.chunk_tokens;
    job.data = slab.data;
    job.slot_offset = piece.offset();
    job.checksums = reinterpret_cast<uint64_t*>(chunk.slot + pipe.shape.checksum_offset);
    job.seed = chunk.seed;
    job.flag = flag;
    std::copy_n(chunk.block_ids, pipe.shape.chunk_tokens / pipe.shape.block_tokens, job.block_ids);
    return job;
}

// The next slab, once nobody needs its bytes: what is under way and cannot be recalled stays bounded.
int take_slab(kvs_pipe& pipe, Slab** slab) {
    *slab = &pipe.slabs[pipe.next_slab++ % pipe.slabs.size()];
    KVS_TRY(cudaEventSynchronize((*slab)->free));
    return 0;
}

int load_piece(kvs_pipe& pipe, const Piece& piece, const kvs_chunk& chunk, int64_t* flag) {
    Slab* slab;
    if (const int error = take_slab(pipe, &slab)) return error;
    for (const Run& run : piece.runs) {
        KVS_TRY(cudaMemcpyAsync(slab->data + (run.offset - piece.offset()), chunk.slot + run.offset,
                                run.nbytes, cudaMemcpyHostToDevice, pipe.copies));
    }
    KVS_TRY(cudaEventRecord(slab->filled, pipe.copies));
    KVS_TRY(cudaStreamWaitEvent(pipe.kernels, slab->filled, 0));
    scatter_kernel<<<piece.sub_blocks, THREADS, 0, pipe.kernels>>>(job_of(pipe, piece, *slab, chunk, flag));
    KVS_TRY(cudaGetLastError());
    KVS_TRY(cudaEventRecord(slab->free, pipe.kernels));
    return 0;
}

int save_piece(kvs_pipe& pipe, const Piece& piece, const kvs_chunk& chunk, int64_t* flag) {
    Slab* slab;
    if (const int error = take_slab(pipe, &slab)) return error;
    gather_kernel<<<piece.sub_blocks, THREADS, piece.shared_bytes, pipe.kernels>>>(
        job_of(pipe, piece, *slab, chunk, flag));
    KVS_TRY(cudaGetLastError());
    KVS_TRY(cudaEventRecord(slab->filled, pipe.kernels));
    KVS_TRY(cudaStreamWaitEvent(pipe.copies, slab->filled, 0));
    for (const Run& run : piece.runs) {
        KVS_TRY(cudaMemcpyAsync(chunk.slot + run.offset, slab->data + (run.offset - piece.offset()),
                                run.nbytes, cudaMemcpyDeviceToHost, pipe.copies));
    }
    KVS_TRY(cudaEventRecord(slab->free, pipe.copies));
    return 0;
}

// Enqueues chunks until `expires`; `begun` counts them. Afterwards `end` is behind all of them.
int enqueue(kvs_pipe& pipe, bool load, const kvs_chunk* chunks, int64_t count, cudaEvent_t after, double expires,
            const Ticket& ticket, int64_t* begun) {
    const std::lock_guard<std::mutex> lock(pipe.turn);
    if (after != nullptr) KVS_TRY(cudaStreamWaitEvent(pipe.kernels, after, 0));
    int error = 0;
    for (*begun = 0; *begun < count && now_s() <= expires; ++*begun) {
        for (const Piece& piece : pipe.pieces) {
            int64_t* flag = ticket.flags + *begun;
            error = load ? load_piece(pipe, piece, chunks[*begun], flag) : save_piece(pipe, piece, chunks[*begun], flag);
            if (error != 0) break;
        }
        if (error != 0) break;
    }
    const cudaError_t marked = cudaEventRecord(ticket.end, load ? pipe.kernels : pipe.copies);
    return error != 0 ? error : static_cast<int>(marked);
}

int take_ticket(kvs_pipe& pipe, Ticket* ticket) {
    const std::lock_guard<std::mutex> lock(pipe.drawer);
    if (!pipe.tickets.empty()) {
        *ticket = pipe.tickets.back();
        pipe.tickets.pop_back();
        return 0;
    }
    KVS_TRY(cudaEventCreateWithFlags(&ticket->end, cudaEventDisableTiming | cudaEventBlockingSync));
    KVS_TRY(cudaHostAlloc(reinterpret_cast<void**>(&ticket->flags), FLAGS * sizeof(int64_t), cudaHostAllocPortable));
    return 0;
}

int run(kvs_pipe& pipe, bool load, const kvs_chunk* chunks, int64_t count, void* after, double expires,
        int64_t* begun, int64_t* flags) {
    KVS_TRY(cudaSetDevice(pipe.shape.device));
    Ticket ticket;
    if (const int error = take_ticket(pipe, &ticket)) return error;
    std::fill_n(ticket.flags, count, KVS_ALL_GOOD);
    const int error =
        enqueue(pipe, load, chunks, count, static_cast<cudaEvent_t>(after), expires, ticket, begun);
    const cudaError_t ended = cudaEventSynchronize(ticket.end);
    std::copy_n(ticket.flags, count, flags);
    const std::lock_guard<std::mutex> lock(pipe.drawer);
    pipe.tickets.push_back(ticket);
    return error != 0 ? error : static_cast<int>(ended);
}

int open_pipe(kvs_pipe& pipe, const kvs_plane* planes, int64_t n_planes) {
    KVS_TRY(cudaSetDevice(pipe.shape.device));
    std::vector<int32_t> first_of;
    pipe.pieces = cut(pipe.shape, planes, n_planes, &first_of);
    KVS_TRY(cudaMalloc(reinterpret_cast<void**>(&pipe.planes), n_planes * sizeof(kvs_plane)));
    KVS_TRY(cudaMemcpy(pipe.planes, planes, n_planes * sizeof(kvs_plane), cudaMemcpyHostToDevice));
    KVS_TRY(cudaMalloc(reinterpret_cast<void**>(&pipe.first_of), n_planes * sizeof(int32_t)));
    KVS_TRY(cudaMemcpy(pipe.first_of, first_of.data(), n_planes * sizeof(int32_t), cudaMemcpyHostToDevice));
    KVS_TRY(cudaStreamCreateWithFlags(&pipe.copies, cudaStreamNonBlocking));
    KVS_TRY(cudaStreamCreateWithFlags(&pipe.kernels, cudaStreamNonBlocking));
    int64_t largest = 0;
    for (const Piece& piece : pipe.pieces) largest = std::max(largest, piece.end() - piece.offset());
    pipe.slabs.resize(static_cast<size_t>(pipe.shape.slabs));
    for (Slab& slab : pipe.slabs) {
        KVS_TRY(cudaMalloc(reinterpret_cast<void**>(&slab.data), static_cast<size_t>(largest)));
        KVS_TRY(cudaEventCreateWithFlags(&slab.filled, cudaEventDisableTiming));
        KVS_TRY(cudaEventCreateWithFlags(&slab.free, cudaEventDisableTiming | cudaEventBlockingSync));
    }
    return 0;
}

}  // namespace

int kvs_cuda_abi_version(void) noexcept { return KVS_ABI_VERSION; }

const char* kvs_cuda_error(int error) noexcept { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int kvs_pipe_open(const kvs_pipe_shape* shape, const kvs_plane* planes, int64_t n_planes, kvs_pipe** pipe) noexcept {
    *pipe = new kvs_pipe;
    (*pipe)->shape = *shape;
    const int error = open_pipe(**pipe, planes, n_planes);
    if (error != 0) {
        kvs_pipe_close(*pipe);
        *pipe = nullptr;
    }
    return error;
}

void kvs_pipe_close(kvs_pipe* pipe) noexcept {
    cudaSetDevice(pipe->shape.device);
    if (pipe->copies != nullptr) cudaStreamSynchronize(pipe->copies);
    if (pipe->kernels != nullptr) cudaStreamSynchronize(pipe->kernels);
    for (const Slab& slab : pipe->slabs) {
        cudaFree(slab.data);
        if (slab.filled != nullptr) cudaEventDestroy(slab.filled);
        if (slab.free != nullptr) cudaEventDestroy(slab.free);
    }
    for (const Ticket& ticket : pipe->tickets) {
        cudaEventDestroy(ticket.end);
        cudaFreeHost(ticket.flags);
    }
    cudaFree(pipe->planes);
    cudaFree(pipe->first_of);
    if (pipe->copies != nullptr) cudaStreamDestroy(pipe->copies);
    if (pipe->kernels != nullptr) cudaStreamDestroy(pipe->kernels);
    delete pipe;
}

int kvs_pipe_load(kvs_pipe* pipe, const kvs_chunk* chunks, int64_t count, void* after, double expires,
                  int64_t* begun, int64_t* flags) noexcept {
    return run(*pipe, true, chunks, count, after, expires, begun, flags);
}

int kvs_pipe_save(kvs_pipe* pipe, const kvs_chunk* chunks, int64_t count, void* after, int64_t* flags) noexcept {
    int64_t begun;
    return run(*pipe, false, chunks, count, after, 1e300, &begun, flags);
}

int kvs_cuda_register(int device, void* memory, int64_t nbytes) noexcept {
    KVS_TRY(cudaSetDevice(device));
    return static_cast<int>(cudaHostRegister(memory, static_cast<size_t>(nbytes), cudaHostRegisterPortable));
}

int kvs_cuda_unregister(int device, void* memory) noexcept {
    KVS_TRY(cudaSetDevice(device));
    return static_cast<int>(cudaHostUnregister(memory));
}
