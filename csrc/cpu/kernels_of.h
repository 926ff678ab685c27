// The table of an instruction set's kernels; its unit includes this after what multiplies.
#pragma once

#include "elementwise.h"
#include "kernels.h"
#include "product.h"

namespace muon_kernels::cpu {
namespace {

// Multiply: how a tile is multiplied, see product.h.
template <class Multiply>
constexpr Kernels kernels_of() {
    return {
        product_tasks,          product_scratch_bytes<Multiply>,
        product_task<Multiply>, momentum_blocks,
        momentum_block,         rescale,
        apply_blocks,           apply_block,
    };
}

}  // namespace
}  // namespace muon_kernels::cpu
