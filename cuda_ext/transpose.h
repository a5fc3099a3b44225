// Transposing a matrix of 1-, 2- or 4-byte items in tiles of 16-byte vectors.
//
// A tile of N x N items (N = 16 / item size) sits in N vectors. Interleaving vector i with vector
// i + N/2 rotates the bits of (row, column) by one place; log2(N) rounds swap row and column.
// Interleaving is one instruction on SSE2 (punpck) and on NEON (zip), so nothing here names an
// instruction set.
#ifndef KVSTRATA_TRANSPOSE_H
#define KVSTRATA_TRANSPOSE_H

#include <cstdint>
#include <cstring>
#include <utility>

// GCC before 12 has no __builtin_shufflevector, Clang no __builtin_shuffle.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef KVS_SHUFFLE
#define KVS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Vector{__VA_ARGS__})
#endif

namespace kvs {

template <class Item>
struct Tile {
    static constexpr int N = 16 / sizeof(Item);
    typedef Item Vector __attribute__((vector_size(16)));

    template <int... Lane>
    static inline void interleave(Vector a, Vector b, Vector* out, std::integer_sequence<int, Lane...>) {
        out[0] = KVS_SHUFFLE(a, b, (Lane / 2 + Lane % 2 * N)...);
        out[1] = KVS_SHUFFLE(a, b, (N / 2 + Lane / 2 + Lane % 2 * N)...);
    }

    // Strides are bytes from row to row. Items of a row are adjacent; nothing needs to be aligned.
    static inline void transpose(uint8_t* dst, int64_t dst_stride, const uint8_t* src, int64_t src_stride) {
        Vector rows[N], next[N];
        for (int i = 0; i < N; ++i) memcpy(&rows[i], src + i * src_stride, sizeof(Vector));
        for (int round = 1; round < N; round *= 2) {
            for (int i = 0; i < N / 2; ++i) {
                interleave(rows[i], rows[i + N / 2], &next[2 * i], std::make_integer_sequence<int, N>());
            }
            memcpy(rows, next, sizeof(rows));
        }
        for (int i = 0; i < N; ++i) memcpy(dst + i * dst_stride, &rows[i], sizeof(Vector));
    }
};

template <class Item>
inline void transpose_edge(uint8_t* dst, int64_t dst_stride, const uint8_t* src, int64_t src_stride,
                           int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t c = column; c < columns; ++c) {
        for (int64_t r = row; r < rows; ++r) {
            memcpy(dst + c * dst_stride + r * int64_t{sizeof(Item)},
                   src + r * src_stride + c * int64_t{sizeof(Item)}, sizeof(Item));
        }
    }
}

// dst[c][r] = src[r][c] for `rows` x `columns` items of src.
template <class Item>
void transpose(uint8_t* dst, int64_t dst_stride, const uint8_t* src, int64_t src_stride, int64_t rows,
               int64_t columns) {
    constexpr int64_t N = Tile<Item>::N;
    const int64_t whole_rows = rows - rows % N;
    const int64_t whole_columns = columns - columns % N;
    // Rows inside: dst is written along its rows, and src's lines stay in L1 until they are used up.
    for (int64_t c = 0; c < whole_columns; c += N) {
        for (int64_t r = 0; r < whole_rows; r += N) {
            Tile<Item>::transpose(dst + c * dst_stride + r * int64_t{sizeof(Item)}, dst_stride,
                                  src + r * src_stride + c * int64_t{sizeof(Item)}, src_stride);
        }
    }
    transpose_edge<Item>(dst, dst_stride, src, src_stride, whole_rows, rows, 0, whole_columns);
    transpose_edge<Item>(dst, dst_stride, src, src_stride, 0, rows, whole_columns, columns);
}

}  // namespace kvs

#endif
