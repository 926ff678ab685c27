// How bf16 products multiply in a processor's matrix tiles: 16 rows of 32 elements of a, 16 pairs of k of 16 columns of
// b. See product.h.
//
//   I::TileSession                    the tiles of this thread, made ready for as long as it lives
//   I::zero_tile<T>, load_tile<T>     tile T of eight, from 16 lines of 64 bytes
//   I::store_tile<T>
//   I::multiply_tiles<C, A, B>        C += A B
//
// b is packed as pairs, as in pairs.h. a is read in place where its tiles are whole, and copied with zeros around it
// where they are not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "pairs.h"
#include "panels.h"

namespace muon_kernels::cpu {
namespace {

template <class I>
struct Tiles {
    using Lanes = I;
    using A = uint16_t;
    using B = uint32_t;
    using Session = typename I::TileSession;
    static constexpr int64_t kTile = 16, kDeep = 32;  // lines of a tile; elements of k in one of a or b
    static constexpr int kRows = 32, kVectors = 2;    // four tiles of sums, two of a and two of b
    static constexpr bool kWholeTiles = true;
    // A packed block of b stays in the second-level cache; in the first a tile of a, kStepK deep, while it meets all
    // panels, and each of these.
    static constexpr int64_t kBlockK = 2048, kStepK = 256;
    static constexpr int64_t kTiles = 1;
    static constexpr bool kAlike = false;
    static constexpr int64_t kNarrow = kTile;
    static constexpr int64_t kFewRows = 0, kLongRows = 0;

    static int64_t column(int64_t k) { return ceil_div(k, kDeep) * (kDeep / 2); }

    static void pack(const Block& b, int64_t panel_cols, B* packed) {
        pack_pairs<I>(b, panel_cols, column(b.k), packed);
    }

    static TileOfA<A> tile_of_a(const uint16_t* a, int64_t stride, int64_t rows, int64_t k, A* room) {
        if (rows % kTile == 0 && k % kDeep == 0) return {a, stride};
        const int64_t deep = ceil_div(k, kDeep) * kDeep, high = ceil_div(rows, kTile) * kTile;
        for (int64_t i = 0; i < high; ++i, room += deep) {
            const int64_t count = i < rows ? k : 0;
            if (count) std::memcpy(room, a + i * stride, sizeof(A) * count);
            std::fill(room + count, room + deep, 0);
        }
        return {room - high * deep, deep};
    }
    static int64_t a_room(int64_t k) { return kRows * column(k); }

    static MultiplyTile<Tiles> multiply_for(int64_t rows, int64_t width) {
        if (rows > kTile) return width > kTile ? multiply<2, 2> : multiply<2, 1>;
        return width > kTile ? multiply<1, 2> : multiply<1, 1>;
    }

  private:
    // Tiles 0 to 3 are sums, 4 and 5 of a, 6 and 7 of b.
    template <int ROWS, int COLS>
    static void multiply(
        const A* a, int64_t a_stride, int64_t k, const B* panel, int64_t panel_cols, float* tile, int64_t tile_stride,
        bool accumulate
    ) {
        if (accumulate) {
            each<ROWS, COLS>(tile, tile_stride, [](auto t, float* at, int64_t stride) {
                I::template load_tile<t>(at, stride);
            });
        } else {
            each<ROWS, COLS>(tile, tile_stride, [](auto t, float*, int64_t) { I::template zero_tile<t>(); });
        }
        const int64_t a_bytes = 2 * a_stride, b_bytes = 4 * panel_cols;
        const A* second = a + kTile * a_stride;
        for (int64_t q = 0; q < k; q += kDeep) {
            I::template load_tile<6>(panel, b_bytes);
            I::template load_tile<4>(a + q, a_bytes);
            I::template multiply_tiles<0, 4, 6>();
            if constexpr (COLS == 2) {
                I::template load_tile<7>(panel + kTile, b_bytes);
                I::template multiply_tiles<1, 4, 7>();
            }
            if constexpr (ROWS == 2) {
                I::template load_tile<5>(second + q, a_bytes);
                I::template multiply_tiles<2, 5, 6>();
                if constexpr (COLS == 2) I::template multiply_tiles<3, 5, 7>();
            }
            panel += kDeep / 2 * panel_cols;
        }
        each<ROWS, COLS>(tile, tile_stride, [](auto t, float* at, int64_t stride) {
            I::template store_tile<t>(at, stride);
        });
    }

    template <int T>
    using Number = std::integral_constant<int, T>;

    template <int ROWS, int COLS, class Do>
    static void each(float* tile, int64_t stride, Do&& what) {
        const int64_t bytes = 4 * stride;
        what(Number<0>{}, tile, bytes);
        if constexpr (COLS == 2) what(Number<1>{}, tile + kTile, bytes);
        if constexpr (ROWS == 2) what(Number<2>{}, tile + kTile * stride, bytes);
        if constexpr (ROWS == 2 && COLS == 2) what(Number<3>{}, tile + kTile * stride + kTile, bytes);
    }
};

}  // namespace
}  // namespace muon_kernels::cpu
