// How bf16 products multiply: two elements of k at a time, as the instruction takes them. See product.h.
//
//   I::PairA, I::broadcast_pair    one pair (k, k+1) of a, in every lane
//   I::PairB, I::load_pairs        kLanes pairs of b
//   I::interleave                  such pairs from rows k and k+1 of b, of all lanes or the first ones
//   I::transpose_pairs             the pairs of a line in one column of `width`, zero in the columns beyond the lines
//   I::add_products(acc, a, b)
//   I::inner_products              four rows with four others
//
// b is packed as pairs; a is read in place.
#pragma once

#include <algorithm>
#include <cstdint>

#include "panels.h"
#include "registers.h"
#include "transpose.h"

namespace muon_kernels::cpu {
namespace {

// panel[q][j] = (b[2q][j], b[2q + 1][j]) for `pairs` q, zero outside b.
template <class I>
void pack_pairs(const Block& b, int64_t panel_cols, int64_t pairs, uint32_t* packed) {
    if (b.transposed) {  // a pair is contiguous in a row of b: a transposition of 32-bit words
        for (int64_t j = 0; j < b.cols; j += panel_cols) {
            const int64_t width = padded<I>(b.cols - j, panel_cols);
            for (int64_t c = 0; c < width; c += I::kLanes) {
                const uint16_t* lines = b.data + (j + c) * b.stride;
                I::transpose_pairs(packed + j * pairs + c, width, lines, b.stride, b.cols - j - c, b.k, pairs);
            }
        }
        return;
    }
    // All panels together, along the rows of b: panel by panel every cache line would be a miss of its own.
    static constexpr uint16_t kNothing[I::kLanes] = {};
    for (int64_t q = 0; q < pairs; ++q) {
        const uint16_t* even = 2 * q < b.k ? b.data + 2 * q * b.stride : nullptr;
        const uint16_t* odd = 2 * q + 1 < b.k ? even + b.stride : nullptr;
        for (int64_t j = 0; j < b.cols; j += panel_cols) {
            const int64_t width = padded<I>(b.cols - j, panel_cols);
            uint32_t* to = packed + j * pairs + q * width;
            for (int64_t c = 0; c < width; c += I::kLanes) {
                const int64_t count = b.cols - j - c;
                const uint16_t *first = even ? even + j + c : kNothing, *second = odd ? odd + j + c : kNothing;
                if (count >= I::kLanes) {
                    I::interleave(to + c, first, second);
                } else {
                    I::interleave(to + c, first, second, std::max<int64_t>(count, 0));
                }
            }
        }
    }
}

template <class I>
struct Pairs {
    using Lanes = I;
    using A = uint16_t;
    using B = uint32_t;
    using Session = NoSession;
    static constexpr int kRows = 14, kVectors = 2;  // 28 accumulators, 2 of b, 1 of a: 31 of 32 registers
    static constexpr int64_t kBlockK = 1024,
                             kStepK = kBlockK;  // a packed block of b takes half of a 1 MiB second-level cache
    static constexpr int64_t kTiles = 1;        // a tile of a, once read, meets all panels
    static constexpr bool kAlike = false, kWholeTiles = false;
    static constexpr int64_t kNarrow = 8 * I::kLanes;

    // Rows that stay in the first-level cache, and are long enough to make adding up lanes worth it.
    static constexpr int64_t kFewRows = 24, kLongRows = 128;

    static int64_t column(int64_t k) { return ceil_div(k, 2); }

    static TileOfA<A> tile_of_a(const uint16_t* a, int64_t stride, int64_t, int64_t, A*) { return {a, stride}; }
    static int64_t a_room(int64_t) { return 0; }

    template <int ROWS, int VECTORS>
    static void add_products(
        typename I::Acc (&acc)[ROWS][VECTORS], const A* a, int64_t a_stride, int64_t k, const B* panel,
        int64_t panel_cols
    ) {
        // Three rows share one pointer: fourteen would not fit the general registers.
        constexpr int kPointers = (ROWS + 2) / 3;
        const uint16_t* row[kPointers];
        for (int p = 0; p < kPointers; ++p) row[p] = a + 3 * p * a_stride;
        const int64_t pairs = k / 2;
#pragma GCC unroll 2
        for (int64_t q = 0; q < pairs; ++q) {
            typename I::PairB b[VECTORS];
            for (int v = 0; v < VECTORS; ++v) b[v] = I::load_pairs(panel + v * I::kLanes);
            panel += panel_cols;
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                typename I::PairA x = I::broadcast_pair(row[r / 3] + (r % 3) * a_stride);
                for (int v = 0; v < VECTORS; ++v) acc[r][v] = I::add_products(acc[r][v], x, b[v]);
            }
            for (int p = 0; p < kPointers; ++p) row[p] += 2;
        }
        if (k & 1) {  // the last element of a row has no partner: what follows it in memory is not ours to read
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                uint16_t last[2] = {row[r / 3][(r % 3) * a_stride], 0};
                typename I::PairA x = I::broadcast_pair(last);
                for (int v = 0; v < VECTORS; ++v) {
                    acc[r][v] = I::add_products(acc[r][v], x, I::load_pairs(panel + v * I::kLanes));
                }
            }
        }
    }

    static void pack(const Block& b, int64_t panel_cols, B* packed) {
        pack_pairs<I>(b, panel_cols, column(b.k), packed);
    }

    static MultiplyTile<Pairs> multiply_for(int64_t rows, int64_t width) { return pick_tile<Pairs>(rows, width); }
};

}  // namespace
}  // namespace muon_kernels::cpu
