// The pipe: chunks between pinned host memory and engine blocks, through slabs of staging memory.
//
// Rule of this file: everything is enqueued; a caller waits for a slab, and at last for its own end.
// Kernels go on one stream. Copies take turns on two others: after each, an event makes the copy engine
// wait until its bytes have arrived, and meanwhile the other stream's copy uses the link.
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
    int64_t stored_bytes = 0, tables_bytes = 0;  // of the largest sub-block
    std::vector<Run> runs;

    int64_t offset() const { return runs.front().offset; }
    int64_t end() const { return runs.back().offset + runs.back().nbytes; }
};

// A chunk as one codec stores it.
struct Plan {
    std::vector<Piece> pieces;
    kvs_plane* planes = nullptr;  // in device memory, as the next
    int32_t* first_of = nullptr;
};

struct Slab {
    uint8_t* data = nullptr;
    cudaEvent_t filled = nullptr;
    cudaEvent_t free = nullptr;
};

constexpr int SHARED_OF_KERNELS = 1024;  // more than their own variables need
constexpr int64_t PIECES = 8;  // that fit in staging memory; small ones stay in the GPU's cache
constexpr int64_t SLABS_MIN = 3, SLABS_MAX = 32;
constexpr int COPY_STREAMS = 2;

}  // namespace

// What one job waits for: the end of what it has enqueued, and a flag for each chunk that kernels write to.
struct kvs_ticket {
    cudaEvent_t end = nullptr;
    int64_t* flags = nullptr;  // in host memory
    int64_t used = 0;
};

