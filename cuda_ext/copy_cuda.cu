// The pipe: chunks between pinned host memory and engine blocks, through slabs of staging memory.
//
// Rule of this file: everything is enqueued; a caller waits for a slab, and at last for its own end.
// Copies go on one stream and kernels on another, so that a slab is filled while another is worked on.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
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

constexpr int SHARED_OF_KERNELS = 1024;  // more than their own variables need

}  // namespace

// What one job waits for: the end of what it has enqueued, and a flag for each chunk that kernels write to.
struct kvs_ticket {
    cudaEvent_t end = nullptr;
    int64_t* flags = nullptr;  // in host memory
    int64_t used = 0;
};

struct kvs_pipe {
    kvs_pipe_shape shape;
    std::vector<Piece> pieces;
    std::vector<Slab> slabs;
    std::vector<kvs_ticket*> tickets;  // not in use
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

// Exactly the bytes of the planes' sub-blocks, joined where they touch: what lies between is others'.
std::vector<Run> runs_of(const kvs_plane* planes, int64_t n, int64_t chunk_tokens) {
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

// Cuts the planes, in slot order, into pieces of whole layers that fit in a slab, or of one that does not.
std::vector<Piece> cut(const kvs_pipe_shape& shape, const kvs_plane* planes, int64_t n,
                       std::vector<int32_t>* first_of) {
    std::vector<Piece> pieces;
    int64_t begin = 0, end = 0;  // of the piece, in the slot
    for (int64_t p = 0; p < n; ++p) {
        const kvs_plane& plane = planes[p];
        const int64_t from = plane.slot_offset + plane.first_head * plane.slot_stride;
        const int64_t nbytes = sub_block_bytes(plane, shape.chunk_tokens);
        const int64_t to = from + (plane.heads - 1) * plane.slot_stride + nbytes;
        // A layer's planes lie between each other's heads: they overlap.
        if (pieces.empty() || (from >= end && to - begin > shape.slab_bytes)) {
            pieces.emplace_back();
            pieces.back().first_plane = static_cast<int32_t>(p);
            begin = end = from;
        }
        Piece& piece = pieces.back();
        begin = std::min(begin, from);
        end = std::max(end, to);
        piece.stored_bytes = std::max(piece.stored_bytes, nbytes);
        if (plane.codec == KVS_PACKED) {
            const kvs::Packed size = {shape.chunk_tokens * int64_t{plane.dim}, plane.dim};
            const int64_t tables = sizeof(int32_t) * (plane.dim + size.escapes_max());
            piece.unpacked_bytes = std::max(piece.unpacked_bytes, 2 * size.elements);
            piece.tables_bytes = std::max(piece.tables_bytes, tables);
        }
        first_of->push_back(piece.sub_blocks);
        piece.planes += 1;
        piece.sub_blocks += plane.heads;
    }
    for (Piece& piece : pieces) {
        piece.runs = runs_of(planes + piece.first_plane, piece.planes, shape.chunk_tokens);
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

// Enqueues chunks until `expires`; `begun` counts them.
int enqueue(kvs_pipe& pipe, kvs_ticket& ticket, const kvs_chunk* chunks, int64_t count, void* after,
            double expires, bool load, int64_t* begun) {
    KVS_TRY(cudaSetDevice(pipe.shape.device));
    const std::lock_guard<std::mutex> lock(pipe.turn);
    if (after != nullptr) KVS_TRY(cudaStreamWaitEvent(pipe.kernels, static_cast<cudaEvent_t>(after), 0));
    int error = 0;
    for (*begun = 0; error == 0 && *begun < count && now_s() <= expires; ++*begun) {
        int64_t* flag = ticket.flags + ticket.used++;
        for (size_t i = 0; error == 0 && i < pipe.pieces.size(); ++i) {
            error = load ? load_piece(pipe, pipe.pieces[i], chunks[*begun], flag)
                         : save_piece(pipe, pipe.pieces[i], chunks[*begun], flag);
        }
    }
    const cudaError_t marked = cudaEventRecord(ticket.end, load ? pipe.kernels : pipe.copies);
    return error != 0 ? error : static_cast<int>(marked);
}

int make_ticket(kvs_ticket* ticket) {
    KVS_TRY(cudaEventCreateWithFlags(&ticket->end, cudaEventDisableTiming | cudaEventBlockingSync));
    KVS_TRY(cudaHostAlloc(reinterpret_cast<void**>(&ticket->flags), KVS_CHUNKS_MAX * sizeof(int64_t),
                          cudaHostAllocPortable));
    return 0;
}

void end_ticket(kvs_ticket* ticket) {
    if (ticket->end != nullptr) cudaEventDestroy(ticket->end);
    cudaFreeHost(ticket->flags);
    delete ticket;
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
    for (kvs_ticket* ticket : pipe->tickets) end_ticket(ticket);
    cudaFree(pipe->planes);
    cudaFree(pipe->first_of);
    if (pipe->copies != nullptr) cudaStreamDestroy(pipe->copies);
    if (pipe->kernels != nullptr) cudaStreamDestroy(pipe->kernels);
    delete pipe;
}

int kvs_pipe_begin(kvs_pipe* pipe, kvs_ticket** ticket) noexcept {
    KVS_TRY(cudaSetDevice(pipe->shape.device));
    const std::lock_guard<std::mutex> lock(pipe->drawer);
    if (pipe->tickets.empty()) {
        *ticket = new kvs_ticket;
        if (const int error = make_ticket(*ticket)) {
            end_ticket(*ticket);
            return error;
        }
    } else {
        *ticket = pipe->tickets.back();
        pipe->tickets.pop_back();
    }
    (*ticket)->used = 0;
    std::fill_n((*ticket)->flags, KVS_CHUNKS_MAX, KVS_ALL_GOOD);
    return 0;
}

int kvs_pipe_load(kvs_pipe* pipe, kvs_ticket* ticket, const kvs_chunk* chunks, int64_t count, void* after,
                  double expires, int64_t* begun) noexcept {
    return enqueue(*pipe, *ticket, chunks, count, after, expires, true, begun);
}

int kvs_pipe_save(kvs_pipe* pipe, kvs_ticket* ticket, const kvs_chunk* chunks, int64_t count,
                  void* after) noexcept {
    int64_t begun;
    return enqueue(*pipe, *ticket, chunks, count, after, std::numeric_limits<double>::infinity(), false, &begun);
}

int kvs_pipe_end(kvs_pipe* pipe, kvs_ticket* ticket, int64_t* flags) noexcept {
    const cudaError_t ended = cudaEventSynchronize(ticket->end);
    std::copy_n(ticket->flags, ticket->used, flags);
    const std::lock_guard<std::mutex> lock(pipe->drawer);
    pipe->tickets.push_back(ticket);
    return static_cast<int>(ended);
}

int kvs_cuda_register(int device, void* memory, int64_t nbytes) noexcept {
    KVS_TRY(cudaSetDevice(device));
    return static_cast<int>(cudaHostRegister(memory, static_cast<size_t>(nbytes), cudaHostRegisterPortable));
}

int kvs_cuda_unregister(int device, void* memory) noexcept {
    KVS_TRY(cudaSetDevice(device));
    return static_cast<int>(cudaHostUnregister(memory));
}
