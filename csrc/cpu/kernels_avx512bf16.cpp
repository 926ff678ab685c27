#include "avx512bf16.h"
#include "kernels_of.h"
#include "pairs.h"

namespace muon_kernels::cpu {
namespace {

using Multiply = Pairs<Avx512Bf16>;

}  // namespace

const Kernels kAvx512Bf16Kernels = kernels_of<Multiply>();

}  // namespace muon_kernels::cpu
