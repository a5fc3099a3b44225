// Packing and unpacking of one sub-block by one thread block (pack.h has the bytes).
//
// Two ways to the same bits: `..._rows` where rows are whole vectors and shared memory has room for all
// elements, which is what engines have, two elements a register; and one for any strides.
//
// Loops are not unrolled: a kernel this short waits for its own code to be fetched. Straight, the same
// arithmetic took twice as long.
#ifndef KVSTRATA_PACK_KERNELS_CUH
#define KVSTRATA_PACK_KERNELS_CUH

#include <cuda_pipeline.h>

#include "sub_blocks.cuh"

namespace {

constexpr int VECTOR = 8;  // elements
constexpr int WORDS = VECTOR / 2;
// In a word of two elements: their exponents, the exponent 1, the code of an escape; what leaves 8 bits.
constexpr uint32_t EXPONENTS = 0x7F807F80, ONE = 0x00800080, ESCAPES = 0x07800780;
constexpr uint32_t MANTISSAS = 0x007F007F;

struct Tables {  // in shared memory
    int* bases;
    uint32_t* escapes;
    uint32_t* in_order;
    uint32_t* count;
    uint32_t most;
};

// How threads share the vectors of a sub-block: `threads` of them take every so many, each always the same
// channels of a row; an even number, so that neighbours have a whole word of codes between them.
struct Turns {
    int32_t vectors, in_row, threads, first;  // `first`: this thread's; not below `vectors` if it takes no part

    __device__ Turns(const kvs::Packed& shape)
        : vectors(static_cast<int32_t>(shape.elements / VECTOR)),
          in_row(static_cast<int32_t>(shape.dim / VECTOR)),
          threads(THREADS / (2 * in_row) * (2 * in_row)),
          first(static_cast<int32_t>(threadIdx.x) < threads ? static_cast<int32_t>(threadIdx.x) : vectors) {}
    __device__ int32_t column() const { return first % in_row; }
};

// Whether the fast ways can be taken, given room.
__device__ bool rows_are_turns(const SubBlock& sub, const kvs::Packed& shape) {
    return rows_are_vectors(sub.plane, 16) && shape.elements % (2 * VECTOR) == 0 && shape.dim <= THREADS * VECTOR / 2;
}

__device__ void note_escape(const Tables& tables, int32_t element, uint32_t exponent) {
    const uint32_t place = atomicAdd(tables.count, 1u);
    if (place < tables.most) tables.escapes[place] = static_cast<uint32_t>(element) << 8 | exponent;
}

// --- packing, fast -------------------------------------------------------------------------------

// Fetches all elements, each vector for the thread that will ask for it.
__device__ void fetch_rows(const Turns& turns, uint8_t* const* rows, uint4* held) {
    const int32_t offset = turns.column() * 16, tokens = turns.threads / turns.in_row;
    int32_t token = turns.first / turns.in_row;
#pragma unroll 2
    for (int32_t v = turns.first; v < turns.vectors; v += turns.threads, token += tokens) {
        __pipeline_memcpy_async(held + v, rows[token] + offset, 16);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
}

// The bases of all channels: in `tables`, and at `largest` as words of two. Returns whether this thread has
// met an Inf or a NaN, whose exponent is no base.
__device__ bool find_bases_rows(const Turns& turns, const uint4* held, uint4* largest, const Tables& tables) {
    uint32_t most[WORDS] = {}, special = 0;
#pragma unroll 1
    for (int32_t v = turns.first; v < turns.vectors; v += turns.threads) {
        const uint32_t words[WORDS] = {held[v].x, held[v].y, held[v].z, held[v].w};
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            const uint32_t next = (words[w] & EXPONENTS) + ONE;  // of a special one, the sign's bit alone
            special |= next & ~EXPONENTS;
            most[w] = __vmaxu2(most[w], next & EXPONENTS);
        }
    }
    largest[threadIdx.x] = {most[0], most[1], most[2], most[3]};
    __syncthreads();
    auto* column = reinterpret_cast<uint32_t*>(largest);
    const int32_t words = turns.in_row * WORDS, all = turns.threads * WORDS;
    for (int32_t i = threadIdx.x; i < words; i += THREADS) {
        uint32_t next = ONE;
#pragma unroll 4
        for (int32_t at = i; at < all; at += words) next = __vmaxu2(next, column[at]);
        const uint32_t bases = next - ONE;
        column[i] = bases;  // read by nobody else yet
        tables.bases[2 * i] = bases >> 7 & 0xFF;
        tables.bases[2 * i + 1] = bases >> 23;
    }
    __syncthreads();
    return special != 0;
}

// The codes of a vector, and a note of what escapes.
__device__ uint32_t codes_with_escapes(const uint4* held, int32_t vector, int32_t channel, const Tables& tables) {
    const auto* items = reinterpret_cast<const uint16_t*>(held + vector);
    uint32_t codes = 0;
#pragma unroll 1
    for (int i = 0; i < VECTOR; ++i) {
        const int exponent = kvs::exponent_of(items[i]);
        const int code = kvs::code_of(tables.bases[channel + i], exponent);
        if (code == kvs::ESCAPE) note_escape(tables, vector * VECTOR + i, exponent);
        codes |= static_cast<uint32_t>(code) << (4 * i);
    }
    return codes;
}

// Of a vector, sign and mantissa of each element; and the codes, if nothing escapes.
__device__ bool pack_vector(const uint4& held, const uint4& base, uint2* rests, uint32_t* codes) {
    const uint32_t words[WORDS] = {held.x, held.y, held.z, held.w}, bases[WORDS] = {base.x, base.y, base.z, base.w};
    uint32_t apart[WORDS], code[WORDS], most = 0;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        apart[w] = (words[w] >> 8 & ~MANTISSAS) | (words[w] & MANTISSAS);  // in bytes 0 and 2
        code[w] = __vminu2(bases[w] - (words[w] & EXPONENTS), ESCAPES);
        most = __vmaxu2(most, code[w]);
    }
    *rests = {__byte_perm(apart[0], apart[1], 0x6420), __byte_perm(apart[2], apart[3], 0x6420)};
    uint32_t four[2];  // elements' codes, in the low half
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t both = (code[2 * i] >> 7) + (code[2 * i + 1] << 1);  // in nibbles 0, 4 and 2, 6
        four[i] = both | both >> 12;
    }
    *codes = __byte_perm(four[0], four[1], 0x5410);
    return ((most + ONE) & 0x08000800) == 0;
}

