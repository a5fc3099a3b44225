// Packing and unpacking of one sub-block by one thread block (pack.h has the bytes).
//
// Two ways to the same bits: `..._rows` where every thread sees the same channels in all its groups and
// whole vectors lie in rows, which is what engines have, two elements a register; and one for any strides.
#ifndef KVSTRATA_PACK_KERNELS_CUH
#define KVSTRATA_PACK_KERNELS_CUH

#include "sub_blocks.cuh"

namespace {

// A thread's groups in registers: a sub-block of 256 tokens x 128 channels, or smaller.
constexpr int HELD = 32768 / (THREADS * GROUP);
constexpr int WORDS = GROUP / 2;
constexpr uint32_t BYTES = 0x00FF00FF;  // the low byte of both halves of a word

struct Tables {  // in shared memory
    int* bases;
    uint32_t* escapes;
    uint32_t* count;
    uint32_t most;
};

// Whether the fast way can be taken: a row is 1, 2, 4 ... 32 lanes.
__device__ bool rows_are_lanes(const Job& job, const SubBlock& sub) {
    const int32_t lanes = sub.plane.dim / GROUP;
    return rows_are_vectors(sub.plane, 32) && lanes <= 32 && (lanes & (lanes - 1)) == 0 &&
           job.chunk_tokens * sub.plane.dim % (2 * GROUP) == 0;
}

__device__ uint32_t exponents_of(uint32_t two) { return two >> 7 & BYTES; }

__device__ void note_escape(const Tables& tables, int32_t element, uint32_t exponent) {
    const uint32_t place = atomicAdd(tables.count, 1u);
    if (place < tables.most) tables.escapes[place] = static_cast<uint32_t>(element) << 8 | exponent;
}

// --- packing, fast -------------------------------------------------------------------------------

// The largest ordinary exponents of this thread's channels, over the whole sub-block.
__device__ void find_bases_rows(const Group* groups, int32_t dim, int* bases) {
    uint32_t largest[WORDS] = {};
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            const uint32_t exponents = exponents_of(groups[k].words[w]);
            largest[w] = __vmaxu2(largest[w], exponents & ~__vcmpeq2(exponents, BYTES));
        }
    }
    const int32_t lanes = dim / GROUP, lane = threadIdx.x % 32;
    for (int32_t step = lanes; step < 32; step *= 2) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            largest[w] = __vmaxu2(largest[w], __shfl_xor_sync(0xFFFFFFFFu, largest[w], step));
        }
    }
    if (lane < lanes) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            atomicMax(&bases[lane * GROUP + 2 * w], static_cast<int>(largest[w] & 0xFFFF));
            atomicMax(&bases[lane * GROUP + 2 * w + 1], static_cast<int>(largest[w] >> 16));
        }
    }
}

// Packs one group; returns its share of the checksum.
__device__ uint64_t pack_group_rows(const SubBlock& sub, const Group& group, int32_t first, int64_t codes_at,
                                    const uint32_t* bases, const Tables& tables) {
    uint32_t rest[WORDS / 2], codes[2] = {}, escaped = 0;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const uint32_t two = group.words[w];
        const uint32_t apart = (two >> 8 & 0x00800080) | (two & 0x007F007F);
        const uint32_t code = __vminu2(__vsub2(bases[w], exponents_of(two)), 0x000F000F);
        escaped |= __vcmpeq2(code, 0x000F000F);
        codes[w / 4] |= ((code & 15) | (code >> 12 & 0xF0)) << (8 * (w % 4));
        rest[w / 2] = w % 2 == 0 ? apart : __byte_perm(rest[w / 2], apart, 0x6420);
    }
    if (escaped != 0) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const int exponent = kvs::exponent_of(group.words[i / 2] >> (16 * (i % 2)) & 0xFFFF);
            const int base = bases[i / 2] >> (16 * (i % 2)) & 0xFF;
            if (kvs::code_of(base, exponent) == kvs::ESCAPE) note_escape(tables, first + i, exponent);
        }
    }
    const uint4 rests = {rest[0], rest[1], rest[2], rest[3]};
    const uint64_t packed_codes = uint64_t{codes[1]} << 32 | codes[0];
    *reinterpret_cast<uint4*>(sub.data + first) = rests;
    *reinterpret_cast<uint64_t*>(sub.data + codes_at + first / 2) = packed_codes;
    return vector_term(rests, first / GROUP) + word_term(packed_codes, (codes_at + first / 2) / 8);
}

