// The pipe: chunks between pinned host memory and engine blocks, through slabs of staging memory.
//
// Rule of this file: everything is enqueued; a caller waits for a slab, and at last for its own end.
// Kernels go on one stream and copies on two others, so that a slab is filled while another is worked on.
// Two, which take turns: between the pieces of one stream the engine's own small copies would wait.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "copy_kernels.cuh"
#include "kvstrata.h"
#include "pieces.h"

namespace {

using kvs::Piece;
using kvs::Run;

// A chunk as one codec stores it.
struct Plan {
    std::vector<Piece> pieces;
    std::vector<uint8_t> before_key, after_key;
    int64_t at_once = 1;  // chunks that move together
    kvs_plane* planes = nullptr;  // in device memory, as the next
    kvs::Member* members = nullptr;
};

struct Slab {
    uint8_t* data = nullptr;
    cudaStream_t copies = nullptr;  // one of the pipe's, for now
    cudaEvent_t filled = nullptr;
    cudaEvent_t free = nullptr;
};

// A kernel that is launched as a graph of one node, with other arguments each time. Once some ten kernels were
// launched in the ordinary way on a stream of its own, all that an engine computes takes 3 % longer for good
// (CUDA 13 on H100 and H200; docs/gpu.md); launched as graphs they cost it nothing.
struct Launcher {
    cudaGraph_t graph = nullptr;
    cudaGraphNode_t node = nullptr;
    cudaGraphExec_t ready = nullptr;
    cudaKernelNodeParams call = {};
};

constexpr int SHARED_OF_KERNELS = 1024;  // more than their own variables need
constexpr int64_t SLABS = 6, SLABS_MIN = 3;
constexpr size_t COPY_STREAMS = 2;
constexpr int64_t BYTES_OF_LAUNCH = 5 << 20;  // less cannot be launched as fast as the link takes it

}  // namespace

// What one job waits for: the ends of what it has enqueued, and a flag for each chunk that kernels write to.
struct kvs_ticket {
    std::array<cudaEvent_t, COPY_STREAMS> ends = {};
    int64_t* flags = nullptr;  // in host memory
    int64_t used = 0;
};

struct kvs_pipe {
    kvs_pipe_shape shape;
    std::vector<Plan> plans;
    std::vector<Slab> slabs;
    std::vector<kvs_ticket*> tickets;  // not in use
    std::array<cudaStream_t, COPY_STREAMS> copies = {};
    cudaStream_t kernels = nullptr;
    Launcher gather, scatter;
    cudaEvent_t read = nullptr;  // all saves enqueued so far have read their blocks
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

// Bytes of shared memory for a thread block: as many as the fast way needs, if there are so many.
int32_t room_for(const kvs_pipe& pipe, const Piece& piece, bool load) {
    const int64_t rows = 8 * int64_t{pipe.shape.chunk_tokens};
    const int64_t fast = load ? (piece.stored_bytes + 15) / 16 * 16 + rows : piece.packing_fast;
    return static_cast<int32_t>(fast <= pipe.shared_max ? fast : load ? 0 : piece.packing_least);
}

// Some consecutive chunks of one plan that move together.
struct Batch {
    const kvs_chunks& all;
    const Plan& plan;
    int64_t first, count;
    int64_t* flags;

