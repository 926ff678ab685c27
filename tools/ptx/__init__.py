"""Executes on the CPU the PTX that nvcc and Triton emit, so that kernels can be proven without a GPU.

    python -m tools.ptx profile kernels.cu --grid 4,4 --block 128 --shared 30720 bf16:256x256 f32:256x256 256

    module = ptx.load(ptx.compile_ptx("kernels.cu", "sm_80"))  # or a path to .ptx, or its text
    kernel = module.kernel("gemm")
    kernel.launch((4, 4), 128, [a, b, c, m, n, k], shared_bytes, order="random", asynchrony="late", seed=1, races=True)

    extension, runtime = ptx.build("_C", ["csrc/cuda/syrk_sm80.cu"], "python/bindings.cpp", include=["csrc"])
    runtime.register(a, c)
    with runtime.options(races=True):
        extension.syrk(a.data_ptr(), c.data_ptr(), n)
        assert not runtime.failures, runtime.failures

How: translate.py turns every .entry into a C++ function, registers as locals, and g++ compiles it against device/*.h,
where each GPU thread is a fiber and barriers, warp collectives and asynchronous operations are what they are in the PTX
manual. standin.py links real host code, launches included, to a stand-in for the CUDA runtime that ends in the same
executor. Builds are kept by content in $MUON_PTX_CACHE, or in a directory of the user's in the temporary one.

What a passing kernel has shown:
- the right numbers, from the instructions that the compiler emitted, fragments, swizzles and descriptors included;
- in any order of threads and blocks (`order`), and whenever an asynchronous copy lands (`asynchrony`): "late" poisons
  the target and copies at the last moment that the program allows; shared memory begins as NaN;
- that every access is aligned and inside an allocation (`guard=True`: inside the view) or the block's shared memory;
- no deadlock, no divergent collective, no shuffle from a lane outside its mask;
- with `races=True`, that barriers, mbarriers, waits and fences.proxy.async order all conflicting accesses of shared
  memory, and that blocks share global memory through atomics only. Threads that store the same value are a warning;
  collectives, ldmatrix and stmatrix among them, order nothing, bar.warp.sync does;
- `profile=True` counts sectors of global memory, wavefronts and bank conflicts of shared memory, and instructions.

What it does not show: speed (counts are facts, times would not be); faults of ptxas; weak memory beyond the race check
(atomics count as acquire and release); the order of additions inside a tensor core, so compare with float64 at a
tolerance that fits, or use small integers.
Accumulators of a wgmma are computed at once: that they are touched before their wait is reported (as a warning where a
mov of the compiler does it), but their values are never late. Lanes are put together into warp requests by the barriers
and backward branches that they passed, so counts of divergent code are approximate. Not supported: clusters, tcgen05,
fp8, wmma, textures, indirect calls; printf is ignored.
"""

from .module import LaunchError as LaunchError
from .module import load as load
from .module import tensor_map as tensor_map
from .parser import PtxError as PtxError
from .profile import Profile as Profile
from .standin import build as build
from .standin import compile_ptx as compile_ptx
