#include "avx512.h"
#include "elementwise.h"
#include "floats.h"
#include "product.h"

namespace muon_kernels::cpu {
namespace {

using Multiply = Floats<Avx512, 14, 2>;  // 28 accumulators, 2 of b, 1 of a: 31 of 32 registers

}  // namespace

const Kernels kAvx512Kernels = {
    product_tasks,          product_scratch_bytes<Multiply>,
    product_task<Multiply>, momentum_blocks,
    momentum_block,         rescale,
    apply_blocks,           apply_block,
};

}  // namespace muon_kernels::cpu