    uint8_t* slot(int64_t i) const { return all.slots[first + i]; }
    const uint8_t* key(int64_t i) const { return all.keys + (first + i) * KVS_KEY_BYTES; }
};

// Whether the slot begins with the header of this chunk.
bool begins_right(const Batch& batch, int64_t i) {
    const auto& before = batch.plan.before_key;
    const auto& after = batch.plan.after_key;
    const uint8_t* at = batch.slot(i);
    return std::memcmp(at, before.data(), before.size()) == 0 &&
           std::memcmp(at + before.size(), batch.key(i), KVS_KEY_BYTES) == 0 &&
           std::memcmp(at + before.size() + KVS_KEY_BYTES, after.data(), after.size()) == 0;
}

int64_t stride_of(const Piece& piece) { return (piece.end() - piece.offset() + 15) / 16 * 16; }

Job job_of(const kvs_pipe& pipe, const Piece& piece, const Slab& slab, const Batch& batch, bool load) {
    const int64_t blocks = pipe.shape.chunk_tokens / pipe.shape.block_tokens;
    Job job = {};
    job.planes = batch.plan.planes + piece.first_plane;
    job.members = batch.plan.members + piece.first_sub_block;
    job.sub_blocks = static_cast<int32_t>(piece.sub_blocks);
    job.block_tokens = pipe.shape.block_tokens;
    job.chunk_tokens = pipe.shape.chunk_tokens;
    job.data = slab.data;
    job.stride = stride_of(piece);
    job.slot_offset = piece.offset();
    job.room = room_for(pipe, piece, load);
    for (int64_t i = 0; i < batch.count; ++i) {
        job.chunks[i].checksums = reinterpret_cast<uint64_t*>(batch.slot(i) + pipe.shape.checksum_offset);
        job.chunks[i].flag = batch.flags + i;
        std::memcpy(&job.chunks[i].seed, batch.key(i), sizeof(uint64_t));
    }
    std::copy_n(batch.all.block_ids + batch.first * blocks, batch.count * blocks, job.block_ids);
    return job;
}

// The next slab, once nobody needs its bytes: what is under way and cannot be recalled stays bounded.
// With `ahead` it is the device that waits, and everything is enqueued at once.
int take_slab(kvs_pipe& pipe, bool ahead, Slab** slab) {
    const size_t turn = pipe.next_slab++;
    *slab = &pipe.slabs[turn % pipe.slabs.size()];
    (*slab)->copies = pipe.copies[turn % COPY_STREAMS];
    KVS_TRY(ahead ? cudaStreamWaitEvent((*slab)->copies, (*slab)->free, 0) : cudaEventSynchronize((*slab)->free));
    return 0;
}

// Slots that lie at equal distances are copied in one go: each copy costs the link some microseconds.
// It fails if they are not in one registered piece of memory.
bool copy_rows(const Piece& piece, const Slab& slab, const Batch& batch, bool load) {
    const int64_t pitch = batch.count > 1 && piece.runs.size() == 1 ? batch.slot(1) - batch.slot(0) : 0;
    bool even = pitch > 0;
    for (int64_t i = 2; even && i < batch.count; ++i) even = batch.slot(i) - batch.slot(i - 1) == pitch;
    if (!even) return false;
    const Run& run = piece.runs.front();
    uint8_t* stored = batch.slot(0) + run.offset;
    const cudaError_t error = cudaMemcpy2DAsync(
        load ? slab.data : stored, load ? stride_of(piece) : pitch, load ? stored : slab.data,
        load ? pitch : stride_of(piece), run.nbytes, batch.count,
        load ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, slab.copies);
    if (error != cudaSuccess) cudaGetLastError();  // it is not the next call's
    return error == cudaSuccess;
}

// One copy, in two where it would cross from one registered piece of memory into the next.
int copy_bytes(const Slab& slab, uint8_t* staged, uint8_t* stored, int64_t nbytes, bool load) {
    constexpr uintptr_t PIECE = KVS_REGISTERED_AT_ONCE;
    while (nbytes > 0) {
        const auto left = static_cast<int64_t>(PIECE - reinterpret_cast<uintptr_t>(stored) % PIECE);
        const int64_t now = std::min(nbytes, left);
        KVS_TRY(cudaMemcpyAsync(load ? staged : stored, load ? stored : staged, now,
                                load ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost, slab.copies));
        staged += now, stored += now, nbytes -= now;
    }
    return 0;
}

int copy_runs(const Piece& piece, const Slab& slab, const Batch& batch, bool load) {
    if (copy_rows(piece, slab, batch, load)) return 0;
    for (int64_t i = 0; i < batch.count; ++i) {
        for (const Run& run : piece.runs) {
            uint8_t* staged = slab.data + i * stride_of(piece) + (run.offset - piece.offset());
            const int error = copy_bytes(slab, staged, batch.slot(i) + run.offset, run.nbytes, load);
            if (error != 0) return error;
        }
    }
    return 0;
}

// Some sub-blocks at a time, one launch after the other: so a good part of the device's multiprocessors
// is the engine's at any time, and a link that takes ten times as long as the kernels is kept busy all the same.
int launch(Launcher& kernel, const kvs_pipe& pipe, const Piece& piece, int64_t chunks, Job& job) {
    const auto all = static_cast<int32_t>(piece.sub_blocks * chunks);
    const auto most = static_cast<int32_t>(std::max<int64_t>(1, BYTES_OF_LAUNCH / piece.stored_bytes));
    void* arguments[] = {&job};
    kernel.call.kernelParams = arguments;  // read at once, what was launched before keeps its own
    kernel.call.sharedMemBytes = static_cast<unsigned>(job.room);
    for (job.first = 0; job.first < all; job.first += most) {
        kernel.call.gridDim.x = static_cast<unsigned>(std::min(most, all - job.first));
        KVS_TRY(cudaGraphExecKernelNodeSetParams(kernel.ready, kernel.node, &kernel.call));
        KVS_TRY(cudaGraphLaunch(kernel.ready, pipe.kernels));
    }
    return 0;
}

int make_launcher(const void* kernel, int shared_max, Launcher* made) {
    KVS_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_max));
    Job none = {};
    void* arguments[] = {&none};
    made->call.func = const_cast<void*>(kernel);
    made->call.gridDim = dim3(1);
    made->call.blockDim = dim3(THREADS);
    made->call.kernelParams = arguments;
    KVS_TRY(cudaGraphCreate(&made->graph, 0));
    KVS_TRY(cudaGraphAddKernelNode(&made->node, made->graph, nullptr, 0, &made->call));
    return static_cast<int>(cudaGraphInstantiate(&made->ready, made->graph, 0));
}

