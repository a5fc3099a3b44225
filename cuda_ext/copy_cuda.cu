// The pipe: chunks between pinned host memory and engine blocks, through slabs of staging memory.
//
// Rule of this file: everything is enqueued; a caller waits for a slab, and at last for its own end.
// Copies go on one stream and kernels on another, so that a slab is filled while another is worked on.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <vector>

#include "copy_kernels.cuh"
#include "kvstrata.h"
#include "pack.h"

namespace {

struct Run {  // bytes of a slot that this pipe copies
    int64_t offset, nbytes;
};

// As many layers as fit in a slab.
struct Piece {
    int32_t first_plane = 0, planes = 0, sub_blocks = 0;
    int64_t unpacked_bytes = 0, stored_bytes = 0, tables_bytes = 0;  // of the largest sub-block
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
constexpr int SHARED_OF_KERNELS = 1024;  // more than their own variables need

}  // namespace

struct kvs_pipe {
    kvs_pipe_shape shape;
    std::vector<Piece> pieces;
    std::vector<Slab> slabs;
    std::vector<Ticket> tickets;  // not in use
    kvs_plane* planes = nullptr;
    int32_t* first_of = nullptr;
    cudaStream_t copies = nullptr, kernels = nullptr;
    int shared_max = 0;  // bytes of shared memory that one thread block may have
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
        const kvs::Packed size = {shape.chunk_tokens * int64_t{plane.dim}, plane.dim};
        piece.stored_bytes = std::max(piece.stored_bytes, sub_block_bytes(plane, shape.chunk_tokens));
        if (plane.codec == KVS_PACKED) {
            const int64_t tables = sizeof(int32_t) * (plane.dim + size.escapes_max());
            piece.unpacked_bytes = std::max(piece.unpacked_bytes, 2 * size.elements);
            piece.tables_bytes = std::max(piece.tables_bytes, tables);
        }
        first_of->push_back(piece.sub_blocks);
        piece.planes += 1;
        piece.sub_blocks += plane.heads;
    }
    return pieces;
}

// Shared memory for a sub-block of so many bytes, in whole vectors; 0 if there is not as much.
int32_t room_for(const kvs_pipe& pipe, int64_t nbytes, int64_t tables) {
    const int64_t room = (nbytes + 15) / 16 * 16;
    return room + tables <= pipe.shared_max ? static_cast<int32_t>(room) : 0;
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
    Job job = job_of(pipe, piece, *slab, chunk, flag);
    job.room = room_for(pipe, piece.stored_bytes, 0);
    scatter_kernel<<<piece.sub_blocks, THREADS, job.room, pipe.kernels>>>(job);
    KVS_TRY(cudaGetLastError());
    KVS_TRY(cudaEventRecord(slab->free, pipe.kernels));
    return 0;
}

int save_piece(kvs_pipe& pipe, const Piece& piece, const kvs_chunk& chunk, int64_t* flag) {
    Slab* slab;
    if (const int error = take_slab(pipe, &slab)) return error;
    Job job = job_of(pipe, piece, *slab, chunk, flag);
    job.room = room_for(pipe, piece.unpacked_bytes, piece.tables_bytes);
    gather_kernel<<<piece.sub_blocks, THREADS, job.room + piece.tables_bytes, pipe.kernels>>>(job);
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
    KVS_TRY(cudaDeviceGetAttribute(&pipe.shared_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, pipe.shape.device));
    pipe.shared_max -= SHARED_OF_KERNELS;
    for (const void* kernel : {reinterpret_cast<const void*>(gather_kernel), reinterpret_cast<const void*>(scatter_kernel)}) {
        KVS_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, pipe.shared_max));
    }
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
