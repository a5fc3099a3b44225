// Exact packing of bf16: 12 bits an element instead of 16, and every bit comes back.
//
//     signs and mantissas  n bytes      sign << 7 | mantissa, in canonical order
//     codes                n / 2 bytes  4 bits: base - exponent, or 15 for an escape; even elements low
//     bases                dim bytes    for each channel its largest exponent below 255
//     escapes              u32 count, then count entries of position << 8 | exponent, by position;
//                          the rest 0. n / 256 words in all, rounded up to even
//     padding to 16 bytes
//
// n = tokens * dim. Exponents of a channel of real KV span few powers of two, so nearly all lie at most
// 14 below its largest. Where more elements escape than the table holds, the sub-block does not fit.
#ifndef KVSTRATA_PACK_H
#define KVSTRATA_PACK_H

#include <cstdint>

#include "checksum.h"

namespace kvs {

constexpr int ESCAPE = 15;
constexpr int64_t ELEMENTS_PER_ESCAPE_WORD = 256;
constexpr int EXPONENT_SPECIAL = 255;  // Inf and NaN: never a base, so that one of them costs one escape

struct Packed {
    int64_t elements;
    int64_t dim;

    KVS_INLINE int64_t codes() const { return elements; }
    KVS_INLINE int64_t bases() const { return elements + elements / 2; }
    KVS_INLINE int64_t escapes() const { return bases() + (dim + 7) / 8 * 8; }
    KVS_INLINE int64_t escape_words() const {
        return (elements + 2 * ELEMENTS_PER_ESCAPE_WORD - 1) / (2 * ELEMENTS_PER_ESCAPE_WORD) * 2;
    }
    KVS_INLINE int64_t escapes_max() const { return escape_words() - 1; }
    KVS_INLINE int64_t nbytes() const { return (escapes() + 4 * escape_words() + 15) / 16 * 16; }
};

KVS_INLINE int exponent_of(uint16_t bits) { return (bits >> 7) & 0xFF; }
KVS_INLINE uint8_t rest_of(uint16_t bits) { return static_cast<uint8_t>((bits >> 8 & 0x80) | (bits & 0x7F)); }
KVS_INLINE uint16_t join(uint8_t rest, int exponent) {
    return static_cast<uint16_t>((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7F));
}
KVS_INLINE int code_of(int base, int exponent) {
    const int code = base - exponent;
    return code >= 0 && code < ESCAPE ? code : ESCAPE;
}

}  // namespace kvs

#endif