void end_launcher(const Launcher& kernel) {
    if (kernel.ready != nullptr) cudaGraphExecDestroy(kernel.ready);
    if (kernel.graph != nullptr) cudaGraphDestroy(kernel.graph);
}

int load_piece(kvs_pipe& pipe, const Piece& piece, const Batch& batch, bool ahead) {
    Slab* slab;
    if (const int error = take_slab(pipe, ahead, &slab)) return error;
    if (const int error = copy_runs(piece, *slab, batch, true)) return error;
    KVS_TRY(cudaEventRecord(slab->filled, slab->copies));
    KVS_TRY(cudaStreamWaitEvent(pipe.kernels, slab->filled, 0));
    Job job = job_of(pipe, piece, *slab, batch, true);
    if (const int error = launch(pipe.scatter, pipe, piece, batch.count, job)) return error;
    KVS_TRY(cudaEventRecord(slab->free, pipe.kernels));
    return 0;
}

int save_piece(kvs_pipe& pipe, const Piece& piece, const Batch& batch) {
    Slab* slab;
    if (const int error = take_slab(pipe, false, &slab)) return error;
    Job job = job_of(pipe, piece, *slab, batch, false);
    if (const int error = launch(pipe.gather, pipe, piece, batch.count, job)) return error;
    KVS_TRY(cudaEventRecord(slab->filled, pipe.kernels));
    KVS_TRY(cudaStreamWaitEvent(slab->copies, slab->filled, 0));
    if (const int error = copy_runs(piece, *slab, batch, false)) return error;
    KVS_TRY(cudaEventRecord(slab->free, slab->copies));
    return 0;
}

// As many chunks from `first` on as may move together: all stored in the same way.
Batch next_batch(const kvs_pipe& pipe, const kvs_chunks& chunks, int64_t first, int64_t* flags) {
    const Plan& plan = pipe.plans[chunks.plans[first]];
    int64_t count = 1;
    while (count < plan.at_once && first + count < chunks.count &&
           chunks.plans[first + count] == chunks.plans[first]) {
        ++count;
    }
    return {chunks, plan, first, count, flags};
}

