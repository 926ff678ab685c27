// C = A * B^T, bf16 in, fp32 out, as an sm_80 kernel does it: cp.async pipeline, ldmatrix, mma.sync. Faults can be
// planted by macros; each must be found by the executor.
#include <cuda_bf16.h>

#include <cstdint>

#ifndef WAIT_COUNT
#define WAIT_COUNT (NUM_STAGES - 2)
#endif
#ifndef TILE_BARRIER
#define TILE_BARRIER __syncthreads()
#endif
#ifndef LDMATRIX_ROW
#define LDMATRIX_ROW (lane % 16)
#endif

constexpr int BLOCK_M = 64, BLOCK_N = 64, BLOCK_K = 32, NUM_STAGES = 3, WARPS = 4, PITCH = BLOCK_K + 8;

__device__ void cp_async(void* shared, const void* global, bool valid) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0));
}

__device__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
    );
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) gemm(
    const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k
) {
    extern __shared__ __align__(16) __nv_bfloat16 shared[];
    __nv_bfloat16* shared_a = shared;
    __nv_bfloat16* shared_b = shared + NUM_STAGES * BLOCK_M * PITCH;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row0 = blockIdx.y * BLOCK_M, col0 = blockIdx.x * BLOCK_N;

    auto load = [&](int stage, int k0) {
        for (int i = threadIdx.x; i < BLOCK_M * BLOCK_K / 8; i += WARPS * 32) {
            const int r = i / (BLOCK_K / 8), kk = i % (BLOCK_K / 8) * 8;
            const bool in_a = row0 + r < m && k0 + kk < k, in_b = col0 + r < n && k0 + kk < k;
            cp_async(
                shared_a + (stage * BLOCK_M + r) * PITCH + kk, in_a ? a + int64_t(row0 + r) * k + k0 + kk : a, in_a
            );
            cp_async(
                shared_b + (stage * BLOCK_N + r) * PITCH + kk, in_b ? b + int64_t(col0 + r) * k + k0 + kk : b, in_b
            );
        }
        asm volatile("cp.async.commit_group;");
    };

    float acc[BLOCK_N / 8][4] = {};
    const int tiles = (k + BLOCK_K - 1) / BLOCK_K;
    for (int s = 0; s < NUM_STAGES - 1; ++s) load(s, s * BLOCK_K);
    for (int t = 0; t < tiles; ++t) {
        asm volatile("cp.async.wait_group %0;" ::"n"(WAIT_COUNT) : "memory");
        TILE_BARRIER;
        load((t + NUM_STAGES - 1) % NUM_STAGES, (t + NUM_STAGES - 1) * BLOCK_K);
        const int stage = t % NUM_STAGES;
        for (int kk = 0; kk < BLOCK_K; kk += 16) {
            uint32_t fragment_a[4];
            ldmatrix_x4(
                fragment_a, shared_a + (stage * BLOCK_M + warp * 16 + LDMATRIX_ROW) * PITCH + kk + lane / 16 * 8
            );
            for (int j = 0; j < BLOCK_N / 8; j += 2) {
                uint32_t fragment_b[4];
                ldmatrix_x4(
                    fragment_b,
                    shared_b + (stage * BLOCK_N + j * 8 + lane / 16 * 8 + lane % 8) * PITCH + kk + lane % 16 / 8 * 8
                );
                mma(acc[j], fragment_a, fragment_b[0], fragment_b[1]);
                mma(acc[j + 1], fragment_a, fragment_b[2], fragment_b[3]);
            }
        }
    }
    for (int j = 0; j < BLOCK_N / 8; ++j) {
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + warp * 16 + lane / 4 + i / 2 * 8, col = col0 + j * 8 + lane % 4 * 2 + i % 2;
            if (row < m && col < n) c[int64_t(row) * n + col] = acc[j][i];
        }
    }
}
