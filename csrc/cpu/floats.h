// How fp32 products multiply, where the processor has none of bf16: both operands are packed as fp32, which is exact.
// See product.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "panels.h"
#include "registers.h"
#include "transpose.h"

namespace muon_kernels::cpu {
namespace {

template <class I, int ROWS, int VECTORS>
struct Floats {
    using Lanes = I;
    using A = float;
    using B = float;
    using Session = NoSession;
    static constexpr int kRows = ROWS, kVectors = VECTORS;
    // A panel of b stays in the first-level cache while kTiles tiles of a pass it, the block of b and those tiles in
    // the second.
    static constexpr int64_t kBlockK = 256, kStepK = kBlockK;
    static constexpr int64_t kTiles = 128 / I::kLanes;
    static constexpr bool kAlike = true, kWholeTiles = false;
    static constexpr int64_t kNarrow = 128;

    static constexpr int64_t kFewRows = 0, kLongRows = 0;

    static int64_t column(int64_t k) { return k; }

    // A tile of a is as many vectors as it is deep, with its rows in their lanes.
    static TileOfA<A> tile_of_a(const uint16_t* a, int64_t stride, int64_t rows, int64_t k, A* room) {
        pack_lines(a, stride, rows, k, room, I::kLanes);
        return {room, I::kLanes};
    }
    static int64_t a_room(int64_t k) { return kTiles * I::kLanes * k; }

    template <int R, int V>
    static void add_products(
        typename I::Acc (&acc)[R][V], const A* a, int64_t, int64_t k, const B* panel, int64_t panel_cols
    ) {
        for (int64_t q = 0; q < k; ++q) {
            typename I::Acc b[V];
            for (int v = 0; v < V; ++v) b[v] = I::load(panel + v * I::kLanes);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const typename I::Acc x = I::broadcast(a[r]);
                for (int v = 0; v < V; ++v) acc[r][v] = I::multiply_add(x, b[v], acc[r][v]);
            }
            panel += panel_cols;
            a += I::kLanes;
        }
    }

    // panel[q][j] = b[q][j], zero outside b.
    static void pack(const Block& b, int64_t panel_cols, B* packed) {
        if (b.transposed) {
            for (int64_t j = 0; j < b.cols; j += panel_cols) {
                const int64_t width = padded<I>(b.cols - j, panel_cols);
                for (int64_t c = 0; c < width; c += I::kLanes) {
                    const uint16_t* lines = b.data + (j + c) * b.stride;
                    pack_lines(lines, b.stride, b.cols - j - c, b.k, packed + j * b.k + c, width);
                }
            }
            return;
        }
        // All panels together, along the rows of b: panel by panel every cache line would be a miss of its own.
        for (int64_t q = 0; q < b.k; ++q) {
            const uint16_t* row = b.data + q * b.stride;
            for (int64_t j = 0; j < b.cols; j += panel_cols) {
                const int64_t width = padded<I>(b.cols - j, panel_cols);
                float* to = packed + j * b.k + q * width;
                for (int64_t c = 0; c < width; c += I::kLanes) {
                    I::store(to + c, read_bf16<I>(row + j + c, std::max<int64_t>(b.cols - j - c, 0)));
                }
            }
        }
    }

    static MultiplyTile<Floats> multiply_for(int64_t rows, int64_t width) { return pick_tile<Floats>(rows, width); }

  private:
    // to[q][i] = from[i][q] for at most kLanes lines of k elements, zero in the lanes beyond.
    static void pack_lines(const uint16_t* from, int64_t stride, int64_t lines, int64_t k, float* to, int64_t width) {
        alignas(64) uint16_t columns[16][I::kLanes];
        for (int64_t q = 0; q < k; q += 16) {
            const int64_t deep = std::min<int64_t>(16, k - q);
            transpose_lines(from + q, stride, lines, deep, columns);
            for (int64_t i = 0; i < deep; ++i) I::store(to + (q + i) * width, I::widen(columns[i]));
        }
    }
};

}  // namespace
}  // namespace muon_kernels::cpu
