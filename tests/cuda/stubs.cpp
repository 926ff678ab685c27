// The verbs of muon_kernels::cuda that these tests do not build; python/bindings.cpp wants them all.
#include "muon_kernels.h"

namespace muon_kernels::cuda {

constexpr Result kAbsent = {Status::invalid_argument, 0};

Result products(const Product*, int, DType, Stream) { return kAbsent; }
Result fused_step(const FusedStep&, const ApplyOptions&, Stream) { return kAbsent; }
int64_t fused_rows() { return 0; }

}  // namespace muon_kernels::cuda
