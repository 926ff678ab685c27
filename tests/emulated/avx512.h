// What csrc/cpu uses of AVX-512F, BW, DQ, VL and BF16, lane by lane in plain code: for tests on processors without
// them. CMakeLists.txt includes it before all else where MUON_KERNELS_EMULATED is on. Meanings are those of Intel's
// intrinsics guide, of `_mm512_dpbf16_ps` those of the Software Developer's Manual, VDPBF16PS.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace muon_kernels::emulated {
namespace {

template <class E, class V>
E lane(const V& vector, int i) {
    E element;
    std::memcpy(&element, reinterpret_cast<const char*>(&vector) + i * sizeof(E), sizeof(E));
    return element;
}

// The vector whose lanes of type E are f(0), f(1) ...
template <class V, class E, class F>
V each(F f) {
    E lanes[sizeof(V) / sizeof(E)];
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(E)); ++i) lanes[i] = f(i);
    V vector;
    std::memcpy(&vector, lanes, sizeof(V));
    return vector;
}

template <class To, class From>
To bits(const From& from) {
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class F>
__m512i words(F f) {
    return each<__m512i, uint32_t>(f);
}

inline __m512 loadu_ps(const void* p) { return bits<__m512>(*static_cast<const char (*)[64]>(p)); }
inline __m512i loadu_si512(const void* p) { return bits<__m512i>(*static_cast<const char (*)[64]>(p)); }
inline void storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, 64); }
inline void storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, 64); }

inline __m512 set1_ps(float x) {
    return each<__m512, float>([=](int) { return x; });
}
inline __m512i set1_epi32(int x) {
    return words([=](int) { return x; });
}
template <class... Words>
__m512i setr_epi32(Words... values) {
    const int lanes[] = {values...};
    static_assert(sizeof(lanes) == 64);
    return bits<__m512i>(lanes);
}
inline __m512 setzero_ps() { return set1_ps(0); }
inline __m512i setzero_si512() { return set1_epi32(0); }

// What lies outside the mask is not touched.
template <class V, class E, class Mask>
V load(Mask mask, const void* p) {
    return each<V, E>([=](int i) { return mask >> i & 1 ? static_cast<const E*>(p)[i] : E{}; });
}
inline __m512 maskz_loadu_ps(__mmask16 mask, const void* p) { return load<__m512, float>(mask, p); }
inline __m512i maskz_loadu_epi16(__mmask32 mask, const void* p) { return load<__m512i, uint16_t>(mask, p); }
inline __m256i maskz_loadu_epi16_256(__mmask16 mask, const void* p) { return load<__m256i, uint16_t>(mask, p); }
inline void mask_storeu_epi16_256(void* p, __mmask16 mask, __m256i v) {
    for (int i = 0; i < 16; ++i) {
        if (mask >> i & 1) static_cast<uint16_t*>(p)[i] = lane<uint16_t>(v, i);
    }
}

