#include <immintrin.h>

#include "floats.h"
#include "kernels_of.h"

namespace muon_kernels::cpu {
namespace {

struct Avx2 {
    static constexpr int kLanes = 8;
    using Acc = __m256;

    static Acc zero() { return _mm256_setzero_ps(); }
    static Acc load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Acc v) { _mm256_storeu_ps(p, v); }
    static Acc broadcast(float v) { return _mm256_set1_ps(v); }
    static Acc multiply(Acc a, Acc b) { return _mm256_mul_ps(a, b); }
    static Acc add(Acc a, Acc b) { return _mm256_add_ps(a, b); }
    static Acc multiply_add(Acc a, Acc b, Acc c) { return _mm256_fmadd_ps(a, b, c); }
    static Acc widen(const uint16_t* p) {
        __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static void round(uint16_t* p, Acc v) {  // to_bf16's steps
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        sum = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
        const __m128i low = _mm256_castsi256_si128(sum), high = _mm256_extracti128_si256(sum, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
    }

    // The first `count` lanes, of less than all; zero in the others, or nothing written there.
    static Acc load(const float* p, int64_t count) {
        float lanes[kLanes] = {};
        for (int i = 0; i < count; ++i) lanes[i] = p[i];
        return load(lanes);
    }
    static Acc widen(const uint16_t* p, int64_t count) {
        uint16_t lanes[kLanes] = {};
        copy_few(lanes, p, count);
        return widen(lanes);
    }
    static void round(uint16_t* p, Acc v, int64_t count) {
        uint16_t lanes[kLanes];
        round(lanes, v);
        copy_few(p, lanes, count);
    }
};

using Multiply = Floats<Avx2, 6, 2>;  // 12 accumulators, 2 of b, 1 of a: 15 of 16 registers

}  // namespace

const Kernels kAvx2Kernels = kernels_of<Multiply>();

}  // namespace muon_kernels::cpu