struct kvs_pipe {
    kvs_pipe_shape shape;
    std::vector<Plan> plans;
    std::vector<Slab> slabs;
    std::vector<kvs_ticket*> tickets;  // not in use
    cudaStream_t copies[COPY_STREAMS] = {}, kernels = nullptr;
    cudaEvent_t read = nullptr;  // all saves enqueued so far have read their blocks
    cudaEvent_t other = nullptr;  // the second stream of copies
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
        if (pieces.empty() || (from >= end && to - begin > shape.staging_bytes / PIECES)) {
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
int32_t room_for(const kvs_pipe& pipe, int64_t nbytes) {
    const int64_t room = (nbytes + 15) / 16 * 16;
    return room <= pipe.shared_max ? static_cast<int32_t>(room) : 0;
}

Job job_of(const kvs_pipe& pipe, const Piece& piece, const Slab& slab, const kvs_chunk& chunk, int64_t* flag) {
    const Plan& plan = pipe.plans[static_cast<size_t>(chunk.plan)];
    Job job = {};
    job.planes = plan.planes + piece.first_plane;
    job.first_of = plan.first_of + piece.first_plane;
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
int take_slab(kvs_pipe& pipe, Slab** slab, cudaStream_t* copies) {
    *copies = pipe.copies[pipe.next_slab % COPY_STREAMS];
    *slab = &pipe.slabs[pipe.next_slab++ % pipe.slabs.size()];
    KVS_TRY(cudaEventSynchronize((*slab)->free));
    return 0;
}

int load_piece(kvs_pipe& pipe, const Piece& piece, const kvs_chunk& chunk, int64_t* flag) {
    Slab* slab;
    cudaStream_t copies;
    if (const int error = take_slab(pipe, &slab, &copies)) return error;
    for (const Run& run : piece.runs) {
        KVS_TRY(cudaMemcpyAsync(slab->data + (run.offset - piece.offset()), chunk.slot + run.offset,
                                run.nbytes, cudaMemcpyHostToDevice, copies));
    }
    KVS_TRY(cudaEventRecord(slab->filled, copies));
    KVS_TRY(cudaStreamWaitEvent(pipe.kernels, slab->filled, 0));
    Job job = job_of(pipe, piece, *slab, chunk, flag);
    job.room = room_for(pipe, piece.stored_bytes);
    scatter_kernel<<<piece.sub_blocks, THREADS, job.room, pipe.kernels>>>(job);
    KVS_TRY(cudaGetLastError());
    KVS_TRY(cudaEventRecord(slab->free, pipe.kernels));
    return 0;
}

int save_piece(kvs_pipe& pipe, const Piece& piece, const kvs_chunk& chunk, int64_t* flag) {
    Slab* slab;
    cudaStream_t copies;
    if (const int error = take_slab(pipe, &slab, &copies)) return error;
    const Job job = job_of(pipe, piece, *slab, chunk, flag);
    gather_kernel<<<piece.sub_blocks, THREADS, piece.tables_bytes, pipe.kernels>>>(job);
    KVS_TRY(cudaGetLastError());
    KVS_TRY(cudaEventRecord(slab->filled, pipe.kernels));
    KVS_TRY(cudaStreamWaitEvent(copies, slab->filled, 0));
    for (const Run& run : piece.runs) {
        KVS_TRY(cudaMemcpyAsync(chunk.slot + run.offset, slab->data + (run.offset - piece.offset()),
                                run.nbytes, cudaMemcpyDeviceToHost, copies));
    }
    KVS_TRY(cudaEventRecord(slab->free, copies));
    return 0;
}

// The end of all that was enqueued so far.
int mark(kvs_pipe& pipe, cudaEvent_t end, bool load) {
    if (load) return static_cast<int>(cudaEventRecord(end, pipe.kernels));
    KVS_TRY(cudaEventRecord(pipe.other, pipe.copies[1]));
    KVS_TRY(cudaStreamWaitEvent(pipe.copies[0], pipe.other, 0));
    return static_cast<int>(cudaEventRecord(end, pipe.copies[0]));
}

// Enqueues chunks until `expires`; `begun` counts them.
int enqueue(kvs_pipe& pipe, kvs_ticket& ticket, const kvs_chunk* chunks, int64_t count, void* after,
            double expires, bool load, int64_t* begun) {
    KVS_TRY(cudaSetDevice(pipe.shape.device));
    const std::lock_guard<std::mutex> lock(pipe.turn);
    if (after != nullptr) KVS_TRY(cudaStreamWaitEvent(pipe.kernels, static_cast<cudaEvent_t>(after), 0));
    int error = 0;
    for (*begun = 0; error == 0 && *begun < count && now_s() <= expires; ++*begun) {
        const kvs_chunk& chunk = chunks[*begun];
        int64_t* flag = ticket.flags + ticket.used++;
        for (const Piece& piece : pipe.plans[static_cast<size_t>(chunk.plan)].pieces) {
            error = load ? load_piece(pipe, piece, chunk, flag) : save_piece(pipe, piece, chunk, flag);
            if (error != 0) break;
        }
    }
    const int marked = mark(pipe, ticket.end, load);
    return error != 0 ? error : marked;
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

int make_plan(const kvs_pipe_shape& shape, const kvs_plan& given, Plan* plan) {
    std::vector<int32_t> first_of;
    plan->pieces = cut(shape, given.planes, given.n_planes, &first_of);
    const size_t planes = static_cast<size_t>(given.n_planes) * sizeof(kvs_plane);
    const size_t firsts = first_of.size() * sizeof(int32_t);
    KVS_TRY(cudaMalloc(reinterpret_cast<void**>(&plan->planes), planes));
    KVS_TRY(cudaMemcpy(plan->planes, given.planes, planes, cudaMemcpyHostToDevice));
    KVS_TRY(cudaMalloc(reinterpret_cast<void**>(&plan->first_of), firsts));
    KVS_TRY(cudaMemcpy(plan->first_of, first_of.data(), firsts, cudaMemcpyHostToDevice));
    return 0;
}

int open_pipe(kvs_pipe& pipe, const kvs_plan* plans, int64_t n_plans) {
    KVS_TRY(cudaSetDevice(pipe.shape.device));
    pipe.plans.resize(static_cast<size_t>(n_plans));
    for (int64_t i = 0; i < n_plans; ++i) {
        if (const int error = make_plan(pipe.shape, plans[i], &pipe.plans[static_cast<size_t>(i)])) return error;
    }
    for (cudaEvent_t* event : {&pipe.read, &pipe.other}) {
        KVS_TRY(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    }
    for (cudaStream_t& copies : pipe.copies) KVS_TRY(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking));
    KVS_TRY(cudaStreamCreateWithFlags(&pipe.kernels, cudaStreamNonBlocking));
    KVS_TRY(cudaDeviceGetAttribute(&pipe.shared_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, pipe.shape.device));
    pipe.shared_max -= SHARED_OF_KERNELS;
    for (const void* kernel : {reinterpret_cast<const void*>(gather_kernel), reinterpret_cast<const void*>(scatter_kernel)}) {
        KVS_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, pipe.shared_max));
    }
    int64_t largest = 0;
    for (const Plan& plan : pipe.plans) {
        for (const Piece& piece : plan.pieces) largest = std::max(largest, piece.end() - piece.offset());
    }
    const int64_t slabs = std::min(std::max(pipe.shape.staging_bytes / largest, SLABS_MIN), SLABS_MAX);
    pipe.slabs.resize(static_cast<size_t>(slabs));
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

int kvs_pipe_open(const kvs_pipe_shape* shape, const kvs_plan* plans, int64_t n_plans, kvs_pipe** pipe) noexcept {
    *pipe = new kvs_pipe;
    (*pipe)->shape = *shape;
    const int error = open_pipe(**pipe, plans, n_plans);
    if (error != 0) {
        kvs_pipe_close(*pipe);
        *pipe = nullptr;
    }
    return error;
}

void kvs_pipe_close(kvs_pipe* pipe) noexcept {
    cudaSetDevice(pipe->shape.device);
    for (cudaStream_t copies : pipe->copies) {
        if (copies != nullptr) cudaStreamSynchronize(copies);
    }
    if (pipe->kernels != nullptr) cudaStreamSynchronize(pipe->kernels);
    for (const Slab& slab : pipe->slabs) {
        cudaFree(slab.data);
        if (slab.filled != nullptr) cudaEventDestroy(slab.filled);
        if (slab.free != nullptr) cudaEventDestroy(slab.free);
    }
    for (kvs_ticket* ticket : pipe->tickets) end_ticket(ticket);
    for (const Plan& plan : pipe->plans) {
        cudaFree(plan.planes);
        cudaFree(plan.first_of);
    }
    for (cudaEvent_t event : {pipe->read, pipe->other}) {
        if (event != nullptr) cudaEventDestroy(event);
    }
    for (cudaStream_t copies : pipe->copies) {
        if (copies != nullptr) cudaStreamDestroy(copies);
    }
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

int kvs_pipe_hold(kvs_pipe* pipe, void* stream) noexcept {
    KVS_TRY(cudaSetDevice(pipe->shape.device));
    const std::lock_guard<std::mutex> lock(pipe->turn);
    KVS_TRY(cudaEventRecord(pipe->read, pipe->kernels));
    return static_cast<int>(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), pipe->read, 0));
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
