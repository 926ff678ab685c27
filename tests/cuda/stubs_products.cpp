// The verbs that do not exist yet, so that python/bindings.cpp links. Weak: a real one takes the place of its stub.
#include "muon_kernels.h"

namespace muon_kernels::cuda {

#define STUB __attribute__((weak))

STUB Result momentum_update(const MomentumUpdate&, DType, double*, Stream) { return {Status::invalid_argument, 0}; }
STUB int64_t momentum_partials(const MomentumUpdate&) { return 0; }
STUB Result apply_update(const ApplyUpdate&, const ApplyOptions&, DType, Stream) {
    return {Status::invalid_argument, 0};
}
STUB int64_t fused_rows() { return 0; }
STUB Result fused_step(const FusedStep&, const ApplyOptions&, Stream) { return {Status::invalid_argument, 0}; }
STUB const char* error_string(int32_t) { return "?"; }

}  // namespace muon_kernels::cuda
