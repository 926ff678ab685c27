// Small kernels, one idea each, for the executor's own tests.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>

extern "C" {

__global__ void block_sum(const float* x, float* out, int n) {
    __shared__ float partial[32];
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[int64_t(blockIdx.x) * n + i];
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
        for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
        if (threadIdx.x == 0) out[blockIdx.x] = sum;
    }
}

__global__ void atomics(float* f, double* d, int* i, unsigned long long* u, unsigned* m) {
    __shared__ int count;
    __shared__ float fcount;
    if (threadIdx.x == 0) count = 0, fcount = 0;
    __syncthreads();
    atomicAdd(&count, 1);
    atomicAdd(&fcount, 1.0f);
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
    atomicMax(i, int(threadIdx.x));
    atomicAdd(u, 3ull);
    unsigned old = *m, seen;
    do {
        seen = old;
        old = atomicCAS(m, seen, seen + 2);
    } while (old != seen);
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(i + 1, count), atomicExch(f + 1, fcount);
}

struct Pointers {
    const float* in[3];
    float scale;
};

__global__ void struct_param(Pointers p, float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = p.in[blockIdx.y][i] * p.scale + blockIdx.y;
}

__noinline__ __device__ float not_inlined(float x, const float* table) { return table[int(x) & 3] * x; }

__global__ void call_and_local(const float* x, float* out, const int* index, int n) {
    float table[4];
    for (int j = 0; j < 4; ++j) table[index[j]] = j + 1.0f;
    const int i = threadIdx.x;
    if (i < n) out[i] = not_inlined(x[i], table);
}

__constant__ float weights[4] = {1.0f, -2.0f, 0.5f, 8.0f};
__device__ int hits = 7;

__global__ void switch_and_const(const int* x, float* out, int n) {
    const int i = threadIdx.x;
    if (i >= n) return;
    float r = 0;
    switch (x[i]) {
        case 0: r = weights[i & 3]; break;
        case 1: r = sqrtf(float(i)); break;
        case 2: r = float(__popc(i) + __clz(i)); break;
        case 3: r = __int_as_float(__brev(i)); break;
        case 4: r = fmodf(float(i), 3.0f); break;
        case 5: r = 1.0f / float(i + 1); break;
        case 6: r = exp2f(-float(i)); break;
        case 7: r = rsqrtf(float(i + 1)); break;
        default: r = float(hits);
    }
    out[i] = r;
}

__global__ void votes(const int* x, unsigned* out) {
    const int lane = threadIdx.x, v = x[lane];
    const unsigned ballot = __ballot_sync(~0u, v > 2);
    const unsigned same = __match_any_sync(~0u, v);
    const unsigned total = __reduce_add_sync(~0u, unsigned(v));
    const int most = __reduce_max_sync(~0u, v);
    out[lane * 6] = ballot;
    out[lane * 6 + 1] = same;
    out[lane * 6 + 2] = total;
    out[lane * 6 + 3] = most;
    out[lane * 6 + 4] = __any_sync(~0u, v == 3) + 2 * __all_sync(~0u, v < 100) + 4 * __syncthreads_count(v & 1) +
                        1024 * __syncthreads_or(v == 5);
    out[lane * 6 + 5] = lane & 1 ? __shfl_up_sync(0xaaaaaaaau, v, 2) : __shfl_sync(0x55555555u, v, lane ^ 2);
}

__global__ void halves(const __nv_bfloat162* b, const __half2* h, __nv_bfloat162* bo, __half2* ho, float* f) {
    const int i = threadIdx.x;
    bo[i] = __hfma2(b[i], b[i], __float22bfloat162_rn(make_float2(1.5f, -0.3f)));
    ho[i] = __hadd2(__hmul2(h[i], h[i]), __hmax2(h[i], __float2half2_rn(0.1f)));
    f[2 * i] =
        __bfloat162float(__float2bfloat16_rz(__low2float(h[i]))) + float(__low2bfloat16(b[i]) > __high2bfloat16(b[i]));
    f[2 * i + 1] = __half2float(__float2half_ru(__high2float(b[i])));
}

// n bf16 triples of rows transposed through shared memory: bank conflicts where PAD is 0.
#ifndef PAD
#define PAD 1
#endif
__global__ void transpose(const float* x, float* out, int n) {
    __shared__ float tile[32][32 + PAD];
    const int bx = blockIdx.x * 32, by = blockIdx.y * 32;
    for (int j = threadIdx.y; j < 32; j += blockDim.y) tile[j][threadIdx.x] = x[int64_t(by + j) * n + bx + threadIdx.x];
#ifndef NO_BARRIER
    __syncthreads();
#endif
    for (int j = threadIdx.y; j < 32; j += blockDim.y)
        out[int64_t(bx + j) * n + by + threadIdx.x] = tile[threadIdx.x][j];
}

// Lanes write what ldmatrix read for others: the same words, turned around.
__global__ void turned_around(uint32_t* out, int ordered) {
    __shared__ __align__(16) uint32_t rows[32][4];
    const int lane = threadIdx.x;
    for (int j = 0; j < 4; ++j) rows[lane][j] = lane * 4 + j;
    __syncwarp();
    uint32_t r[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(rows[lane])))
                 : "memory");
    if (ordered) __syncwarp();
    for (int j = 0; j < 4; ++j) rows[31 - j * 8 - lane / 4][3 - lane % 4] = r[j];
    __syncwarp();
    for (int j = 0; j < 4; ++j) out[lane * 4 + j] = rows[lane][j];
}

__global__ void asserts(const int* x) { assert(x[threadIdx.x] < 5); }

__global__ void misaligned(const char* x, float* out) {
    out[threadIdx.x] = *reinterpret_cast<const float*>(x + 4 * threadIdx.x + 2);
}

__global__ void half_warp_barrier(float* out) {
    __shared__ float s[64];
    s[threadIdx.x] = threadIdx.x;
    if (threadIdx.x < 48) __syncthreads();
    out[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void divergent_shuffle(float* out) {
    float v = threadIdx.x;
    if (threadIdx.x < 16) v = __shfl_xor_sync(~0u, v, 1);
    __syncthreads();
    out[threadIdx.x] = v;
}

__global__ void spin(volatile int* flag) {
    while (*flag == 0) {
    }
}

__global__ void last_block(const float* x, float* partial, unsigned* count, float* out) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = 2 * x[blockIdx.x];
        __threadfence();
        last = atomicAdd(count, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float sum = 0;
        for (int i = 0; i < gridDim.x; ++i) sum += __ldcg(partial + i);
        *out = sum;
    }
}

__global__ void grid_sync(int* a, int* out) {
    const int i = blockIdx.x, n = gridDim.x;
    if (threadIdx.x == 0) a[i] = i * i;
    cooperative_groups::this_grid().sync();
    if (threadIdx.x == 0) out[i] = a[(i + 1) % n];
}

__global__ void blocks_collide(float* out) { out[threadIdx.x] = blockIdx.x; }

__global__ void blocks_agree(float* out) { out[threadIdx.x] = 3; }

__global__ void double_math(const double* x, double* out) {
    const int i = threadIdx.x;
    out[i] = sqrt(x[i]) / 3.0 + fma(x[i], 2.0, -1.0) * rsqrt(x[i]) + floor(x[i]) - double(float(x[i])) +
             double(int64_t(x[i] * 1e10));
}

}  // extern "C"
