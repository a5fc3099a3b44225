// The shared memory of a thread block that packs one sub-block: what lies where, in bytes.
#ifndef KVSTRATA_PACKING_ROOM_H
#define KVSTRATA_PACKING_ROOM_H

#include "pack.h"

namespace kvs {

constexpr int64_t WARPS = 16;  // of a thread block

struct PackingRoom {
    int64_t tokens;
    int64_t dim;

    // One int a channel; the escapes as they are found, and in order.
    KVS_INLINE int64_t bases() const { return 0; }
    KVS_INLINE int64_t escapes() const { return 4 * dim; }
    KVS_INLINE int64_t in_order() const { return escapes() + 4 * shape().escape_words(); }
    KVS_INLINE int64_t least() const { return (in_order() + 4 * shape().escape_words() + 15) / 16 * 16; }

    // The fast way also keeps each thread's largest exponents, each token's address and all elements.
    KVS_INLINE int64_t largest() const { return least(); }
    KVS_INLINE int64_t rows() const { return largest() + 16 * 32 * WARPS; }
    KVS_INLINE int64_t elements() const { return (rows() + 8 * tokens + 15) / 16 * 16; }
    KVS_INLINE int64_t fast() const { return elements() + 2 * tokens * dim; }

    KVS_INLINE Packed shape() const { return {tokens * dim, dim}; }
};

}  // namespace kvs

#endif