inline __m512 mul_ps(__m512 a, __m512 b) {
    return each<__m512, float>([&](int i) { return lane<float>(a, i) * lane<float>(b, i); });
}
inline __m512 add_ps(__m512 a, __m512 b) {
    return each<__m512, float>([&](int i) { return lane<float>(a, i) + lane<float>(b, i); });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return each<__m512, float>([&](int i) {
        return std::fma(lane<float>(a, i), lane<float>(b, i), lane<float>(c, i));
    });
}
inline __m512i add_epi32(__m512i a, __m512i b) {
    return words([&](int i) { return lane<uint32_t>(a, i) + lane<uint32_t>(b, i); });
}
inline __m512i and_si512(__m512i a, __m512i b) {
    return words([&](int i) { return lane<uint32_t>(a, i) & lane<uint32_t>(b, i); });
}
inline __m512i slli_epi32(__m512i v, int count) {
    return words([&](int i) { return lane<uint32_t>(v, i) << count; });
}
inline __m512i srli_epi32(__m512i v, int count) {
    return words([&](int i) { return lane<uint32_t>(v, i) >> count; });
}
inline __m512i mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i v) {
    return words([&](int i) { return lane<uint32_t>(mask >> i & 1 ? v : otherwise, i); });
}
template <int WHAT>
__mmask16 compare(__m512 a, __m512 b) {
    static_assert(WHAT == _CMP_UNORD_Q, "kernels ask for no other");
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) mask |= unsigned{std::isunordered(lane<float>(a, i), lane<float>(b, i))} << i;
    return static_cast<__mmask16>(mask);
}
inline __m512i cvtepu16_epi32(__m256i v) {
    return words([&](int i) { return uint32_t{lane<uint16_t>(v, i)}; });
}
inline __m256i cvtepi32_epi16(__m512i v) {
    return each<__m256i, uint16_t>([&](int i) { return static_cast<uint16_t>(lane<uint32_t>(v, i)); });
}

// From each quarter, low or high lanes of a and b in turns.
template <class E, int HIGH, class V>
V unpack(V a, V b) {
    constexpr int kQuarter = 16 / sizeof(E);
    return each<V, E>([&](int i) {
        return lane<E>(i % 2 ? b : a, i / kQuarter * kQuarter + HIGH * kQuarter / 2 + i % kQuarter / 2);
    });
}
// Two quarters of a, then two of b.
template <class V>
V shuffle_quarters(V a, V b, int order) {
    return each<V, uint32_t>([&](int i) {
        return lane<uint32_t>(i < 8 ? a : b, 4 * (order >> 2 * (i / 4) & 3) + i % 4);
    });
}
inline __m512i permutexvar_epi16(__m512i order, __m512i v) {
    return each<__m512i, uint16_t>([&](int i) { return lane<uint16_t>(v, lane<uint16_t>(order, i) & 31); });
}
inline __m512i castsi256_si512(__m256i v) {  // what the upper half holds is undefined
    __m512i wide = set1_epi32(-1);
    std::memcpy(&wide, &v, 32);
    return wide;
}
inline __m512i inserti64x4(__m512i v, __m256i half, int at) {
    std::memcpy(reinterpret_cast<char*>(&v) + 32 * at, &half, 32);
    return v;
}
inline __m128 extractf32x4_ps(__m512 v, int at) { return lane<__m128>(v, at); }

// Subnormal numbers are zeros to the instructions of bf16, as operands and as results.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float from_bf16(uint16_t x) { return flushed(bits<float>(uint32_t{x} << 16)); }
inline uint16_t rounded(float x) {
    const uint32_t word = bits<uint32_t>(flushed(x));
    if (std::isnan(x)) return static_cast<uint16_t>(word >> 16 | 0x40);
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline float multiply_add(uint16_t a, uint16_t b, float c) {
    return flushed(std::fma(from_bf16(a), from_bf16(b), flushed(c)));
}
inline __m256i cvtneps_pbh(__m512 v) {
    return each<__m256i, uint16_t>([&](int i) { return rounded(lane<float>(v, i)); });
}
template <class Pairs>
__m512 dpbf16_ps(__m512 c, Pairs a, Pairs b) {
    return each<__m512, float>([&](int i) {
        const auto of = [=](const Pairs& pairs, int odd) { return lane<uint16_t>(pairs, 2 * i + odd); };
        return multiply_add(of(a, 0), of(b, 0), multiply_add(of(a, 1), of(b, 1), lane<float>(c, i)));
    });
}

}  // namespace
}  // namespace muon_kernels::emulated

#undef _mm512_setr_epi32  // GCC's is a macro too, as without -O are those that take constants

