// Vectors of AVX-512F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace muon_kernels::cpu {
namespace {

// r[i][j] = r[j][i].
inline void transpose_16x16_u32(__m512i (&r)[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            r[4 * i + 2 * h] = _mm512_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
            r[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
        }
    }
    // r[4 i + h] has columns h, h + 4, h + 8, h + 12 of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
        const __m512i low = _mm512_shuffle_i32x4(r[h], r[4 + h], 0x88),
                      high = _mm512_shuffle_i32x4(r[h], r[4 + h], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(r[8 + h], r[12 + h], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(r[8 + h], r[12 + h], 0xdd);
        t[h] = _mm512_shuffle_i32x4(low, low2, 0x88);
        t[8 + h] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        t[4 + h] = _mm512_shuffle_i32x4(high, high2, 0x88);
        t[12 + h] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}

struct Avx512 {
    static constexpr int kLanes = 16;
    using Acc = __m512;

    static Acc zero() { return _mm512_setzero_ps(); }
    static Acc load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Acc v) { _mm512_storeu_ps(p, v); }
    static Acc broadcast(float v) { return _mm512_set1_ps(v); }
    static Acc multiply(Acc a, Acc b) { return _mm512_mul_ps(a, b); }
    static Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
    static Acc multiply_add(Acc a, Acc b, Acc c) { return _mm512_fmadd_ps(a, b, c); }
    static Acc widen(const uint16_t* p) {
        __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static void round(uint16_t* p, Acc v) {  // to_bf16's steps
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        sum = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(sum));
    }

    // The first `count` lanes, of less than all; zero in the others, or nothing written there.
    static __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Acc load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
    static Acc widen(const uint16_t* p, int64_t count) {
        const __m256i bits = _mm256_maskz_loadu_epi16(first(count), p);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static void round(uint16_t* p, Acc v, int64_t count) {
        alignas(32) uint16_t lanes[kLanes];
        round(lanes, v);
        _mm256_mask_storeu_epi16(p, first(count), _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
    }
};

}  // namespace
}  // namespace muon_kernels::cpu
