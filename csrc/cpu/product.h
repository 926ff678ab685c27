// The batched bf16 product, written once over how it multiplies, `M` (tiles.h, pairs.h, floats.h), on vectors `I`
// (kernels_*.cpp):
//
//   I::kLanes                          floats in a vector
//   I::Acc                             such a vector: zero, broadcast, load, store, multiply, add,
//                                      multiply_add(a, b, c) = a b + c, widen and round from and to bf16; load, widen
//                                      and round also of fewer lanes, beyond which nothing is touched
//   M::kRows, M::kVectors              a register tile has kRows rows of kVectors vectors, or, where the result is
//                                      narrow, kLanes rows of one
//   M::kBlockK, M::kStepK, M::kTiles   what stays in caches: a block of b is kBlockK deep; kTiles tiles of a go over it
//                                      together, kStepK of k at a time
//   M::kWholeTiles                     whether all tiles of a but the last have kRows rows, or all about as many
//   M::A, M::B                         what a tile of a and a packed block of b consist of
//   M::column(k)                       how many B a column of k elements takes
//   M::pack, M::tile_of_a, M::a_room   the operands made ready
//   M::Session                         what a thread must hold while it multiplies
//   M::kAlike                          whether a narrow panel of b could be a tile of a
//   M::kNarrow                         columns up to which a symmetric result takes narrow panels
//   M::multiply_for                    the function that multiplies a tile of a by the first columns of a panel of b
//   M::kFewRows, M::kLongRows          a Gram matrix of at most so many rows, at least so long, is made of inner
//   products
//
// A task is one block of columns of one matrix: it packs its part of b once and runs all rows of a over it. A symmetric
// result starts at the block's own row and is mirrored from the finished lower triangle, so that it is symmetric to the
// last bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "bf16.h"
#include "kernels.h"
#include "panels.h"
#include "transpose.h"