// Enqueues chunks until `expires`; `begun` counts them.
int enqueue(kvs_pipe& pipe, kvs_ticket& ticket, const kvs_chunks& chunks, void* after, double expires,
            bool load, bool ahead, int64_t* begun) {
    *begun = 0;
    KVS_TRY(cudaSetDevice(pipe.shape.device));
    const std::lock_guard<std::mutex> lock(pipe.turn);
    if (after != nullptr) KVS_TRY(cudaStreamWaitEvent(pipe.kernels, static_cast<cudaEvent_t>(after), 0));
    int error = 0;
    bool other = false;
    while (error == 0 && !other && *begun < chunks.count && now_s() <= expires) {
        Batch batch = next_batch(pipe, chunks, *begun, ticket.flags + ticket.used);
        for (int64_t i = 0; load && !other && i < batch.count; ++i) {
            if (begins_right(batch, i)) continue;
            other = true;
            batch.count = i;
        }
        ticket.used += batch.count;
        *begun += batch.count;
        for (const Piece& piece : batch.plan.pieces) {
            if (error != 0 || batch.count == 0) break;
            error = load ? load_piece(pipe, piece, batch, ahead) : save_piece(pipe, piece, batch);
        }
    }
    if (error != 0) cudaStreamSynchronize(pipe.kernels);  // the events below may not cover what it has begun
    for (size_t i = 0; i < COPY_STREAMS; ++i) {
        const cudaError_t marked = cudaEventRecord(ticket.ends[i], load ? pipe.kernels : pipe.copies[i]);
        if (error == 0) error = static_cast<int>(marked);
    }
    return error == 0 && other ? KVS_OTHER_CHUNK : error;
}

int make_ticket(kvs_ticket* ticket) {
    for (cudaEvent_t& end : ticket->ends) {
        KVS_TRY(cudaEventCreateWithFlags(&end, cudaEventDisableTiming | cudaEventBlockingSync));
    }
    KVS_TRY(cudaHostAlloc(reinterpret_cast<void**>(&ticket->flags), KVS_CHUNKS_MAX * sizeof(int64_t),
                          cudaHostAllocPortable));
    return 0;
}

void end_ticket(kvs_ticket* ticket) {
    for (cudaEvent_t end : ticket->ends) {
        if (end != nullptr) cudaEventDestroy(end);
    }
    cudaFreeHost(ticket->flags);
    delete ticket;
}

int make_plan(const kvs_pipe_shape& shape, const kvs_plan& given, Plan* plan) {
    plan->pieces = kvs::cut_evenly(given.planes, given.n_planes, shape.chunk_tokens, shape.staging_bytes / SLABS);
    const std::vector<kvs::Member> members = kvs::members_of(plan->pieces, given.planes);
    plan->before_key.assign(given.before_key, given.before_key + given.before_bytes);
    plan->after_key.assign(given.after_key, given.after_key + given.after_bytes);
    if (plan->pieces.size() == 1) {
        const int64_t of_slab = shape.staging_bytes / SLABS / stride_of(plan->pieces.front());
        const int64_t of_ids = KVS_BLOCKS_MAX / (shape.chunk_tokens / shape.block_tokens);
        plan->at_once = std::max<int64_t>(1, std::min<int64_t>({of_slab, of_ids, CHUNKS_AT_ONCE}));
    }
    const size_t planes = static_cast<size_t>(given.n_planes) * sizeof(kvs_plane);
    const size_t of_members = members.size() * sizeof(kvs::Member);
    KVS_TRY(cudaMalloc(reinterpret_cast<void**>(&plan->planes), planes));
    KVS_TRY(cudaMemcpy(plan->planes, given.planes, planes, cudaMemcpyHostToDevice));
    KVS_TRY(cudaMalloc(reinterpret_cast<void**>(&plan->members), of_members));
    KVS_TRY(cudaMemcpy(plan->members, members.data(), of_members, cudaMemcpyHostToDevice));
    return 0;
}

