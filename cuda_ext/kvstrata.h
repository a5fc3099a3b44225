/* The C ABI of the copy layer: engine blocks <-> canonical chunks, and checksums.
 *
 * Rules: raw pointers and fixed-size types only; no state, no allocation, no error text. Arguments are
 * trusted: the typed face (native.py) checks them. Every function may run in many threads at once, as
 * long as no two write the same bytes. Any change of a struct or a signature bumps KVS_ABI_VERSION.
 */
#ifndef KVSTRATA_H
#define KVSTRATA_H

#include <stdint.h>

#define KVS_ABI_VERSION 2
#define KVS_ALL_GOOD (-1)
#define KVS_NO_BLOCK (-1)

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
 * the slot is written. */
KVS_API void kvs_gather(const kvs_plane* planes, int64_t n_planes, const int64_t* block_ids,
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

#ifdef __cplusplus
}
#endif

#endif
