// What the kernels of a product have in common on the device.
#pragma once

#include <cstdint>

#include "../muon_kernels.h"
#include "ptx.cuh"

namespace muon_kernels::cuda {

template <DType DTYPE>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
    return pack(low, high, DTYPE == DType::f16);
}

template <DType DTYPE>
__device__ __forceinline__ float widen(uint32_t pair, int which) {
    const float2 both = unpack(pair, DTYPE == DType::f16);
    return which ? both.y : both.x;
}

// Of an 8x8 block on the diagonal: its rounded pair as `lower` has it on and below the diagonal, as `upper`, the
// transposed block, above it. Lanes are those of a fragment.
__device__ __forceinline__ uint32_t mirrored(uint32_t lower, uint32_t upper, unsigned lane) {
    const uint32_t from_lower = lane / 4 >= lane % 4 * 2 + 1 ? 0xffffffff : lane / 4 == lane % 4 * 2 ? 0xffff : 0;
    return (lower & from_lower) | (upper & ~from_lower);
}

// Tile `index` of a lower triangle, counted along its rows. The root is only a guess: floats are not exact.
__device__ __forceinline__ void triangular_index(unsigned index, int& row, int& col) {
    unsigned r = static_cast<unsigned>((sqrtf(8.0f * index + 1.0f) - 1.0f) * 0.5f);
    while (r * (r + 1) / 2 > index) --r;
    while ((r + 1) * (r + 2) / 2 <= index) ++r;
    row = r;
    col = index - r * (r + 1) / 2;
}

}  // namespace muon_kernels::cuda