__device__ uint64_t pack_rows(const Job& job, const SubBlock& sub, const kvs::PackingRoom& room,
                              const Tables& tables) {
    const kvs::Packed shape = room.shape();
    const Turns turns(shape);
    auto* held = reinterpret_cast<uint4*>(shared_bytes() + room.elements());
    auto* largest = reinterpret_cast<uint4*>(shared_bytes() + room.largest());
    auto** rows = reinterpret_cast<uint8_t**>(shared_bytes() + room.rows());
    find_rows(job, sub, rows);
    __syncthreads();
    fetch_rows(turns, rows, held);
    const bool special = find_bases_rows(turns, held, largest, tables);
    const uint4 bases = largest[turns.column()];
    const auto codes_at = static_cast<uint32_t>(shape.codes() / 8);  // in words of the checksum
    uint64_t share = 0;
#pragma unroll 1
    for (int32_t begin = 0, v = turns.first; begin < turns.vectors; begin += turns.threads, v += turns.threads) {
        uint32_t codes = 0;
        if (v < turns.vectors) {
            uint2 rests;
            if (!pack_vector(held[v], bases, &rests, &codes) || special) {
                codes = codes_with_escapes(held, v, turns.column() * VECTOR, tables);
            }
            reinterpret_cast<uint2*>(sub.data)[v] = rests;
            share += word_term(uint64_t{rests.y} << 32 | rests.x, v);
        }
        const uint64_t word = uint64_t{__shfl_down_sync(0xFFFFFFFFu, codes, 1)} << 32 | codes;
        if (v < turns.vectors && v % 2 == 0) {
            const uint32_t index = codes_at + v / 2;
            reinterpret_cast<uint64_t*>(sub.data)[index] = word;
            share += word_term(word, index);
        }
    }
    return share;
}

// --- packing, any strides ------------------------------------------------------------------------

