// The primitives of prims.cuh on the host, one for one. How the parts of a matrix lie in the lanes of a warp is
// described in the PTX manual under "Matrix Fragments for mma.m16n8k16" and "ldmatrix".
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

#define RNNKERN_DYNAMIC_SHARED(name) unsigned char* name = ::rnnkern::host::dynamic_shared()

namespace rnnkern {

inline void copy_async16(void* shared, const void* global, int bytes, host::Source where = host::Source::here()) {
    host::copy_async(shared, global, bytes, where);
}

inline void copy_async_commit() {
    host::copy_async_commit();
}

template <int kPending>
void copy_async_wait() {
    host::copy_async_wait(kPending);
}

namespace host {

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct MatrixRow {
    uint32_t words[4];
};

// Lane l names row l % 8 of matrix l / 8, and gets word l % 4 of row l / 4 of each matrix.
template <int kMatrices>
void load_matrix(uint32_t (&words)[kMatrices], const void* row, const char* operation, Source where) {
    const unsigned lane = lane_of_warp();
    MatrixRow mine{};
    if (lane < 8 * kMatrices) {
        check_shared_row(operation, row, where);
        std::memcpy(&mine, row, sizeof mine);
    }
    const Lanes<MatrixRow> rows = exchange(operation, mine, where);
    for (int i = 0; i < kMatrices; ++i) words[i] = rows[8 * i + lane / 4].words[lane % 4];
}

// A lane's part of a (16, 8 * kPerWord) and b (8 * kPerWord, 8): four and two words of kPerWord neighbours along k.
template <int kPerWord>
struct Operands {
    float a[4][kPerWord];
    float b[2][kPerWord];
};

// Rounds once, at the end. The tensor cores add in an order and with roundings that are not documented.
template <int kPerWord>
void multiply_add(float (&d)[4], const Operands<kPerWord>& mine, const char* operation, Source where) {
    const Lanes<Operands<kPerWord>> lanes = exchange(operation, mine, where);
    const int lane = static_cast<int>(lane_of_warp());
    const int row_lane = lane / 4 * 4;         // the first of four lanes that hold rows lane / 4 and lane / 4 + 8 of a
    const int column_lane = lane % 4 * 2 * 4;  // the first of four that hold a column of b; behind them the next one's
    double sums[4] = {d[0], d[1], d[2], d[3]};
    for (int t = 0; t < 4; ++t) {
        const float (&a)[4][kPerWord] = lanes[row_lane + t].a;
        const float (&left)[2][kPerWord] = lanes[column_lane + t].b;
        const float (&right)[2][kPerWord] = lanes[column_lane + 4 + t].b;
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < kPerWord; ++k) {
                sums[0] += double{a[2 * half][k]} * left[half][k];
                sums[1] += double{a[2 * half][k]} * right[half][k];
                sums[2] += double{a[2 * half + 1][k]} * left[half][k];
                sums[3] += double{a[2 * half + 1][k]} * right[half][k];
            }
        }
    }
    for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(sums[i]);
}

template <class Narrow>
Operands<2> unpack(const uint32_t (&a)[4], const uint32_t (&b)[2], float (*widen)(Narrow)) {
    Operands<2> wide;
    for (int k = 0; k < 2; ++k) {
        for (int i = 0; i < 4; ++i) wide.a[i][k] = widen(Narrow{static_cast<uint16_t>(a[i] >> 16 * k)});
        for (int i = 0; i < 2; ++i) wide.b[i][k] = widen(Narrow{static_cast<uint16_t>(b[i] >> 16 * k)});
    }
    return wide;
}

// The tensor cores drop the 13 bits without a word, which would hide that to_tf32 has been forgotten.
inline float checked_tf32(uint32_t bits, Source where) {
    if (bits & 0x1fff)
        fail(where, "mma_tf32: operand %08x is not what to_tf32 gives: its last 13 bits are not 0", bits);
    return float_of(bits);
}

}  // namespace host

inline void load_matrix_x4(uint32_t (&words)[4], const void* row, host::Source where = host::Source::here()) {
    host::load_matrix(words, row, "load_matrix_x4", where);
}

inline void load_matrix_x2(uint32_t (&words)[2], const void* row, host::Source where = host::Source::here()) {
    host::load_matrix(words, row, "load_matrix_x2", where);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     host::Source where = host::Source::here()) {
    host::multiply_add(d, host::unpack<__nv_bfloat16>(a, b, __bfloat162float), "mma_bf16", where);
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    host::Source where = host::Source::here()) {
    host::multiply_add(d, host::unpack<__half>(a, b, __half2float), "mma_f16", where);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     host::Source where = host::Source::here()) {
    host::Operands<1> wide;
    for (int i = 0; i < 4; ++i) wide.a[i][0] = host::checked_tf32(a[i], where);
    for (int i = 0; i < 2; ++i) wide.b[i][0] = host::checked_tf32(b[i], where);
    host::multiply_add(d, wide, "mma_tf32", where);
}

// To nearest, ties away from zero; infinity stays, and so does NaN, as one whose last 13 bits are 0.
inline uint32_t to_tf32(float value) {
    if (value != value) return 0x7fffe000;
    return (host::bits_of(value) + 0x1000) & ~0x1fffu;
}

}  // namespace rnnkern
