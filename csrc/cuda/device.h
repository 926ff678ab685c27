// What every verb asks of the device and reports of a launch.
#pragma once

#include "../muon_kernels.h"

namespace muon_kernels::cuda {

constexpr Result kOk = {Status::ok, 0};
constexpr Result kInvalidArgument = {Status::invalid_argument, 0};

// Whether the current device is one that the kernels are built for: compute capability 8.0 and up.
Result supported();

// What became of the launch just made.
Result launched();

}  // namespace muon_kernels::cuda