__device__ void find_bases(const Job& job, const SubBlock& sub, int32_t elements, int* bases) {
    const int32_t dim = sub.plane.dim;
    for (int32_t d = threadIdx.x; d < dim; d += THREADS) bases[d] = 0;
    __syncthreads();
    const bool vectors = rows_are_vectors(sub.plane, 32);
    for (int32_t first = threadIdx.x * GROUP; first < elements; first += THREADS * GROUP) {
        const Group group = load_group(job, sub, first, vectors);
        Place at(first, dim);
        for (int i = 0; i < GROUP; ++i, at.step(dim)) {
            const int exponent = kvs::exponent_of(group.items[i]);
            if (exponent != kvs::EXPONENT_SPECIAL) atomicMax(&bases[at.channel], exponent);
        }
    }
    __syncthreads();
}

__device__ uint64_t pack_any(const Job& job, const SubBlock& sub, const kvs::Packed& shape, const Tables& tables) {
    const auto elements = static_cast<int32_t>(shape.elements);
    find_bases(job, sub, elements, tables.bases);
    const bool vectors = rows_are_vectors(sub.plane, 32);
    uint64_t share = 0;
    for (int32_t first = threadIdx.x * GROUP; first < elements; first += THREADS * GROUP) {
        const Group group = load_group(job, sub, first, vectors);
        Place at(first, sub.plane.dim);
        uint64_t rest[2] = {}, codes = 0;
        for (int i = 0; i < GROUP; ++i, at.step(sub.plane.dim)) {
            const int exponent = kvs::exponent_of(group.items[i]);
            const int code = kvs::code_of(tables.bases[at.channel], exponent);
            rest[i / 8] |= uint64_t{kvs::rest_of(group.items[i])} << (8 * (i % 8));
            codes |= uint64_t{static_cast<uint32_t>(code)} << (4 * i);
            if (code == kvs::ESCAPE) note_escape(tables, first + i, exponent);
        }
        auto* rest_words = reinterpret_cast<uint64_t*>(sub.data + first);
        rest_words[0] = rest[0];
        rest_words[1] = rest[1];
        *reinterpret_cast<uint64_t*>(sub.data + shape.codes() + first / 2) = codes;
        share += word_term(rest[0], first / 8) + word_term(rest[1], first / 8 + 1);
        share += word_term(codes, (shape.codes() + first / 2) / 8);
    }
    return share;
}

// The bases and the escapes, in the order of their positions whatever order threads found them in.
__device__ uint64_t pack_tables(const SubBlock& sub, const kvs::Packed& shape, const Tables& tables) {
    const uint32_t count = *tables.count;
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        uint32_t before = 0;
        for (uint32_t j = 0; j < count; ++j) before += tables.escapes[j] < tables.escapes[i];
        tables.in_order[before] = tables.escapes[i];
    }
    __syncthreads();
    uint64_t share = 0;
    const auto bases = static_cast<uint32_t>(shape.bases() / 8), escapes = static_cast<uint32_t>(shape.escapes() / 8);
    for (uint32_t at = bases + threadIdx.x; at < shape.nbytes() / 8; at += THREADS) {
        uint64_t word = 0;
        if (at < escapes) {
            const auto channel = (at - bases) * 8;
            for (int i = 0; i < 8 && channel + i < shape.dim; ++i) {
                word |= uint64_t{static_cast<uint8_t>(tables.bases[channel + i])} << (8 * i);
            }
        } else {
            const uint32_t entry = 2 * (at - escapes);  // entry 0 is the count
            if (entry == 0) word = count;
            else if (entry <= count) word = tables.in_order[entry - 1];
            if (entry + 1 <= count) word |= uint64_t{tables.in_order[entry]} << 32;
        }
        reinterpret_cast<uint64_t*>(sub.data)[at] = word;
        share += word_term(word, at);
    }
    return share;
}

// Packs the sub-block; returns the sum of its words. `fits`: its escapes fit in their table.
__device__ uint64_t gather_packed(const Job& job, const SubBlock& sub, const kvs::Packed& shape, bool* fits) {
    __shared__ uint32_t count;
    if (threadIdx.x == 0) count = 0;
    const kvs::PackingRoom room = {job.chunk_tokens, sub.plane.dim};
    Tables tables;
    tables.bases = reinterpret_cast<int*>(shared_bytes() + room.bases());
    tables.escapes = reinterpret_cast<uint32_t*>(shared_bytes() + room.escapes());
    tables.in_order = reinterpret_cast<uint32_t*>(shared_bytes() + room.in_order());
    tables.count = &count;
    tables.most = static_cast<uint32_t>(shape.escapes_max());
    const bool fast = room.fast() <= job.room && rows_are_turns(sub, shape);
    uint64_t share = fast ? pack_rows(job, sub, room, tables) : pack_any(job, sub, shape, tables);
    __syncthreads();
    *fits = count <= tables.most;
    if (!*fits) return 0;
    share += pack_tables(sub, shape, tables);
    return total(share);
}

