// Vectors of AVX-512 with BF16.
#pragma once

#include <algorithm>

#include "avx512.h"

namespace muon_kernels::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
    using PairA = __m512bh;
    using PairB = __m512bh;

    static PairB load_pairs(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static void interleave(uint32_t* to, const uint16_t* even, const uint16_t* odd) {
        interleave(to, load_lanes(even), load_lanes(odd));
    }
    static void interleave(uint32_t* to, const uint16_t* even, const uint16_t* odd, int64_t count) {
        interleave(to, _mm256_maskz_loadu_epi16(first(count), even), _mm256_maskz_loadu_epi16(first(count), odd));
    }
    static void transpose_pairs(
        uint32_t* to, int64_t width, const uint16_t* from, int64_t stride, int64_t lines, int64_t k, int64_t pairs
    ) {
        for (; k > 0; k -= 32, pairs -= 16, from += 32, to += 16 * width) {
            const __mmask32 deep = k < 32 ? (1u << k) - 1 : 0xffffffff;
            __m512i r[16];
            for (int i = 0; i < 16; ++i) {
                r[i] = i < lines ? _mm512_maskz_loadu_epi16(deep, from + i * stride) : _mm512_setzero_si512();
            }
            transpose_16x16_u32(r);
            for (int64_t q = 0; q < std::min<int64_t>(16, pairs); ++q) _mm512_storeu_si512(to + q * width, r[q]);
        }
    }
    static PairA broadcast_pair(const uint16_t* p) {
        int pair;
        __builtin_memcpy(&pair, p, sizeof(pair));
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static Acc add_products(Acc acc, PairA a, PairB b) { return _mm512_dpbf16_ps(acc, a, b); }
    // to[r][c] = a[r] · b[c]: sums of sixteen lanes, then of these.
    static void inner_products(
        const uint16_t* const (&a)[4], const uint16_t* const (&b)[4], int64_t k, float* to, int64_t stride
    ) {
        Acc acc[4][4];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) acc[i / 4][i % 4] = zero();
        for (int64_t q = 0; q < k; q += 32) {
            const __mmask32 deep = k - q < 32 ? (1u << (k - q)) - 1 : 0xffffffff;
            __m512bh x[4], y[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                x[i] = (__m512bh)_mm512_maskz_loadu_epi16(deep, a[i] + q);
                y[i] = (__m512bh)_mm512_maskz_loadu_epi16(deep, b[i] + q);
            }
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) acc[i / 4][i % 4] = add_products(acc[i / 4][i % 4], x[i / 4], y[i % 4]);
        }
        Acc row[4];  // lanes 4 l to 4 l + 3: of the four c, the sums of a quarter of the lanes
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            const Acc low = halves_added(acc[r][0], acc[r][1]), high = halves_added(acc[r][2], acc[r][3]);
            const __m512d l = _mm512_castps_pd(low), h = _mm512_castps_pd(high);
            row[r] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(l, h)), _mm512_castpd_ps(_mm512_unpackhi_pd(l, h)));
        }
        const Acc sums = quarters_added(quarters_added(row[0], row[1]), quarters_added(row[2], row[3]));
        _mm_storeu_ps(to, _mm512_castps512_ps128(sums));
        _mm_storeu_ps(to + stride, _mm512_extractf32x4_ps(sums, 1));
        _mm_storeu_ps(to + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
        _mm_storeu_ps(to + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
    }
    static void round(uint16_t* p, Acc v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
    }
    static void round(uint16_t* p, Acc v, int64_t count) {
        _mm256_mask_storeu_epi16(p, first(count), (__m256i)_mm512_cvtneps_pbh(v));
    }

  private:
    // In every quarter (a₀ + a₂, b₀ + b₂, a₁ + a₃, b₁ + b₃).
    static Acc halves_added(Acc a, Acc b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
    // Quarters 0 + 1 and 2 + 3 of a, then of b.
    static Acc quarters_added(Acc a, Acc b) {
        return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    static __m256i load_lanes(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void interleave(uint32_t* to, __m256i even, __m256i odd) {
        const __m512i order = _mm512_setr_epi32(
            0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008, 0x190009,
            0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f
        );
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
    }
};

}  // namespace
}  // namespace muon_kernels::cpu
