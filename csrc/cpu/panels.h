// What all ways to multiply (pairs.h, floats.h, tiles.h) know of a product's layout.
#pragma once

#include <cstdint>

namespace muon_kernels::cpu {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows 0..k of columns 0..cols of b, which lies transposed or not. Packed, it is one panel of columns after another.
struct Block {
    const uint16_t* data;
    int64_t stride;
    bool transposed;
    int64_t k;
    int64_t cols;
};

// A tile of a, made ready, and the distance of its rows.
template <class A>
struct TileOfA {
    const A* data;
    int64_t stride;
};

// A tile of a and its stride, k, a panel of b and its columns, a tile of sums and its stride, and whether to add to
// what is there.
template <class M>
using MultiplyTile =
    void (*)(const typename M::A*, int64_t, int64_t, const typename M::B*, int64_t, float*, int64_t, bool);

struct NoSession {};

// The last panel of a block may be narrower: its `cols` columns in whole vectors.
template <class I>
int64_t padded(int64_t cols, int64_t width) {
    return cols <= I::kLanes ? I::kLanes : width;
}

// Up to a vector of a row: what lies beyond a ragged end is not ours to touch.
template <class I>
typename I::Acc read_bf16(const uint16_t* from, int64_t count) {
    return count >= I::kLanes ? I::widen(from) : I::widen(from, count);
}

template <class I>
void write_bf16(uint16_t* to, int64_t count, typename I::Acc value) {
    if (count >= I::kLanes) return I::round(to, value);
    I::round(to, value, count);
}

}  // namespace
}  // namespace muon_kernels::cpu
