#include <cuda_runtime.h>

#include "device.h"

namespace muon_kernels::cuda {

Result supported() {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error) return {Status::launch_failed, static_cast<int32_t>(error)};
    return {major < 8 ? Status::unsupported_isa : Status::ok, 0};
}

Result launched() {
    // Takes the error away: whoever checks next (torch, after its own launch) should not find ours.
    const cudaError_t error = cudaGetLastError();
    return {error ? Status::launch_failed : Status::ok, static_cast<int32_t>(error)};
}

const char* error_string(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace muon_kernels::cuda
