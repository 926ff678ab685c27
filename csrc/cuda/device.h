// What every verb asks of the device and reports of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include "../muon_kernels.h"

namespace muon_kernels::cuda {

constexpr Result kOk = {Status::ok, 0};
constexpr Result kInvalidArgument = {Status::invalid_argument, 0};

struct Device {
    int major, minor, multiprocessors;
    int shared_bytes;  // of a multiprocessor
};

// What the current device is; whether it is one that the kernels are built for: compute capability 8.0 and up.
Result current(Device& device);

// Only whether it is.
Result supported();

void remember(const void* kernel);

// KERNEL, which `load_kernels` then knows of. Every launch names its kernel through this.
template <auto KERNEL>
struct Known {
    static inline const bool remembered = (remember(reinterpret_cast<const void*>(KERNEL)), true);
};
template <auto KERNEL>
auto known() {
    static_cast<void>(&Known<KERNEL>::remembered);
    return KERNEL;
}

// What became of a call of the runtime. The runtime keeps an error for whoever asks next: it is made to forget it, or
// the next good launch would report it.
Result reported(cudaError_t error);

// What became of the launch just made.
Result launched();

}  // namespace muon_kernels::cuda
