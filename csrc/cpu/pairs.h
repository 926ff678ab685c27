// How bf16 products multiply: two elements of k at a time, as the instruction takes them. See product.h.
//
//   I::PairA, I::broadcast_pair    one pair (k, k+1) of a, in every lane
//   I::PairB, I::load_pairs        kLanes pairs of b
//   I::interleave                  such pairs from rows k and k+1 of b
//   I::add_products(acc, a, b)
//
// b is packed as pairs; a is read in place.
#pragma once

#include <cstdint>

#include "panels.h"
#include "transpose.h"

namespace muon_kernels::cpu {
namespace {

template <class I>
struct Pairs {
    using Lanes = I;
    using A = uint16_t;
    using B = uint32_t;
    static constexpr int kRows = 14, kVectors = 2;  // 28 accumulators, 2 of b, 1 of a: 31 of 32 registers
    static constexpr int64_t kBlockK = 1024;        // a packed block of b takes half of a 1 MiB second-level cache
    static constexpr int64_t kTiles = 1;            // a tile of a, once read, meets all panels

    static int64_t column(int64_t k) { return ceil_div(k, 2); }

    static const A* tile_of_a(const uint16_t* a, int64_t, int64_t, int64_t, A*) { return a; }
    static int64_t a_room(int64_t) { return 0; }

    template <int ROWS, int VECTORS>
    static void add_products(
        typename I::Acc (&acc)[ROWS][VECTORS], const A* a, int64_t a_stride, int64_t k, const B* panel
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
            panel += VECTORS * I::kLanes;
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

    // panel[q][j] = (b[2q][j], b[2q + 1][j]), zero outside b.
    static void pack(const Block& from, int64_t panel_cols, B* packed) {
        const uint16_t* b = from.data;
        const int64_t stride = from.stride, k = from.k, cols = from.cols, pairs = column(k);
        const auto pack_pair = [=](int64_t j, int64_t q) {  // of column j: any place, any edge
            if (j >= cols) return uint32_t{0};
            const auto element = [=](int64_t kk) -> uint32_t {
                return from.transposed ? b[j * stride + kk] : b[kk * stride + j];
            };
            return element(2 * q) | (2 * q + 1 < k ? element(2 * q + 1) << 16 : 0);
        };
        for (int64_t j = 0; j < cols; j += panel_cols) {
            const int64_t width = padded<I>(cols - j, panel_cols);
            uint32_t* panel = packed + j * pairs;
            if (from.transposed) {  // a pair is contiguous in a row of b: a transposition of 32-bit words
                for (int64_t jj = 0; jj < width; jj += 8) {
                    const int64_t whole = j + jj + 8 <= cols ? (k / 2) & ~int64_t{7} : 0;
                    const uint16_t* rows = b + (j + jj) * stride;
                    for (int64_t q = 0; q < whole; q += 8) {
                        transpose_8x8_pairs(rows + 2 * q, stride, panel + q * width + jj, width);
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
        if (from.transposed) return;
        // Whole panels together, along the rows of b: panel by panel every cache line would be a miss of its own.
        static constexpr uint16_t kNothing[I::kLanes] = {};
        for (int64_t q = 0; q < pairs; ++q) {
            const uint16_t* even = b + 2 * q * stride;
            const bool paired = 2 * q + 1 < k;
            for (int64_t j = 0; j + panel_cols <= cols; j += panel_cols) {
                uint32_t* to = packed + j * pairs + q * panel_cols;
                for (int64_t v = 0; v < panel_cols; v += I::kLanes) {
                    I::interleave(to + v, even + j + v, paired ? even + stride + j + v : kNothing);
                }
            }
        }
    }
};

}  // namespace
}  // namespace muon_kernels::cpu
