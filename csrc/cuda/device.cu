#include <vector>

#include "device.h"

namespace muon_kernels::cuda {
namespace {

std::vector<const void*>& kernels() {
    static std::vector<const void*> all;
    return all;
}

}  // namespace

void remember(const void* kernel) { kernels().push_back(kernel); }

void load_kernels() {
    cudaFuncAttributes attributes;
    for (const void* kernel : kernels()) reported(cudaFuncGetAttributes(&attributes, kernel));
}

Result supported() {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error) return reported(error);
    return {major < 8 ? Status::unsupported_isa : Status::ok, 0};
}

Result reported(cudaError_t error) {
    if (!error) return kOk;
    cudaGetLastError();
    return {Status::launch_failed, static_cast<int32_t>(error)};
}

Result launched() { return reported(cudaPeekAtLastError()); }

const char* error_string(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace muon_kernels::cuda