namespace muon_kernels::cpu {
namespace {

constexpr int64_t kBlockN = 192;

// Columns of a panel. Small symmetric results take narrow ones, which waste less beyond the diagonal.
template <class M>
int64_t panel_width(const Product& p) {
    constexpr int64_t kLanes = M::Lanes::kLanes;
    return p.out.cols <= kLanes || (p.symmetric && p.out.cols <= M::kNarrow) ? kLanes : M::kVectors * kLanes;
}

inline bool same(const Stack& a, const Stack& b) {
    return a.data == b.data && a.batch_stride == b.batch_stride && a.row_stride == b.row_stride;
}

inline uint16_t* row_of(const Stack& s, int64_t matrix, int64_t row) {
    return s.data + matrix * s.batch_stride + row * s.row_stride;
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
    // A vector of columns, row by row; `count` of them where they are fewer.
    const auto finish = [&](int64_t j, auto... count) __attribute__((always_inline)) {
        const Acc b_jj = kB ? I::load(b_diagonal + j, count...) : I::zero();
        const float* sums = tile + j - j0;
        const uint16_t *a_row = row_of(a, matrix, i0) + j, *b_row = row_of(b, matrix, i0) + j;
        const uint16_t* c_row = ADDENDS & kC ? row_of(c, matrix, i0) + j : nullptr;
        uint16_t* out_row = row_of(out, matrix, i0) + j;
        for (int64_t i = i0; i < i0 + rows; ++i) {
            Acc value = I::load(sums);
            const float a_ii = kA ? a_diagonal[i] : 0.0f;
            if (ADDENDS & kSquare) {
                const Acc factors = I::multiply_add(alphas, I::add(I::broadcast(a_ii), b_jj), betas);
                value = I::multiply_add(factors, I::widen(a_row, count...), I::multiply(alphas, value));
            } else if (ADDENDS & kUpdate) {
                const Acc factor = I::broadcast(alpha * a_ii + beta);
                value = I::multiply_add(factor, I::widen(b_row, count...), I::multiply(alphas, value));
            } else {
                if (kA) value = I::multiply_add(I::broadcast(a_ii), I::widen(b_row, count...), value);
                if (kB) value = I::multiply_add(I::widen(a_row, count...), b_jj, value);
                value = I::multiply(alphas, value);
                if (ADDENDS & kC) value = I::multiply_add(betas, I::widen(c_row, count...), value);
            }
            I::round(out_row, value, count...);
            sums += tile_stride;
            a_row += a.row_stride;
            b_row += b.row_stride;
            if (ADDENDS & kC) c_row += c.row_stride;
            out_row += out.row_stride;
        }
    };
    int64_t j = j0;
    for (; j + I::kLanes <= end; j += I::kLanes) finish(j);
    if (j < end) finish(j, end - j);
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

// Where a task keeps what: the packed block of b, tiles of a, sums.
template <class M>
struct Scratch {
    int64_t b, a, sums;  // in units of 4 bytes, whole cache lines

    explicit Scratch(const Product& p) {
        const int64_t k = std::min(p.a.cols, M::kBlockK);
        // 64 columns of slack: the last panel of a block is padded to whole vectors
        b = lines((column_block(p) + 64) * M::column(k));
        a = lines(M::a_room(k));
        sums = p.a.cols > M::kBlockK ? (p.out.rows + M::kRows) * (kBlockN + 64) : 64 * (kBlockN + 64);
    }

    static int64_t lines(int64_t words) { return ceil_div(words, 16) * 16; }
};

template <class M>
int64_t product_scratch_bytes(const Product& p) {
    const Scratch<M> room(p);
    return 4 * (room.b + room.a + room.sums);
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

inline bool is_gram(const Product& p) { return p.b_transposed && same(p.a, p.b); }

// a aᵀ by inner products of its rows: for few rows, half of a tile would lie above the diagonal, and packing them would
// cost as much again.
template <class M>
void gram_of_few_rows(const Product& p, int64_t matrix) {
    using I = typename M::Lanes;
    constexpr int64_t kStep = 4, kStride = (M::kFewRows + kStep - 1) / kStep * kStep;
    const int64_t m = p.out.rows;
    alignas(64) float sums[kStride * kStride] = {};  // above the diagonal, what mirror writes over
    for (int64_t i = 0; i < m; i += kStep) {
        for (int64_t j = 0; j <= i; j += kStep) {
            const uint16_t *a[kStep], *b[kStep];
            for (int64_t r = 0; r < kStep; ++r) {  // beyond the last row again that one
                a[r] = row_of(p.a, matrix, std::min(i + r, m - 1));
                b[r] = row_of(p.a, matrix, std::min(j + r, m - 1));
            }
            I::inner_products(a, b, p.a.cols, sums + i * kStride + j, kStride);
        }
    }
    const FinishTile finish = pick_finish<I>(p, std::make_integer_sequence<int, 8>{});
    finish(p, matrix, 0, m, 0, m, sums, kStride);
    mirror(p.out, matrix, 0, m);
}

template <class M>
void product_task(const Product& p, int64_t task, void* scratch) {
    using I = typename M::Lanes;
    const int64_t blocks = column_blocks(p), matrix = task / blocks;
    const int64_t j0 = task % blocks * column_block(p);
    const int64_t cols = std::min(column_block(p), p.out.cols - j0);
    if (!p.has_b()) return add_columns<I>(p, matrix, j0, cols);
    if constexpr (M::kFewRows > 0) {
        if (is_gram(p) && p.out.rows <= M::kFewRows && p.a.cols >= M::kLongRows) return gram_of_few_rows<M>(p, matrix);
    }
    const int64_t i_begin = p.symmetric ? j0 : 0, m = p.out.rows, k = p.a.cols;
    const int64_t panel_cols = panel_width<M>(p);

    const Scratch<M> room(p);
    auto* packed = static_cast<typename M::B*>(scratch);
    auto* a_room = reinterpret_cast<typename M::A*>(packed + room.b);
    float* sums = static_cast<float*>(scratch) + room.b + room.a;
    const bool chunked = k > M::kBlockK;
    const bool several = chunked || M::kStepK < M::kBlockK;  // panels whose sums wait for more of k
    const int64_t sums_stride = several ? ceil_div(cols, panel_cols) * panel_cols : panel_cols;
    // Of a symmetric b, columns are packed as its rows: a pair of rows is read as it lies.
    const bool transposed = p.b_transposed && !p.a_diagonal;
    const uint16_t* b = row_of(p.b, matrix, transposed ? j0 : 0) + (transposed ? 0 : j0);
    const int64_t b_step = transposed ? 1 : p.b.row_stride;  // along k

    const FinishTile finish = pick_finish<I>(p, std::make_integer_sequence<int, 8>{});
    // Equal row tiles: a short last one would leave the multipliers waiting for its few accumulators. Where both
    // operands are one matrix, though, the panels of b may be the tiles of a as well.
    const int64_t most = panel_cols == I::kLanes ? I::kLanes : M::kRows, tiles = ceil_div(m - i_begin, most);
    const bool shared = M::kAlike && panel_cols == I::kLanes && blocks == 1 && is_gram(p);
    const auto tile_begin = [=](int64_t t) {
        if (M::kWholeTiles || shared) return std::min<int64_t>(i_begin + t * most, m);
        return i_begin + (m - i_begin) * t / tiles;
    };
    [[maybe_unused]] const typename M::Session session;

    for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += M::kBlockK) {
        const int64_t depth = std::min(M::kBlockK, k - k0);
        M::pack({b + k0 * b_step, p.b.row_stride, transposed, depth, cols}, panel_cols, packed);
        for (int64_t t0 = 0; t0 < tiles; t0 += M::kTiles) {
            const int64_t t1 = std::min(t0 + M::kTiles, tiles);
            TileOfA<typename M::A> a[M::kTiles];
            for (int64_t t = t0; t < t1; ++t) {
                const int64_t i0 = tile_begin(t), rows = tile_begin(t + 1) - i0;
                const uint16_t* from = row_of(p.a, matrix, i0) + k0;
                auto* to = a_room + (t - t0) * I::kLanes * depth;
                if (shared) {
                    a[t - t0] = {reinterpret_cast<const typename M::A*>(packed + i0 * M::column(depth)), I::kLanes};
                } else {
                    a[t - t0] = M::tile_of_a(from, p.a.row_stride, rows, depth, to);
                }
            }
            for (int64_t q = 0; q == 0 || q < depth; q += M::kStepK) {
                const int64_t step = std::min(M::kStepK, depth - q);
                for (int64_t j = 0; j < cols; j += panel_cols) {
                    const int64_t width = std::min(panel_cols, cols - j), full = padded<I>(width, panel_cols);
                    const auto* panel = packed + j * M::column(depth) + full * M::column(q);
                    for (int64_t t = t0; t < t1; ++t) {
                        const int64_t i0 = tile_begin(t), i1 = tile_begin(t + 1);
                        // Columns beyond the tile's last row are above the diagonal.
                        const int64_t wanted = p.symmetric ? std::min(width, i1 - j0 - j) : width;
                        if (wanted <= 0) continue;
                        const MultiplyTile<M> multiply = M::multiply_for(i1 - i0, padded<I>(wanted, panel_cols));
                        float* tile = sums + (chunked ? (i0 - i_begin) * sums_stride : 0) + (several ? j : 0);
                        const auto& [rows, stride] = a[t - t0];
                        multiply(rows + q, stride, step, panel, full, tile, sums_stride, k0 + q > 0);
                        if (k0 + q + step >= k) finish(p, matrix, i0, i1 - i0, j0 + j, wanted, tile, sums_stride);
                    }
                }
            }
        }
    }
    if (p.symmetric) mirror(p.out, matrix, j0, cols);
}

}  // namespace
}  // namespace muon_kernels::cpu
