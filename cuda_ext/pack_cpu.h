// Packing on a CPU, bit for bit what the kernels do (pack.h has the format).
#ifndef KVSTRATA_PACK_CPU_H
#define KVSTRATA_PACK_CPU_H

#include <cstdint>
#include <cstring>

#include "pack.h"

namespace kvs {

// The largest ordinary exponent of each channel. `rows` holds elements / dim rows of bf16.
inline void find_bases(const uint16_t* __restrict__ rows, const Packed& shape, uint8_t* __restrict__ bases) {
    memset(bases, 0, static_cast<size_t>(shape.dim));
    for (int64_t row = 0; row < shape.elements; row += shape.dim) {
        for (int64_t d = 0; d < shape.dim; ++d) {
            const auto exponent = static_cast<uint8_t>(rows[row + d] >> 7);
            const uint8_t ordinary = exponent == EXPONENT_SPECIAL ? 0 : exponent;
            bases[d] = bases[d] < ordinary ? ordinary : bases[d];
        }
    }
}

constexpr int64_t DIM_MAX = 1024;  // core/packing.py

// Signs, mantissas and codes of one row. Returns the number of escapes. Three short loops, each of which a
// compiler turns into vectors; one loop that does all stays scalar.
inline int64_t pack_row(const uint16_t* __restrict__ row, const uint8_t* __restrict__ bases, int64_t dim,
                        uint8_t* __restrict__ rest, uint8_t* __restrict__ pairs) {
    uint8_t codes[DIM_MAX];
    int32_t escapes = 0;
    for (int64_t d = 0; d < dim; ++d) {
        rest[d] = rest_of(row[d]);
        const auto exponent = static_cast<uint8_t>(row[d] >> 7);
        const auto below = static_cast<uint8_t>(bases[d] - exponent);
        codes[d] = exponent <= bases[d] && below < ESCAPE ? below : ESCAPE;
    }
    for (int64_t d = 0; d < dim; ++d) escapes += codes[d] == ESCAPE;
    for (int64_t d = 0; d < dim; d += 2) {
        uint16_t two;
        memcpy(&two, codes + d, sizeof two);
        pairs[d / 2] = static_cast<uint8_t>(two | two >> 4);
    }
    return escapes;
}

inline void unpack_row(const uint8_t* __restrict__ rest, const uint8_t* __restrict__ pairs,
                       const uint8_t* __restrict__ bases, int64_t dim, uint16_t* __restrict__ row) {
    uint8_t codes[DIM_MAX];
    for (int64_t d = 0; d < dim; d += 2) {
        const auto two = static_cast<uint16_t>((pairs[d / 2] & 0x0F) | (pairs[d / 2] & 0xF0) << 4);
        memcpy(codes + d, &two, sizeof two);
    }
    for (int64_t d = 0; d < dim; ++d) row[d] = join(rest[d], static_cast<uint8_t>(bases[d] - codes[d]));
}

// Packs the rows of a sub-block. False: too many escapes, and `stored` holds nothing of use.
inline bool pack(const uint16_t* rows, const Packed& shape, uint8_t* stored) {
    memset(stored + shape.bases(), 0, static_cast<size_t>(shape.nbytes() - shape.bases()));
    uint8_t* bases = stored + shape.bases();
    find_bases(rows, shape, bases);
    int64_t escapes = 0;
    for (int64_t row = 0; row < shape.elements; row += shape.dim) {
        escapes += pack_row(rows + row, bases, shape.dim, stored + row, stored + shape.codes() + row / 2);
    }
    if (escapes > shape.escapes_max()) return false;
    const auto count = static_cast<uint32_t>(escapes);
    uint8_t* table = stored + shape.escapes();
    memcpy(table, &count, sizeof count);
    const uint8_t* codes = stored + shape.codes();
    int64_t found = 0;
    for (int64_t at = 0; found < escapes; ++at) {
        if ((codes[at / 2] >> (at % 2 * 4) & 15) != ESCAPE) continue;
        const auto entry = static_cast<uint32_t>(at << 8 | exponent_of(rows[at]));
        memcpy(table + 4 * ++found, &entry, sizeof entry);
    }
    return true;
}

inline void unpack(const uint8_t* stored, const Packed& shape, uint16_t* rows) {
    const uint8_t* codes = stored + shape.codes();
    const uint8_t* bases = stored + shape.bases();
    for (int64_t row = 0; row < shape.elements; row += shape.dim) {
        unpack_row(stored + row, codes + row / 2, bases, shape.dim, rows + row);
    }
    uint32_t count;
    memcpy(&count, stored + shape.escapes(), sizeof count);
    for (int64_t i = 1; i <= count && i <= shape.escapes_max(); ++i) {
        uint32_t entry;
        memcpy(&entry, stored + shape.escapes() + 4 * i, sizeof entry);
        const int64_t at = entry >> 8;
        if (at < shape.elements) rows[at] = join(stored[at], entry & 0xFF);
    }
}

}  // namespace kvs

#endif