int open_pipe(kvs_pipe& pipe, const kvs_plan* plans, int64_t n_plans) {
    KVS_TRY(cudaSetDevice(pipe.shape.device));
    pipe.plans.resize(static_cast<size_t>(n_plans));
    for (int64_t i = 0; i < n_plans; ++i) {
        if (const int error = make_plan(pipe.shape, plans[i], &pipe.plans[static_cast<size_t>(i)])) return error;
    }
    KVS_TRY(cudaEventCreateWithFlags(&pipe.read, cudaEventDisableTiming));
    for (cudaStream_t& stream : pipe.copies) {
        KVS_TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    }
    KVS_TRY(cudaStreamCreateWithFlags(&pipe.kernels, cudaStreamNonBlocking));
    KVS_TRY(cudaDeviceGetAttribute(&pipe.shared_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, pipe.shape.device));
    pipe.shared_max -= SHARED_OF_KERNELS;
    for (auto [kernel, launcher] : {std::pair{reinterpret_cast<const void*>(gather_kernel), &pipe.gather},
                                    std::pair{reinterpret_cast<const void*>(scatter_kernel), &pipe.scatter}}) {
        if (const int error = make_launcher(kernel, pipe.shared_max, launcher)) return error;
    }
    int64_t largest = 16;  // a rank may have nothing to save
    for (const Plan& plan : pipe.plans) {
        for (const Piece& piece : plan.pieces) largest = std::max(largest, plan.at_once * stride_of(piece));
    }
    pipe.slabs.resize(static_cast<size_t>(std::clamp(pipe.shape.staging_bytes / largest, SLABS_MIN, SLABS)));
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
    for (cudaStream_t stream : pipe->copies) {
        if (stream != nullptr) cudaStreamSynchronize(stream);
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
        cudaFree(plan.members);
    }
    end_launcher(pipe->gather);
    end_launcher(pipe->scatter);
    if (pipe->read != nullptr) cudaEventDestroy(pipe->read);
    for (cudaStream_t stream : pipe->copies) {
        if (stream != nullptr) cudaStreamDestroy(stream);
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

int kvs_pipe_load(kvs_pipe* pipe, kvs_ticket* ticket, const kvs_chunks* chunks, void* after, double expires,
                  int32_t ahead, int64_t* begun) noexcept {
    return enqueue(*pipe, *ticket, *chunks, after, expires, true, ahead != 0, begun);
}

int kvs_pipe_save(kvs_pipe* pipe, kvs_ticket* ticket, const kvs_chunks* chunks, void* after) noexcept {
    int64_t begun;
    return enqueue(*pipe, *ticket, *chunks, after, std::numeric_limits<double>::infinity(), false, false, &begun);
}

int kvs_pipe_hold(kvs_pipe* pipe, void* stream) noexcept {
    KVS_TRY(cudaSetDevice(pipe->shape.device));
    // Not in turn: another call may be waiting for slabs. What was enqueued before is covered all the same.
    KVS_TRY(cudaEventRecord(pipe->read, pipe->kernels));
    return static_cast<int>(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), pipe->read, 0));
}

int kvs_pipe_follow(kvs_pipe* pipe, kvs_ticket* ticket, void* stream) noexcept {
    KVS_TRY(cudaSetDevice(pipe->shape.device));
    for (cudaEvent_t end : ticket->ends) {
        KVS_TRY(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), end, 0));
    }
    return 0;
}

int kvs_pipe_end(kvs_pipe* pipe, kvs_ticket* ticket, int64_t* flags) noexcept {
    cudaError_t ended = cudaSuccess;
    for (cudaEvent_t end : ticket->ends) {
        const cudaError_t error = cudaEventSynchronize(end);
        if (ended == cudaSuccess) ended = error;
    }
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
