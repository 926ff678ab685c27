#include "avx512bf16.h"
#include "elementwise.h"
#include "pairs.h"
#include "product.h"

namespace muon_kernels::cpu {
namespace {

using Multiply = Pairs<Avx512Bf16>;

}  // namespace

const Kernels kAvx512Bf16Kernels = {
    product_tasks,          product_scratch_bytes<Multiply>,
    product_task<Multiply>, momentum_blocks,
    momentum_block,         rescale,
    apply_blocks,           apply_block,
};

}  // namespace muon_kernels::cpu
