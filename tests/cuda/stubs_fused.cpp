// The verbs that fused_step's tests do not build, so that the bindings link.
#include "muon_kernels.h"

namespace muon_kernels::cuda {

Result products(const Product*, int, DType, Stream) { return {Status::unsupported_isa, 0}; }
Result momentum_update(const MomentumUpdate&, DType, double*, Stream) { return {Status::unsupported_isa, 0}; }
int64_t momentum_partials(const MomentumUpdate&) { return 0; }
Result apply_update(const ApplyUpdate&, const ApplyOptions&, DType, Stream) { return {Status::unsupported_isa, 0}; }
const char* error_string(int32_t) { return "launch failed"; }

}  // namespace muon_kernels::cuda
