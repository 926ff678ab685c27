// What both ways to multiply (pairs.h, floats.h) know of a product's layout.
#pragma once

#include <cstdint>
#include <cstring>

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

// The last panel of a block may be narrower: its `cols` columns in whole vectors.
template <class I>
int64_t padded(int64_t cols, int64_t width) {
    return cols <= I::kLanes ? I::kLanes : width;
}

// Up to a vector of a row. A ragged end goes through the stack: what lies beyond it is not ours to touch.
template <class I>
typename I::Acc read_bf16(const uint16_t* from, int64_t count) {
    if (count >= I::kLanes) return I::widen(from);
    uint16_t lanes[I::kLanes] = {};
    std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(uint16_t));
    return I::widen(lanes);
}

template <class I>
typename I::Acc read_float(const float* from, int64_t count) {
    if (count >= I::kLanes) return I::load(from);
    float lanes[I::kLanes] = {};
    std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(float));
    return I::load(lanes);
}

template <class I>
void write_bf16(uint16_t* to, int64_t count, typename I::Acc value) {
    if (count >= I::kLanes) return I::round(to, value);
    uint16_t lanes[I::kLanes];
    I::round(lanes, value);
    std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(uint16_t));
}

}  // namespace
}  // namespace muon_kernels::cpu
