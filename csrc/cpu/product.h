// The batched bf16 product, written once over an instruction set `I` (see kernels_*.cpp):
//
//   I::kLanes, I::kRows, I::kVectors   a register tile has kRows rows of kVectors vectors of kLanes floats, or, where
//                                      the result is narrow, kLanes rows of one
//   I::Acc                             the fp32 accumulator: zero, broadcast, load, store, multiply, add,
//                                      multiply_add(a, b, c) = a b + c, widen and round from and to bf16
//   I::interleave                      kLanes pairs (k, k+1) from rows k and k+1 of b
//   I::PairB, I::load_pairs            kLanes such pairs
//   I::PairA, I::broadcast_pair        one pair of a, in every lane
//   I::add_products(acc, a, b)
//
// A task is one block of columns of one matrix: it packs its part of b once and runs all rows of a over it, reading a
// in place. A symmetric result starts at the block's own row and is mirrored from the finished lower triangle, so that
// it is symmetric to the last bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bf16.h"
#include "kernels.h"
#include "transpose.h"

namespace muon_kernels::cpu {
namespace {

constexpr int64_t kBlockK = 1024;  // keeps a packed block of b in half of a 1 MiB second-level cache
constexpr int64_t kBlockN = 192;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class I, int ROWS, int VECTORS>
void multiply_tile(
    const uint16_t* a, int64_t a_stride, int64_t k, const uint32_t* panel, float* tile, int64_t tile_stride,
    bool accumulate
) {
    typename I::Acc acc[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) {
            acc[r][v] = accumulate ? I::load(tile + r * tile_stride + v * I::kLanes) : I::zero();
        }
    }
    // Three rows share one pointer: fourteen would not fit the general registers.
    constexpr int kPointers = (ROWS + 2) / 3;
    const uint16_t* row[kPointers];
    for (int p = 0; p < kPointers; ++p) row[p] = a + 3 * p * a_stride;
    const int64_t pairs = k / 2;
#pragma GCC unroll 2
    for (int64_t q = 0; q < pairs; ++q) {
        typename I::PairB b[VECTORS];
        for (int v = 0; v < VECTORS; ++v) b[v] = I::load_pairs(panel + v * I::kLanes);
        panel += VECTORS * I::kLanes;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            typename I::PairA x = I::broadcast_pair(row[r / 3] + (r % 3) * a_stride);
            for (int v = 0; v < VECTORS; ++v) acc[r][v] = I::add_products(acc[r][v], x, b[v]);
        }
        for (int p = 0; p < kPointers; ++p) row[p] += 2;
    }
    if (k & 1) {  // the last element of a row has no partner: what follows it in memory is not ours to read
        for (int r = 0; r < ROWS; ++r) {
            uint16_t last[2] = {row[r / 3][(r % 3) * a_stride], 0};
            typename I::PairA x = I::broadcast_pair(last);
            for (int v = 0; v < VECTORS; ++v) {
                acc[r][v] = I::add_products(acc[r][v], x, I::load_pairs(panel + v * I::kLanes));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) I::store(tile + r * tile_stride + v * I::kLanes, acc[r][v]);
    }
}

using MultiplyTile = void (*)(const uint16_t*, int64_t, int64_t, const uint32_t*, float*, int64_t, bool);

template <class I, int VECTORS, int... ROWS>
MultiplyTile pick_rows(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static constexpr MultiplyTile table[] = {multiply_tile<I, ROWS + 1, VECTORS>...};
    return table[rows - 1];
}

template <class I>
MultiplyTile pick_tile(int64_t rows, int64_t width) {
    return width == I::kLanes ? pick_rows<I, 1>(rows, std::make_integer_sequence<int, std::max(I::kLanes, I::kRows)>{})
                              : pick_rows<I, I::kVectors>(rows, std::make_integer_sequence<int, I::kRows>{});
}

// Columns of a panel. Small symmetric results take narrow ones, which waste less beyond the diagonal.
template <class I>
int64_t panel_width(const Product& p) {
    return p.out.cols <= I::kLanes || (p.symmetric && p.out.cols <= 8 * I::kLanes) ? I::kLanes
                                                                                   : I::kVectors * I::kLanes;
}

// The last panel of a block may be narrower: its `cols` columns in whole vectors.
template <class I>
int64_t padded(int64_t cols, int64_t width) {
    return cols <= I::kLanes ? I::kLanes : width;
}

// Rows k0..k0+k of columns j0..j0+cols of b as pairs, one panel after another: with `width` columns to a panel,
// panel[q][j] = (b[k0 + 2q][j], b[k0 + 2q + 1][j]), zero outside b.
template <class I>
void pack_block(
    const Product& p, const uint16_t* b, int64_t k0, int64_t k, int64_t j0, int64_t cols, uint32_t* packed
) {
    const int64_t panel_cols = panel_width<I>(p), pairs = ceil_div(k, 2), stride = p.b.row_stride;
    const auto pack_pair = [=](int64_t j, int64_t q) {  // of column j: any place, any edge
        const int64_t at = j0 + j, k1 = k0 + 2 * q;
        if (j >= cols) return uint32_t{0};
        const auto element = [=](int64_t kk) -> uint32_t {
            return p.b_transposed ? b[at * stride + kk] : b[kk * stride + at];
        };
        return element(k1) | (2 * q + 1 < k ? element(k1 + 1) << 16 : 0);
    };
    for (int64_t j = 0; j < cols; j += panel_cols) {
        const int64_t width = padded<I>(cols - j, panel_cols);
        uint32_t* panel = packed + j * pairs;
        if (p.b_transposed) {  // a pair is contiguous in a row of b: a transposition of 32-bit words
            for (int64_t jj = 0; jj < width; jj += 8) {
                const int64_t whole = j + jj + 8 <= cols ? (k / 2) & ~int64_t{7} : 0;
                const uint16_t* from = b + (j0 + j + jj) * stride + k0;
                for (int64_t q = 0; q < whole; q += 8) {
                    transpose_8x8_pairs(from + 2 * q, stride, panel + q * width + jj, width);
                }
                for (int64_t q = whole; q < pairs; ++q) {
                    for (int64_t c = jj; c < jj + 8; ++c) panel[q * width + c] = pack_pair(j + c, q);
                }
            }
        } else if (cols - j < panel_cols) {
            for (int64_t q = 0; q < pairs; ++q) {
                for (int64_t c = 0; c < width; ++c) panel[q * width + c] = pack_pair(j + c, q);
            }
        }
    }
    if (p.b_transposed) return;
    // Whole panels together, along the rows of b: panel by panel every cache line would be a miss of its own.
    static constexpr uint16_t kNothing[I::kLanes] = {};
    for (int64_t q = 0; q < pairs; ++q) {
        const uint16_t* even = b + (k0 + 2 * q) * stride + j0;
        const bool paired = 2 * q + 1 < k;
        for (int64_t j = 0; j + panel_cols <= cols; j += panel_cols) {
            uint32_t* to = packed + j * pairs + q * panel_cols;
            for (int64_t v = 0; v < panel_cols; v += I::kLanes) {
                I::interleave(to + v, even + j + v, paired ? even + stride + j + v : kNothing);
            }
        }
    }
}

inline uint16_t* row_of(const Stack& s, int64_t matrix, int64_t row) {
    return s.data + matrix * s.batch_stride + row * s.row_stride;
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

// What a result is made of beside the product itself. Compile-time, so that the loop over a tile keeps all that it
// needs in registers: for small matrices it costs as much as the product. Two frequent cases read a matrix once that
// stands in two places: kSquare is b A + c A² (a, b and c are one), kUpdate is a X + B X (b and c are one).
enum Addend : int { kADiagonal = 1, kBDiagonal = 2, kC = 4, kSquare = 8, kUpdate = 16 };

// Rows i0.. of columns j0.. of the result from their fp32 sums.
template <class I, int ADDENDS>
void finish_tile(
    const Product& p, int64_t matrix, int64_t i0, int64_t rows, int64_t j0, int64_t cols, const float* tile,
    int64_t tile_stride
) {
    using Acc = typename I::Acc;
    constexpr bool kA = ADDENDS & (kADiagonal | kSquare | kUpdate), kB = ADDENDS & (kBDiagonal | kSquare);
    const float once = p.scale ? p.scale[matrix] : 1.0f, scale = p.b_transposed ? once * once : once;
    const float alpha = p.alpha * scale, beta = p.beta * scale;
    const Acc alphas = I::broadcast(alpha), betas = I::broadcast(beta);
    const int64_t m = p.out.rows, n = p.out.cols, end = j0 + cols;
    // Locals: what is written could alias *p for all that the compiler knows.
    const Stack a = p.a, b = p.b_transposed ? p.a : p.b, c = p.c, out = p.out;
    const float* a_diagonal = p.a_diagonal + matrix * m;
    const float* b_diagonal = p.b_diagonal + matrix * n;
    for (int64_t i = i0; i < i0 + rows; ++i) {
        const float* sums = tile + (i - i0) * tile_stride - j0;
        const uint16_t *a_row = row_of(a, matrix, i), *b_row = row_of(b, matrix, i), *c_row = row_of(c, matrix, i);
        uint16_t* out_row = row_of(out, matrix, i);
        const float a_ii = kA ? a_diagonal[i] : 0.0f;
        const Acc a_iis = I::broadcast(a_ii), factor = I::broadcast(alpha * a_ii + beta);
        const auto finish = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
            Acc value = I::load(sums + j);
            if (ADDENDS & kSquare) {
                const Acc both = I::add(a_iis, read_float<I>(b_diagonal + j, count));
                const Acc factors = I::multiply_add(alphas, both, betas);
                value = I::multiply_add(factors, read_bf16<I>(a_row + j, count), I::multiply(alphas, value));
            } else if (ADDENDS & kUpdate) {
                value = I::multiply_add(factor, read_bf16<I>(b_row + j, count), I::multiply(alphas, value));
            } else {
                if (kA) value = I::multiply_add(a_iis, read_bf16<I>(b_row + j, count), value);
                if (kB) {
                    const Acc b_jj = read_float<I>(b_diagonal + j, count);
                    value = I::multiply_add(read_bf16<I>(a_row + j, count), b_jj, value);
                }
                value = I::multiply(alphas, value);
                if (ADDENDS & kC) value = I::multiply_add(betas, read_bf16<I>(c_row + j, count), value);
            }
            write_bf16<I>(out_row + j, count, value);
        };
        int64_t j = j0;
        for (; j + I::kLanes <= end; j += I::kLanes) finish(j, I::kLanes);
        if (j < end) finish(j, end - j);
    }
    // The elements on the diagonal again, with what only they get.
    if (!(kA && kB) && !p.gamma && !p.out_diagonal && !p.c_diagonal) return;
    for (int64_t i = std::max(i0, j0); i < std::min(i0 + rows, end); ++i) {
        float value = tile[(i - i0) * tile_stride + i - j0];
        if (kA) value += a_diagonal[i] * to_float(row_of(b, matrix, i)[i]);
        if (kB) value += b_diagonal[i] * to_float(row_of(a, matrix, i)[i]);
        value = alpha * (kA && kB ? value + a_diagonal[i] * b_diagonal[i] : value) + p.gamma * scale;
        if (ADDENDS & (kC | kSquare | kUpdate)) value += beta * to_float(row_of(c, matrix, i)[i]);
        if (p.c_diagonal) value += beta * p.c_diagonal[matrix * m + i];
        uint16_t* element = row_of(out, matrix, i) + i;
        *element = to_bf16(value);
        if (p.out_diagonal) p.out_diagonal[matrix * m + i] = value - to_float(*element);
    }
}

using FinishTile = void (*)(const Product&, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, int64_t);

template <class I, int... ADDENDS>
FinishTile pick_finish(const Product& p, std::integer_sequence<int, ADDENDS...>) {
    static constexpr FinishTile table[] = {finish_tile<I, ADDENDS>...};
    if (p.b_transposed && p.a_diagonal && p.b_diagonal && p.c.data == p.a.data) return finish_tile<I, kSquare>;
    if (!p.b_transposed && p.a_diagonal && !p.b_diagonal && p.c.data == p.b.data) return finish_tile<I, kUpdate>;
    return table[(p.a_diagonal ? kADiagonal : 0) | (p.b_diagonal ? kBDiagonal : 0) | (p.c.data ? kC : 0)];
}

// The upper triangle of columns j0..j0+cols from the lower one.
inline void mirror(const Stack& s, int64_t matrix, int64_t j0, int64_t cols) {
    uint16_t* base = s.data + matrix * s.batch_stride;
    const int64_t stride = s.row_stride;
    for (int64_t j = j0; j < j0 + cols; j += 16) {
        const int64_t end = std::min(j + 16, j0 + cols);
        mirror_16x16_u16(base + j * stride + j, stride, end - j);
        transpose_u16(base + end * stride + j, stride, s.rows - end, end - j, base + j * stride + end, stride);
    }
}

inline int64_t column_block(const Product& p) { return std::min(p.out.cols, kBlockN); }

inline int64_t column_blocks(const Product& p) { return ceil_div(p.out.cols, std::max<int64_t>(column_block(p), 1)); }

inline int64_t product_tasks(const Product& p) { return p.out.batch * column_blocks(p); }

inline int64_t packed_words(const Product& p) {
    // 64 columns of slack: the last panel of a block is padded to whole vectors
    return (column_block(p) + 64) * ceil_div(std::min(p.a.cols, kBlockK), 2);
}

inline int64_t product_scratch_bytes(const Product& p) {
    int64_t sums = p.a.cols > kBlockK ? p.out.rows * (kBlockN + 64) : 64 * 64;
    return 4 * (packed_words(p) + 16 + sums);
}

// Columns j0..j0+cols of a sum, see Product without b.
template <class I>
void add_columns(const Product& p, int64_t matrix, int64_t j0, int64_t cols) {
    const float scale = p.scale ? p.scale[matrix] : 1.0f, alpha = p.alpha * scale, beta = p.beta * scale;
    const typename I::Acc alphas = I::broadcast(alpha), betas = I::broadcast(beta);
    const bool on_diagonal = p.gamma || p.a_diagonal || p.c_diagonal || p.out_diagonal;
    for (int64_t i = 0; i < p.out.rows; ++i) {
        const uint16_t* a = row_of(p.a, matrix, i) + j0;
        const uint16_t* c = p.c.data ? row_of(p.c, matrix, i) + j0 : nullptr;
        uint16_t* out = row_of(p.out, matrix, i) + j0;
        const int64_t d = i - j0, at = matrix * p.out.rows + i;
        float value = 0;
        if (on_diagonal && d >= 0 && d < cols) {
            value = alpha * (to_float(a[d]) + (p.a_diagonal ? p.a_diagonal[at] : 0.0f)) + p.gamma * scale;
            if (c) value += beta * (to_float(c[d]) + (p.c_diagonal ? p.c_diagonal[at] : 0.0f));
        }
        for (int64_t j = 0; j < cols; j += I::kLanes) {
            const int64_t count = std::min<int64_t>(I::kLanes, cols - j);
            typename I::Acc sum = I::multiply(alphas, read_bf16<I>(a + j, count));
            if (c) sum = I::multiply_add(betas, read_bf16<I>(c + j, count), sum);
            write_bf16<I>(out + j, count, sum);
        }
        if (on_diagonal && d >= 0 && d < cols) {
            out[d] = to_bf16(value);
            if (p.out_diagonal) p.out_diagonal[at] = value - to_float(out[d]);
        }
    }
}

template <class I>
void product_task(const Product& p, int64_t task, void* scratch) {
    const int64_t blocks = column_blocks(p), matrix = task / blocks;
    const int64_t j0 = task % blocks * column_block(p);
    const int64_t cols = std::min(column_block(p), p.out.cols - j0);
    if (!p.has_b()) return add_columns<I>(p, matrix, j0, cols);
    const int64_t i_begin = p.symmetric ? j0 : 0, m = p.out.rows, k = p.a.cols;
    const int64_t panel_cols = panel_width<I>(p);

    uint32_t* packed = static_cast<uint32_t*>(scratch);
    float* sums = reinterpret_cast<float*>(packed + ceil_div(packed_words(p), 16) * 16);
    const bool chunked = k > kBlockK;
    const int64_t sums_stride = chunked ? ceil_div(cols, panel_cols) * panel_cols : panel_cols;
    const uint16_t* b = p.b.data + matrix * p.b.batch_stride;

    const FinishTile finish = pick_finish<I>(p, std::make_integer_sequence<int, 8>{});
    // Equal row tiles: a short last one would leave the multipliers waiting for its few accumulators.
    const int64_t tiles = ceil_div(m - i_begin, panel_cols == I::kLanes ? I::kLanes : I::kRows);

    for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kBlockK) {
        const int64_t depth = std::min(kBlockK, k - k0);
        const int64_t panel_words = ceil_div(depth, 2) * panel_cols;
        pack_block<I>(p, b, k0, depth, j0, cols, packed);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t i0 = i_begin + (m - i_begin) * t / tiles, i1 = i_begin + (m - i_begin) * (t + 1) / tiles;
            for (int64_t j = 0; j < cols; j += panel_cols) {
                if (p.symmetric && i1 <= j0 + j) break;
                const int64_t width = std::min(panel_cols, cols - j);
                MultiplyTile multiply = pick_tile<I>(i1 - i0, padded<I>(width, panel_cols));
                float* tile = chunked ? sums + (i0 - i_begin) * sums_stride + j : sums;
                const uint32_t* panel = packed + j / panel_cols * panel_words;
                multiply(row_of(p.a, matrix, i0) + k0, p.a.row_stride, depth, panel, tile, sums_stride, k0 > 0);
                if (k0 + depth >= k) finish(p, matrix, i0, i1 - i0, j0 + j, width, tile, sums_stride);
            }
        }
    }
    if (p.symmetric) mirror(p.out, matrix, j0, cols);
}

}  // namespace
}  // namespace muon_kernels::cpu
