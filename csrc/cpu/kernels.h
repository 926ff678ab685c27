// What one instruction set provides. Each is compiled in its own translation unit with its own flags, so these units
// hold no code that another unit could pick up (no standard containers, everything in an unnamed namespace).
#pragma once

#include "../muon_kernels.h"

namespace muon_kernels::cpu {

// Work is cut into independent tasks; the cut depends on shapes alone, so results do not depend on the thread count.
struct Kernels {
    int64_t (*product_tasks)(const Product&);
    int64_t (*product_scratch_bytes)(const Product&);
    void (*product_task)(const Product&, int64_t task, void* scratch);

    int64_t (*momentum_blocks)(const MomentumUpdate&);  // a matrix
    void (*momentum_block)(const MomentumUpdate&, int64_t matrix, int64_t block, double* sum_of_squares);
    double (*rescale)(const Stack& x, int64_t matrix, int exponent);

    int64_t (*apply_blocks)(const ApplyUpdate&);  // a matrix
    void (*apply_block)(const ApplyUpdate&, const ApplyOptions&, int64_t matrix, int64_t block);
};

extern const Kernels kAmxKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;

}  // namespace muon_kernels::cpu
