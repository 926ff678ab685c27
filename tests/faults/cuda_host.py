"""Faults in what steps and Python see of the CUDA kernels: errors, threads, workspaces; see plant.py."""

from __future__ import annotations

from plant import Fault

DEVICE, FUSED = "csrc/cuda/device.cu", "csrc/cuda/fused_step_sm80.cu"
MOMENTUM, BINDINGS = "csrc/cuda/momentum_update.cu", "python/bindings.cpp"

TESTS = ["tests/cuda/test_end_to_end.py", "tests/cuda/test_threads_cuda.py", "tests/cuda/test_products_sm80.py"]
ONCE = "test_an_error_is_reported_once"

FAULTS = [
    Fault("an error is left behind", "    cudaGetLastError();\n", "", ONCE, DEVICE),
    Fault(
        "the question's error is left behind",
        "if (error) return reported(error);",
        "if (error) return {Status::launch_failed, static_cast<int32_t>(error)};",
        f"{ONCE} and Device",
        DEVICE,
    ),
    Fault(
        "an error of shared memory is left behind",
        "reported(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));",
        "[](cudaError_t e) { return Result{e ? Status::launch_failed : Status::ok, static_cast<int32_t>(e)}; }("
        "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));",
        f"{ONCE} and cudaFuncSetAttribute",
        FUSED,
    ),
    Fault("launches hold the interpreter", "    py::gil_scoped_release release;\n", "", "test_others_run", BINDINGS),
    Fault(
        "a scale left from the step before",
        "        u.scale[matrix] = reciprocal_norm(",
        "        if (!(u.scale[matrix] > 0)) u.scale[matrix] = reciprocal_norm(",
        "test_a_scratch_is_used_again or (test_a_step_knows and products)",
        MOMENTUM,
    ),
]
