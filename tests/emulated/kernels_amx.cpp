// csrc/cpu/kernels_amx.cpp with its seven instructions in plain code: TDPBF16PS is the Software Developer's Manual's.
// See avx512.h.
#include <cstdlib>

#include "cpu/avx512bf16.h"
#include "cpu/kernels_of.h"
#include "cpu/tiles.h"

namespace muon_kernels::cpu {
namespace {

struct Amx : Avx512Bf16 {
    static inline thread_local char tiles[8][16][64];
    static inline thread_local bool open = false;

    // Tiles begin as zeros, and without a session there are none.
    struct TileSession {
        TileSession() {
            std::memset(tiles, 0, sizeof(tiles));
            open = true;
        }
        ~TileSession() { open = false; }
        TileSession(const TileSession&) = delete;
        TileSession& operator=(const TileSession&) = delete;
    };

    template <int T>
    static auto& tile() {
        if (!open) std::abort();
        return tiles[T];
    }
    template <int T>
    static void zero_tile() {
        std::memset(tile<T>(), 0, sizeof(tile<T>()));
    }
    template <int T>
    static void load_tile(const void* from, int64_t stride) {
        for (int i = 0; i < 16; ++i) std::memcpy(tile<T>()[i], static_cast<const char*>(from) + i * stride, 64);
    }
    template <int T>
    static void store_tile(void* to, int64_t stride) {
        for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tile<T>()[i], 64);
    }
    template <int C, int A, int B>
    static void multiply_tiles() {
        for (int m = 0; m < 16; ++m) {
            float sums[16];
            uint16_t a[32], b[32];
            std::memcpy(sums, tile<C>()[m], 64);
            std::memcpy(a, tile<A>()[m], 64);
            for (int k = 0; k < 16; ++k) {
                std::memcpy(b, tile<B>()[k], 64);
                for (int n = 0; n < 16; ++n) {
                    sums[n] = emulated::multiply_add(a[2 * k], b[2 * n], sums[n]);
                    sums[n] = emulated::multiply_add(a[2 * k + 1], b[2 * n + 1], sums[n]);
                }
            }
            std::memcpy(tile<C>()[m], sums, 64);
        }
    }
};

using Multiply = Tiles<Amx>;

}  // namespace

const Kernels kAmxKernels = kernels_of<Multiply>();

}  // namespace muon_kernels::cpu
