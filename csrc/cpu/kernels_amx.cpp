#include "avx512bf16.h"
#include "kernels_of.h"
#include "tiles.h"

namespace muon_kernels::cpu {
namespace {

struct Amx : Avx512Bf16 {
    struct TileSession {
        TileSession() {
            struct {
                uint8_t palette = 1, start_row = 0, reserved[14] = {};
                uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } config;
            asm volatile("ldtilecfg %0" ::"m"(config));
        }
        ~TileSession() { asm volatile("tilerelease"); }
        TileSession(const TileSession&) = delete;
        TileSession& operator=(const TileSession&) = delete;
    };

    // The compiler's own intrinsics do not say that they read and write memory.
    template <int T>
    static void zero_tile() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    template <int T>
    static void load_tile(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    static void store_tile(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
    }
    template <int C, int A, int B>
    static void multiply_tiles() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};

using Multiply = Tiles<Amx>;

}  // namespace

const Kernels kAmxKernels = kernels_of<Multiply>();

}  // namespace muon_kernels::cpu
