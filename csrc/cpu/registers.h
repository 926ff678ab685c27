// A tile of sums in vector registers, for pairs.h and floats.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "panels.h"

namespace muon_kernels::cpu {
namespace {

template <class M, int ROWS, int VECTORS>
void multiply_tile(
    const typename M::A* a, int64_t a_stride, int64_t k, const typename M::B* panel, int64_t panel_cols, float* tile,
    int64_t tile_stride, bool accumulate
) {
    using I = typename M::Lanes;
    typename I::Acc acc[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            acc[r][v] = accumulate ? I::load(tile + r * tile_stride + v * I::kLanes) : I::zero();
        }
    }
    M::add_products(acc, a, a_stride, k, panel, panel_cols);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) I::store(tile + r * tile_stride + v * I::kLanes, acc[r][v]);
    }
}

template <class M, int VECTORS, int... ROWS>
MultiplyTile<M> pick_rows(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static constexpr MultiplyTile<M> table[] = {multiply_tile<M, ROWS + 1, VECTORS>...};
    return table[rows - 1];
}

template <class M>
MultiplyTile<M> pick_tile(int64_t rows, int64_t width) {
    constexpr int kLanes = M::Lanes::kLanes;
    return width == kLanes ? pick_rows<M, 1>(rows, std::make_integer_sequence<int, std::max(kLanes, M::kRows)>{})
                           : pick_rows<M, M::kVectors>(rows, std::make_integer_sequence<int, M::kRows>{});
}

}  // namespace
}  // namespace muon_kernels::cpu
