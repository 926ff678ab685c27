#include "avx512.h"
#include "floats.h"
#include "kernels_of.h"

namespace muon_kernels::cpu {
namespace {

using Multiply = Floats<Avx512, 14, 2>;  // 28 accumulators, 2 of b, 1 of a: 31 of 32 registers

}  // namespace

const Kernels kAvx512Kernels = kernels_of<Multiply>();

}  // namespace muon_kernels::cpu