#define _mm512_add_epi32 muon_kernels::emulated::add_epi32
#define _mm512_add_ps muon_kernels::emulated::add_ps
#define _mm512_and_si512 muon_kernels::emulated::and_si512
#define _mm512_castpd_ps muon_kernels::emulated::bits<__m512, __m512d>
#define _mm512_castps512_ps128(v) muon_kernels::emulated::extractf32x4_ps(v, 0)
#define _mm512_castps_pd muon_kernels::emulated::bits<__m512d, __m512>
#define _mm512_castps_si512 muon_kernels::emulated::bits<__m512i, __m512>
#define _mm512_castsi256_si512 muon_kernels::emulated::castsi256_si512
#define _mm512_castsi512_ps muon_kernels::emulated::bits<__m512, __m512i>
#define _mm512_cmp_ps_mask(a, b, what) muon_kernels::emulated::compare<what>(a, b)
#define _mm512_cvtepi32_epi16 muon_kernels::emulated::cvtepi32_epi16
#define _mm512_cvtepu16_epi32 muon_kernels::emulated::cvtepu16_epi32
#define _mm512_cvtneps_pbh muon_kernels::emulated::cvtneps_pbh
#define _mm512_dpbf16_ps muon_kernels::emulated::dpbf16_ps
#define _mm512_extractf32x4_ps muon_kernels::emulated::extractf32x4_ps
#define _mm512_fmadd_ps muon_kernels::emulated::fmadd_ps
#define _mm512_inserti64x4 muon_kernels::emulated::inserti64x4
#define _mm512_loadu_ps muon_kernels::emulated::loadu_ps
#define _mm512_loadu_si512 muon_kernels::emulated::loadu_si512
#define _mm512_mask_mov_epi32 muon_kernels::emulated::mask_mov_epi32
#define _mm512_maskz_loadu_epi16 muon_kernels::emulated::maskz_loadu_epi16
#define _mm512_maskz_loadu_ps muon_kernels::emulated::maskz_loadu_ps
#define _mm512_mul_ps muon_kernels::emulated::mul_ps
#define _mm512_permutexvar_epi16 muon_kernels::emulated::permutexvar_epi16
#define _mm512_set1_epi32 muon_kernels::emulated::set1_epi32
#define _mm512_set1_ps muon_kernels::emulated::set1_ps
#define _mm512_setr_epi32 muon_kernels::emulated::setr_epi32
#define _mm512_setzero_ps muon_kernels::emulated::setzero_ps
#define _mm512_setzero_si512 muon_kernels::emulated::setzero_si512
#define _mm512_shuffle_f32x4 muon_kernels::emulated::shuffle_quarters
#define _mm512_shuffle_i32x4 muon_kernels::emulated::shuffle_quarters
#define _mm512_slli_epi32 muon_kernels::emulated::slli_epi32
#define _mm512_srli_epi32 muon_kernels::emulated::srli_epi32
#define _mm512_storeu_ps muon_kernels::emulated::storeu_ps
#define _mm512_storeu_si512 muon_kernels::emulated::storeu_si512
#define _mm512_unpackhi_epi32 muon_kernels::emulated::unpack<uint32_t, 1>
#define _mm512_unpackhi_epi64 muon_kernels::emulated::unpack<uint64_t, 1>
#define _mm512_unpackhi_pd muon_kernels::emulated::unpack<double, 1>
#define _mm512_unpackhi_ps muon_kernels::emulated::unpack<float, 1>
#define _mm512_unpacklo_epi32 muon_kernels::emulated::unpack<uint32_t, 0>
#define _mm512_unpacklo_epi64 muon_kernels::emulated::unpack<uint64_t, 0>
#define _mm512_unpacklo_pd muon_kernels::emulated::unpack<double, 0>
#define _mm512_unpacklo_ps muon_kernels::emulated::unpack<float, 0>
#define _mm256_mask_storeu_epi16 muon_kernels::emulated::mask_storeu_epi16_256
#define _mm256_maskz_loadu_epi16 muon_kernels::emulated::maskz_loadu_epi16_256
