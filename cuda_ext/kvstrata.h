/* The C ABI of the copy layer: engine blocks <-> canonical chunks, and checksums.
 *
 * Rules: raw pointers and fixed-size types only; no error text; on a CPU no state, and no memory but one
 * unpacked sub-block a call. Arguments are trusted: the typed faces (native.py, device.py) check them.
 * Every function may run in many threads at once, as long as no two write the same bytes. Any change of a struct or a signature bumps KVS_ABI_VERSION.
 */
#ifndef KVSTRATA_H
#define KVSTRATA_H

#include <stdint.h>

#define KVS_ABI_VERSION 5
#define KVS_ALL_GOOD (-1)
#define KVS_NO_BLOCK (-1)
#define KVS_NO_MEMORY (-2) /* instead of an index: there was none for one unpacked sub-block */
#define KVS_CHUNKS_MAX 1024 /* a job */
#define KVS_KEY_BYTES 32
#define KVS_REGISTERED_AT_ONCE (64 << 20) /* memory is registered in pieces that end at its multiples */
#define KVS_OTHER_CHUNK (-1) /* instead of an error: a slot does not begin as its chunk should */
#define KVS_BLOCKS_MAX 256 /* engine blocks a chunk, on a GPU: they travel as a kernel's argument */
#define KVS_RAW 0
#define KVS_PACKED 1 /* pack.h; 2-byte items only */

#define KVS_API __attribute__((visibility("default")))