// --- unpacking -----------------------------------------------------------------------------------

// The sub-block lies in shared memory.
__device__ void unpack_rows(const SubBlock& sub, const kvs::Packed& shape, uint8_t* const* rows) {
    const Turns turns(shape);
    const int32_t column = turns.column(), tokens = turns.threads / turns.in_row;
    const uint8_t* base = sub.data + shape.bases() + column * VECTOR;
    const auto* rest = reinterpret_cast<const uint2*>(sub.data);
    const auto* codes = reinterpret_cast<const uint32_t*>(sub.data + shape.codes());
    uint32_t bases[WORDS];  // with a bit above each, from which may be borrowed
#pragma unroll
    for (int w = 0; w < WORDS; ++w) bases[w] = 0x80008000 | uint32_t{base[2 * w + 1]} << 23 | uint32_t{base[2 * w]} << 7;
    int32_t token = turns.first / turns.in_row;
#pragma unroll 1
    for (int32_t v = turns.first; v < turns.vectors; v += turns.threads, token += tokens) {
        const uint2 rests = rest[v];
        const uint32_t even = codes[v], odd = even >> 4;
        uint32_t words[WORDS];
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            const uint32_t apart = __byte_perm(w < 2 ? rests.x : rests.y, 0, w % 2 == 0 ? 0x1100 : 0x3322);
            const uint32_t code = __byte_perm(even, odd, w | (4 + w) << 8) & 0x000F000F;
            words[w] = (bases[w] - (code << 7) & EXPONENTS) | (apart & ~EXPONENTS);
        }
        if (uint8_t* to = rows[token]) {
            reinterpret_cast<uint4*>(to)[column] = {words[0], words[1], words[2], words[3]};
        }
    }
}

__device__ void unpack_any(const Job& job, const SubBlock& sub, const kvs::Packed& shape) {
    const auto elements = static_cast<int32_t>(shape.elements);
    const bool vectors = rows_are_vectors(sub.plane, 32);
    const uint8_t* bases = sub.data + shape.bases();
    for (int32_t first = threadIdx.x * GROUP; first < elements; first += THREADS * GROUP) {
        const auto* rest = reinterpret_cast<const uint64_t*>(sub.data + first);
        const uint64_t words[2] = {rest[0], rest[1]};
        const uint64_t codes = *reinterpret_cast<const uint64_t*>(sub.data + shape.codes() + first / 2);
        Group group;
        Place at(first, sub.plane.dim);
        for (int i = 0; i < GROUP; ++i, at.step(sub.plane.dim)) {
            const int base = bases[at.channel], code = static_cast<int>(codes >> (4 * i) & 15);
            group.items[i] = kvs::join(static_cast<uint8_t>(words[i / 8] >> (8 * (i % 8))), base - code & 0xFF);
        }
        store_group(job, sub, first, vectors, group);
    }
}

// `rows`: each token's address, where the sub-block is in shared memory; or null.
__device__ void unpack(const Job& job, const SubBlock& sub, uint8_t* const* rows) {
    const kvs::Packed shape = {int64_t{job.chunk_tokens} * sub.plane.dim, sub.plane.dim};
    if (rows != nullptr && rows_are_turns(sub, shape)) unpack_rows(sub, shape, rows);
    else unpack_any(job, sub, shape);
    __syncthreads();  // escapes overwrite what the codes gave
    const auto* table = reinterpret_cast<const uint32_t*>(sub.data + shape.escapes());
    const auto most = static_cast<uint32_t>(shape.escapes_max());
    const auto last = static_cast<int32_t>(shape.elements) - 1;
    for (uint32_t i = threadIdx.x; i < min(table[0], most); i += THREADS) {
        const auto element = min(static_cast<int32_t>(table[1 + i] >> 8), last);
        const Place at(element, sub.plane.dim);
        auto* to = engine_address(job, sub, at.token, at.channel);
        if (to != nullptr) *reinterpret_cast<uint16_t*>(to) = kvs::join(sub.data[element], table[1 + i] & 0xFF);
    }
}

}  // namespace

#endif
