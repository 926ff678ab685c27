"""Runs or profiles one kernel from the command line.

    python -m tools.ptx list KERNELS.ptx|KERNELS.cu [--arch sm_80]
    python -m tools.ptx run|profile KERNELS.cu --kernel gemm --grid 4,4 --block 128 --shared 30720 \\
        bf16:256x256 bf16:256x256 f32:256x256 256 256 256

Arguments of the kernel: TYPE:SHAPE is a tensor of random numbers, TYPE:SHAPE=0 one of zeros; with a point, a float;
else an integer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from .module import ASYNCHRONY, ORDERS, load
from .parser import PtxError
from .standin import compile_ptx

_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
_TYPES |= {"i32": torch.int32, "i64": torch.int64, "u8": torch.uint8}


def _argument(text: str) -> Any:
    kind, colon, shape = text.partition(":")
    if not colon:
        return float(text) if "." in text else int(text, 0)
    shape, zeros, _ = shape.partition("=")
    size = [int(n) for n in shape.split("x")]
    dtype = _TYPES[kind]
    return torch.zeros(size, dtype=dtype) if zeros or not dtype.is_floating_point else torch.randn(size).to(dtype)


def _sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ptx", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["list", "run", "profile"])
    parser.add_argument("file", type=Path)
    parser.add_argument("args", nargs="*", type=_argument)
    parser.add_argument("--arch", default="sm_80")
    parser.add_argument("--kernel")
    parser.add_argument("--grid", type=_sizes, default=[1])
    parser.add_argument("--block", type=_sizes, default=[32])
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--order", choices=ORDERS, default="forward")
    parser.add_argument("--asynchrony", choices=ASYNCHRONY, default="early")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--races", action="store_true")
    options = parser.parse_intermixed_args()
    module = load(compile_ptx(options.file, options.arch) if options.file.suffix == ".cu" else options.file)
    if options.action == "list":
        for name in module.kernels:
            kernel = module.kernel(name).info
            kinds = ", ".join(f"{p.type}[{p.count}]" if p.count != 1 else p.type for _, p in kernel.params)
            print(f"{name}({kinds}), {kernel.static_shared} bytes of static shared memory")
        return
    name = options.kernel or module.kernels[0]
    profile = options.action == "profile"
    kernel = module.kernel(name)
    kernel.entry(options.races, profile)
    begin = time.perf_counter()
    result = kernel.launch(
        options.grid,
        options.block,
        options.args,
        options.shared,
        order=options.order,
        asynchrony=options.asynchrony,
        seed=options.seed,
        races=options.races,
        profile=profile,
    )
    print(
        f"{name}: {time.perf_counter() - begin:.3f} s"
        + (f"; {result.warnings} warnings, the first: {result.warning}" if result.warnings else "")
    )
    if result.profile:
        print(result.profile.table())


if __name__ == "__main__":
    try:
        main()
    except PtxError as error:
        raise SystemExit(str(error)) from None