__device__ uint64_t pack_rows(const Job& job, const SubBlock& sub, const kvs::Packed& shape, const Tables& tables) {
    const auto elements = static_cast<int32_t>(shape.elements);
    const int32_t dim = sub.plane.dim;
    Group groups[HELD];
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
        const int32_t first = (k * THREADS + static_cast<int32_t>(threadIdx.x)) * GROUP;
        if (first < elements) groups[k] = load_group(job, sub, first, true);
        else groups[k].vectors[0] = groups[k].vectors[1] = {};
    }
    for (int32_t d = threadIdx.x; d < dim; d += THREADS) tables.bases[d] = 0;
    __syncthreads();
    find_bases_rows(groups, dim, tables.bases);
    __syncthreads();
    const int32_t channel = static_cast<int32_t>(threadIdx.x) * GROUP % dim;
    uint32_t bases[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        bases[w] = static_cast<uint32_t>(tables.bases[channel + 2 * w + 1]) << 16 |
                   static_cast<uint32_t>(tables.bases[channel + 2 * w]);
    }
    uint64_t share = 0;
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
        const int32_t first = (k * THREADS + static_cast<int32_t>(threadIdx.x)) * GROUP;
        if (first < elements) share += pack_group_rows(sub, groups[k], first, shape.codes(), bases, tables);
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
    for (int64_t d = threadIdx.x; d < (shape.dim + 7) / 8 * 8; d += THREADS) {
        sub.data[shape.bases() + d] = static_cast<uint8_t>(d < shape.dim ? tables.bases[d] : 0);
    }
    auto* table = reinterpret_cast<uint32_t*>(sub.data + shape.escapes());
    const int64_t words = (shape.nbytes() - shape.escapes()) / 4;
    for (int64_t i = threadIdx.x; i < words; i += THREADS) {
        if (i == 0) table[0] = count;
        else if (i > count) table[i] = 0;
    }
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        uint32_t before = 0;
        for (uint32_t j = 0; j < count; ++j) before += tables.escapes[j] < tables.escapes[i];
        table[1 + before] = tables.escapes[i];
    }
    __syncthreads();
    uint64_t share = 0;
    const auto* from = reinterpret_cast<const uint64_t*>(sub.data);
    for (int64_t i = shape.bases() / 8 + threadIdx.x; i < shape.nbytes() / 8; i += THREADS) {
        share += word_term(from[i], i);
    }
    return share;
}

// Packs the sub-block; returns the sum of its words. `fits`: its escapes fit in their table.
__device__ uint64_t gather_packed(const Job& job, const SubBlock& sub, const kvs::Packed& shape, bool* fits) {
    __shared__ uint32_t count;
    if (threadIdx.x == 0) count = 0;
    Tables tables;
    tables.bases = reinterpret_cast<int*>(shared);
    tables.escapes = reinterpret_cast<uint32_t*>(tables.bases + shape.dim);
    tables.count = &count;
    tables.most = static_cast<uint32_t>(shape.escapes_max());
    const bool fast = shape.elements <= HELD * THREADS * GROUP && rows_are_lanes(job, sub);
    uint64_t share = fast ? pack_rows(job, sub, shape, tables) : pack_any(job, sub, shape, tables);
    __syncthreads();
    *fits = count <= tables.most;
    if (!*fits) return 0;
    share += pack_tables(sub, shape, tables);
    return total(share);
}

// --- unpacking -----------------------------------------------------------------------------------

__device__ void unpack_rows(const Job& job, const SubBlock& sub, const kvs::Packed& shape) {
    const auto elements = static_cast<int32_t>(shape.elements);
    const int32_t channel = static_cast<int32_t>(threadIdx.x) * GROUP % sub.plane.dim;
    const uint8_t* base = sub.data + shape.bases() + channel;
    uint32_t bases[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; ++w) bases[w] = uint32_t{base[2 * w + 1]} << 16 | base[2 * w];
    for (int32_t first = threadIdx.x * GROUP; first < elements; first += THREADS * GROUP) {
        const uint4 rests = *reinterpret_cast<const uint4*>(sub.data + first);
        const uint2 codes = *reinterpret_cast<const uint2*>(sub.data + shape.codes() + first / 2);
        const uint32_t rest[] = {rests.x, rests.y, rests.z, rests.w}, code[] = {codes.x, codes.y};
        Group group;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            const uint32_t apart = __byte_perm(rest[w / 2], 0, w % 2 == 0 ? 0x4140 : 0x4342);
            const uint32_t both = code[w / 4] >> (8 * (w % 4)) & 0xFF;
            const uint32_t exponents = __vsub2(bases[w], (both & 15) | (both & 0xF0) << 12) & BYTES;
            group.words[w] = (apart & 0x00800080) << 8 | exponents << 7 | (apart & 0x007F007F);
        }
        store_group(job, sub, first, true, group);
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

__device__ void unpack(const Job& job, const SubBlock& sub) {
    const kvs::Packed shape = {int64_t{job.chunk_tokens} * sub.plane.dim, sub.plane.dim};
    if (rows_are_lanes(job, sub)) unpack_rows(job, sub, shape);
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
