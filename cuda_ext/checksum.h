// The sub-block checksum: 64 bits over any bytes, the same on every device and for every thread order.
//
//     x_i  = w_i ^ (i + 1) * KEY_STEP          w_i: the i-th 8-byte little-endian word, tail zero-padded
//     p_i  = lo32(x_i) * hi32(x_i) + x_i       mod 2^64, as all sums and products here
//     sum  = Σ p_i ^ (p_i >> 32)
//     h    = mix(sum ^ mix(seed ^ nbytes * KEY_STEP)),  or 1 where that is 0
//
// A sub-block's seed is the first 8 bytes of the chunk's key plus the sub-block's index (copy_cpu.cpp).
//
// Why this shape:
// - A sum is commutative: lanes, warps and thread blocks add their shares in any order. The seed
//   enters once, at the end.
// - The key makes a word's term depend on its place, the product makes it non-linear: with a linear
//   term, swapping two words that differ in one bit would cancel half the time.
// - A product alone is blind in one half where the other is 0. With `+ x` it is
//   (hi + 1) * (lo + 2^32) - 2^32, in which neither factor can be 0: a change inside one half of one
//   word always changes the sum.
// - A change of a half's high bits moves only the product's high bits; the shift brings those down, so
//   that flipping one bit plane of many words (signs, a stuck line) leaves no small set of sums.
// - One 32x32->64 multiply a word: pmuludq on x86, umull on Arm, a wide IMAD on a GPU.
// - `mix` is a bijection (splitmix64's finaliser): equal sums under different seeds, or of different
//   lengths, never agree. 0 is kept free, so an entry of a zeroed table matches nothing.
//
// Measured on versions scaled down to 16 and 32 bits: zeroed, shifted, swapped, overwritten and
// sign-flipped words pass as often as with a random function; the weakest case found, exactly two words
// that flip the same bit, passes about 2^31 times as often, which is once in 2^33.
//
// It finds accidents: torn writes, flipped bits, bytes of another chunk. It is no defence against an
// author of collisions.
#ifndef KVSTRATA_CHECKSUM_H
#define KVSTRATA_CHECKSUM_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the byte format is little-endian; this machine would need byte swaps in load_word"
#endif

#if defined(__CUDACC__)
#define KVS_INLINE __host__ __device__ __forceinline__
#else
// Always inlined, so that a caller compiled for several instruction sets vectorises it for each.
#define KVS_INLINE inline __attribute__((always_inline))
#endif

namespace kvs {

constexpr uint64_t KEY_STEP = 0x9E3779B97F4A7C15u;  // odd, near 2^64 / golden ratio: far-apart keys
constexpr size_t WORD_BYTES = 8;

// The term of one word. `key` is (word index + 1) * KEY_STEP.
KVS_INLINE uint64_t term(uint64_t word, uint64_t key) {
    const uint64_t x = word ^ key;
    const uint64_t p = (x & 0xFFFFFFFFu) * (x >> 32) + x;
    return p ^ (p >> 32);
}

KVS_INLINE uint64_t load_word(const uint8_t* bytes, size_t nbytes) {
    uint64_t word = 0;
    memcpy(&word, bytes, nbytes);  // sub-blocks of odd sizes start anywhere
    return word;
}

// The sum over `nbytes` bytes that start at word 0 of the sub-block.
KVS_INLINE uint64_t sum_words(const uint8_t* data, size_t nbytes) {
    const size_t words = nbytes / WORD_BYTES;
    uint64_t sum = 0;
    uint64_t key = KEY_STEP;
    for (size_t i = 0; i < words; ++i, key += KEY_STEP) {
        sum += term(load_word(data + i * WORD_BYTES, WORD_BYTES), key);
    }
    const size_t tail = nbytes % WORD_BYTES;
    if (tail != 0) sum += term(load_word(data + words * WORD_BYTES, tail), key);
    return sum;
}

KVS_INLINE uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The checksum of a sub-block whose words add up to `sum`.
KVS_INLINE uint64_t finish(uint64_t sum, uint64_t nbytes, uint64_t seed) {
    const uint64_t h = mix(sum ^ mix(seed ^ (nbytes * KEY_STEP)));
    return h != 0 ? h : 1;
}

}  // namespace kvs

#endif