#ifdef __cplusplus
#define KVS_NOEXCEPT noexcept
extern "C" {
#else
#define KVS_NOEXCEPT
#endif

/* One (layer, plane) of an engine's cache, and where its sub-blocks lie in a slot.
 *
 * An element's address is base + block * stride_block + head * stride_head + token * stride_token
 * + dim * stride_dim, where `head` counts the heads held here and `token` those of one block. Where an
 * engine packs a block in a way that no strides describe, `table` replaces the last two terms:
 * table[token * dim + d] is the element's offset, in elements, inside its (block, head) region.
 *
 * `slot_*` and `checksum_*` are those of the model's head 0; local head h is model head first_head + h.
 * On a GPU, `slot_offset` and `slot_stride` are multiples of 16.
 */
typedef struct kvs_plane {
    uint8_t* base;
    int64_t stride_block; /* bytes, as all strides; they may be negative */
    int64_t stride_head;
    int64_t stride_token;
    int64_t stride_dim;
    const int32_t* table; /* NULL: the strides hold */
    int32_t heads;
    int32_t first_head;
    int32_t dim;
    int32_t item_bytes; /* 1, 2 or 4 */
    int32_t codec;      /* KVS_RAW or KVS_PACKED, how its sub-blocks are stored */
    int32_t reserved;
    int64_t slot_offset;
    int64_t slot_stride;
    int64_t checksum_index; /* entries of the slot's checksum table */
    int64_t checksum_stride;
} kvs_plane;

/* One sub-block of a slot: `nbytes` bytes at `offset`, whose checksum is entry `index` of the table. */
typedef struct kvs_sub_block {
    int64_t offset;
    int64_t nbytes;
    int64_t index;
} kvs_sub_block;

KVS_API int kvs_abi_version(void) KVS_NOEXCEPT;

/* The checksum of docs/format.md over `nbytes` bytes; never 0. */
KVS_API uint64_t kvs_checksum(const uint8_t* data, int64_t nbytes, uint64_t seed) KVS_NOEXCEPT;

/* Copies the chunk that lies in `block_ids` (chunk_tokens / block_tokens of them) into the slot and
 * writes each sub-block's checksum into the 64-bit table at `checksum_table_offset`. Nothing else of
 * the slot is written.
 * Returns KVS_ALL_GOOD, or the index of the first sub-block that does not fit when packed: the slot
 * then holds no chunk. */
KVS_API int64_t kvs_gather(const kvs_plane* planes, int64_t n_planes, const int64_t* block_ids,
                        int64_t block_tokens, int64_t chunk_tokens, uint8_t* slot,
                        int64_t checksum_table_offset, uint64_t seed) KVS_NOEXCEPT;

/* The way back. Each sub-block is verified as a whole, then written to the engine's blocks, except
 * where the block id is KVS_NO_BLOCK.
 * Returns KVS_ALL_GOOD, or the checksum-table index of the first sub-block that did not match: nothing
 * of it or of later ones was written, earlier ones were. */
KVS_API int64_t kvs_scatter(const kvs_plane* planes, int64_t n_planes, const int64_t* block_ids,
                            int64_t block_tokens, int64_t chunk_tokens, const uint8_t* slot,
                            int64_t checksum_table_offset, uint64_t seed) KVS_NOEXCEPT;

/* Checks sub-blocks without an engine; returns as kvs_scatter does. */
KVS_API int64_t kvs_verify(const uint8_t* slot, const kvs_sub_block* sub_blocks, int64_t count,
                           int64_t checksum_table_offset, uint64_t seed) KVS_NOEXCEPT;

/* --- the GPU library, which has state: a pipe owns staging memory, streams and events ------------- */

typedef struct kvs_pipe kvs_pipe;
typedef struct kvs_ticket kvs_ticket;

typedef struct kvs_pipe_shape {
    int64_t staging_bytes; /* of the device's memory, in six slabs; three of one layer at the least */
    int32_t device;
    int32_t chunk_tokens;
    int32_t block_tokens;
    int32_t reserved;
    int64_t checksum_offset;
} kvs_pipe_shape;

/* One way to store a chunk: the planes that this rank copies, in slot order, and what comes before and after
 * the key at the beginning of a slot. */
typedef struct kvs_plan {
    const kvs_plane* planes;
    int64_t n_planes;
    const uint8_t* before_key;
    int64_t before_bytes;
    const uint8_t* after_key;
    int64_t after_bytes;
} kvs_plan;

/* Chunks. Of each: a slot in memory that kvs_cuda_register knows; its key; chunk_tokens / block_tokens block
 * ids; and which of the pipe's plans says how it is stored. */
typedef struct kvs_chunks {
    int64_t count;
    uint8_t* const* slots;
    const uint8_t* keys;
    const int32_t* block_ids;
    const uint8_t* plans;
} kvs_chunks;

/* All of these return 0 or a CUDA error; kvs_cuda_error puts it in words. */
KVS_API int kvs_cuda_abi_version(void) KVS_NOEXCEPT;
KVS_API const char* kvs_cuda_error(int error) KVS_NOEXCEPT;
KVS_API int kvs_cuda_register(int device, void* memory, int64_t nbytes) KVS_NOEXCEPT;
KVS_API int kvs_cuda_unregister(int device, void* memory) KVS_NOEXCEPT;

KVS_API int kvs_pipe_open(const kvs_pipe_shape* shape, const kvs_plan* plans, int64_t n_plans,
                          kvs_pipe** pipe) KVS_NOEXCEPT;
KVS_API void kvs_pipe_close(kvs_pipe* pipe) KVS_NOEXCEPT;

/* A job: begin, any number of calls that enqueue (KVS_CHUNKS_MAX chunks in all), end. Every job that has
 * begun must end, whatever failed in between; each is one thread's own. */
KVS_API int kvs_pipe_begin(kvs_pipe* pipe, kvs_ticket** ticket) KVS_NOEXCEPT;

/* Enqueues slots -> blocks, behind the event `after` (or NULL); waits only for staging memory, and with `ahead`
 * not for that either: the device does. No chunk is begun past `expires` (monotonic seconds), none from the
 * first on whose slot begins otherwise than it should (KVS_OTHER_CHUNK); `begun` says how many were. */
KVS_API int kvs_pipe_load(kvs_pipe* pipe, kvs_ticket* ticket, const kvs_chunks* chunks, void* after,
                          double expires, int32_t ahead, int64_t* begun) KVS_NOEXCEPT;

/* Enqueues blocks -> slots; as above. */
KVS_API int kvs_pipe_save(kvs_pipe* pipe, kvs_ticket* ticket, const kvs_chunks* chunks,
                          void* after) KVS_NOEXCEPT;

/* Makes `stream` wait until all saves enqueued so far have read their blocks; returns at once. One thread's. */
KVS_API int kvs_pipe_hold(kvs_pipe* pipe, void* stream) KVS_NOEXCEPT;

/* Makes `stream` wait for what the job has enqueued; returns at once. Any thread's, also when the job has ended:
 * it may then wait for another one that came after it. */
KVS_API int kvs_pipe_follow(kvs_pipe* pipe, kvs_ticket* ticket, void* stream) KVS_NOEXCEPT;

/* Waits for all that the job has enqueued. flags[i], for the i-th chunk begun, is KVS_ALL_GOOD or the
 * index of a sub-block: of a load, one that did not match (nothing of it was written, others of its chunk
 * were); of a save, one that does not fit when packed (the slot then holds no chunk). */
KVS_API int kvs_pipe_end(kvs_pipe* pipe, kvs_ticket* ticket, int64_t* flags) KVS_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif
