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

Result current(Device& device) {
    int index = 0;
    cudaError_t error = cudaGetDevice(&index);
    const auto ask = [&](int& value, cudaDeviceAttr attribute) {
        if (!error) error = cudaDeviceGetAttribute(&value, attribute, index);
    };
    ask(device.major, cudaDevAttrComputeCapabilityMajor);
    ask(device.minor, cudaDevAttrComputeCapabilityMinor);
    ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
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
