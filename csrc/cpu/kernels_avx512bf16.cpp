#include "avx512.h"
#include "elementwise.h"
#include "pairs.h"
#include "product.h"

namespace muon_kernels::cpu {
namespace {

struct Avx512Bf16 : Avx512 {
    using PairA = __m512bh;
    using PairB = __m512bh;

    static PairB load_pairs(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static void interleave(uint32_t* to, const uint16_t* even, const uint16_t* odd) {
        const __m512i order = _mm512_setr_epi32(
            0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008, 0x190009,
            0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f
        );
        __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
        both = _mm512_inserti64x4(both, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)), 1);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
    }
    static PairA broadcast_pair(const uint16_t* p) {
        int pair;
        __builtin_memcpy(&pair, p, sizeof(pair));
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static Acc add_products(Acc acc, PairA a, PairB b) { return _mm512_dpbf16_ps(acc, a, b); }
    static void round(uint16_t* p, Acc v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
    }
    static void round(uint16_t* p, Acc v, int64_t count) {
        _mm256_mask_storeu_epi16(p, first(count), (__m256i)_mm512_cvtneps_pbh(v));
    }
};

}  // namespace

const Kernels kAvx512Bf16Kernels = {
    product_tasks,
    product_scratch_bytes<Pairs<Avx512Bf16>>,
    product_task<Pairs<Avx512Bf16>>,
    momentum_blocks,
    momentum_block,
    rescale,
    apply_blocks,
    apply_block,
};

}  // namespace muon_kernels::cpu
