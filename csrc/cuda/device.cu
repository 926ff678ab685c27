#include "device.h"

namespace muon_kernels::cuda {

Result current(Device& device) {
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (!error) error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
    if (!error) error = cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index);
    if (!error) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error) return reported(error);
    return {device.major < 8 ? Status::unsupported_isa : Status::ok, 0};
}

Result supported() {
    Device device;
    return current(device);
}

Result reported(cudaError_t error) {
    if (!error) return kOk;
    cudaGetLastError();
    return {Status::launch_failed, static_cast<int32_t>(error)};
}

Result launched() { return reported(cudaPeekAtLastError()); }

const char* error_string(int32_t error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace muon_kernels::cuda
