// Host code as a project has it: every way to launch, limits, queries. Nothing in it knows of the stand-in runtime.
#include <cuda_runtime.h>

#include <cstdint>

#include "launches.h"

namespace {

__device__ float scale_by = 2.0f;

__global__ void axpy(float* y, const float* x, float a, int n) {
    extern __shared__ float staged[];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    staged[threadIdx.x] = x[i];
    y[i] += a * staged[threadIdx.x];
}

template <int N>
__global__ void fill(float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = N * scale_by;
}

__global__ void __launch_bounds__(64) small_blocks(float* y) { y[threadIdx.x] = 1; }

}  // namespace

int run(const Problem& p, cudaStream_t stream) {
    const int blocks = (p.n + 127) / 128;
    if (p.opt_in) cudaFuncSetAttribute(axpy, cudaFuncAttributeMaxDynamicSharedMemorySize, p.opt_in);
    fill<3><<<blocks, 128, 0, stream>>>(p.y, p.n);
    axpy<<<blocks, 128, p.shared_bytes, stream>>>(p.y, p.x, p.a, p.n);
    if (const cudaError_t error = cudaGetLastError()) return error;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = 128;
    config.dynamicSmemBytes = 512;
    config.stream = stream;
    cudaLaunchAttribute attribute[1];
    attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute[0].val.programmaticStreamSerializationAllowed = 1;
    config.attrs = attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, axpy, p.y, p.x, p.a, p.n);
}

int run_small(float* y, int threads) {
    small_blocks<<<1, threads>>>(y);
    return cudaGetLastError();
}

int multiprocessors() {
    int device, count;
    cudaDeviceProp properties;
    cudaGetDevice(&device);
    cudaGetDeviceProperties(&properties, device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return properties.multiProcessorCount == count ? count : -1;
}

int set_scale(float value) { return cudaMemcpyToSymbol(scale_by, &value, sizeof value); }
