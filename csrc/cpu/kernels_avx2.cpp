#include <immintrin.h>

#include <utility>

#include "elementwise.h"
#include "product.h"

namespace muon_kernels::cpu {
namespace {

// No bf16 product: both halves of a pair are widened to fp32, which is exact, and multiplied in turn.
struct Avx2 {
    static constexpr int kLanes = 8, kRows = 4, kVectors = 2;  // 8 accumulators, 4 of b, 2 of a: 14 of 16 registers
    struct Pair {
        __m256 low, high;
    };
    using Acc = __m256;
    using PairA = Pair;
    using PairB = Pair;

    static Acc zero() { return _mm256_setzero_ps(); }
    static Acc load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Acc v) { _mm256_storeu_ps(p, v); }
    static Pair widen(__m256i pair) {
        return {
            _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(0xffff0000)))
        };
    }
    static void interleave(uint32_t* to, const uint16_t* even, const uint16_t* odd) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(low, high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4), _mm_unpackhi_epi16(low, high));
    }
    static PairB load_pairs(const uint32_t* p) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static PairA broadcast_pair(const uint16_t* p) {
        int pair;
        __builtin_memcpy(&pair, p, sizeof(pair));
        return widen(_mm256_set1_epi32(pair));
    }
    static Acc add_products(Acc acc, PairA a, PairB b) {
        return _mm256_fmadd_ps(a.high, b.high, _mm256_fmadd_ps(a.low, b.low, acc));
    }

    static Acc broadcast(float v) { return _mm256_set1_ps(v); }
    static Acc multiply(Acc a, Acc b) { return _mm256_mul_ps(a, b); }
    static Acc add(Acc a, Acc b) { return _mm256_add_ps(a, b); }
    static Acc multiply_add(Acc a, Acc b, Acc c) { return _mm256_fmadd_ps(a, b, c); }
    static Acc widen(const uint16_t* p) {
        __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static void round(uint16_t* p, Acc v) {
        float lanes[kLanes];
        store(lanes, v);
        for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(lanes[i]);
    }
};

}  // namespace

const Kernels kAvx2Kernels = {
    product_tasks, product_scratch_bytes, product_task<Avx2>, momentum_blocks, momentum_block,
    rescale,       apply_blocks,          apply_block,
};

}  // namespace muon_kernels::cpu
