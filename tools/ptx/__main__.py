"""Command line: lists the kernels of a .cu or .ptx file, runs one on the CPU, or profiles it."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .module import ASYNCHRONY, ORDERS, CompiledModule, LaunchableKernel, load
from .parser import PtxError, Variable
from .standin import compile_ptx, nvcc

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
DTYPES |= {"i32": torch.int32, "i64": torch.int64, "u8": torch.uint8}
SHOWN = 8

DESCRIPTION = """\
Executes on the CPU the PTX that nvcc or Triton emitted for a GPU; tools/ptx/README.md says what that proves.

  list     prints the kernels of FILE with the types of their arguments
  run      launches one kernel and prints what it wrote
  profile  does the same, and counts memory traffic, bank conflicts and instructions, a line each
"""
ARGUMENT = f"""\
an argument of the kernel, in order:
  TYPE:SHAPE        a tensor of random numbers, such as f32:64x64; zeros if TYPE is an integer type
  TYPE:SHAPE=VALUE  the same filled with VALUE, such as f32:64=0 or f32:64=nan
  NUMBER            an integer such as 64 or 0x40, or for an f32 or f64 a float
TYPE is one of {", ".join(DTYPES)}"""
EXAMPLES = """\
examples, from the root of the checkout:
  python -m tools.ptx list tools/ptx/toys/basics.cu
  python -m tools.ptx run tools/ptx/toys/basics.cu --kernel block_sum --grid 5 --block 256 f32:5x1000 f32:5=nan 1000
  python -m tools.ptx run tools/ptx/toys/basics.cu -DNO_BARRIER --kernel transpose --grid 2,2 --block 32,8 --races \\
      f32:64x64 f32:64x64=nan 64

exit status: 0, or 1 if the kernel or its compiler failed, or 2 if the command line is wrong
"""


def sizes(text: str) -> list[int]:
    """One to three positive integers with commas between them."""
    if not re.fullmatch(r"\d+(,\d+){0,2}", text) or "0" in text.split(","):
        raise argparse.ArgumentTypeError(f"expected X or X,Y or X,Y,Z, each at least 1, such as 4,4, got {text!r}")
    return [int(n) for n in text.split(",")]


def number(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of integers from `least` to `most`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {text!r}")
        return int(text)

    return read


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.ptx",
        usage="%(prog)s [-h] {list,run,profile} FILE [OPTION ...] [ARGUMENT ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["list", "run", "profile"], help="what to do, see above")
    parser.add_argument("file", metavar="FILE", type=Path, help=".cu, which nvcc compiles, or .ptx")
    parser.add_argument("args", metavar="ARGUMENT", nargs="*", help=ARGUMENT)
    compiling = parser.add_argument_group("how nvcc compiles a .cu file")
    compiling.add_argument("--arch", default="sm_80", help="architecture, such as sm_90a (default: %(default)s)")
    many: dict[str, Any] = {"action": "append", "default": []}
    compiling.add_argument("-D", dest="defines", metavar="NAME[=VALUE]", help="macro; may be repeated", **many)
    compiling.add_argument("-I", dest="include", metavar="FOLDER", help="folder of headers; may be repeated", **many)
    launch = parser.add_argument_group("the launch")
    launch.add_argument("--kernel", metavar="NAME", help="the kernel, or a part of its name that no other has")
    size: dict[str, Any] = {"metavar": "X[,Y[,Z]]", "type": sizes}
    launch.add_argument("--grid", default=[1], help="number of blocks (default: 1)", **size)
    launch.add_argument("--block", default=[32], help="number of threads of a block (default: 32)", **size)
    launch.add_argument(
        "--shared",
        metavar="BYTES",
        type=number(0, 1 << 20),
        default=0,
        help="dynamic shared memory of a block (default: 0)",
    )
    checks = parser.add_argument_group("what is varied and checked")
    checks.add_argument(
        "--order", choices=ORDERS, default="forward", help="which thread and block goes first (default: %(default)s)"
    )
    checks.add_argument(
        "--asynchrony",
        choices=ASYNCHRONY,
        default="early",
        help="when asynchronous copies land: early is at once, late is at the last\n"
        "moment the program allows (default: %(default)s)",
    )
    checks.add_argument(
        "--seed", type=number(0, 2**63 - 1), default=0, help="seed of random tensors and random orders (default: 0)"
    )
    checks.add_argument("--races", action="store_true", help="report accesses of the same memory that nothing orders")
    checks.add_argument(
        "--resident",
        metavar="N",
        type=number(1, 1 << 20),
        default=1,
        help="blocks that run at a time (default: 1); barriers of a whole grid need all",
    )
    return parser


def compiled(options: argparse.Namespace) -> CompiledModule:
    """Module of the file. Raises if it is missing, of another kind, or nvcc is needed and missing."""
    path: Path = options.file
    if not path.is_file():
        raise PtxError(f"expected a .cu or .ptx file, got {path}, which is no file; check the path")
    if path.suffix == ".ptx":
        return load(path)
    if path.suffix != ".cu":
        raise PtxError(f"expected a .cu or .ptx file, got {path}; rename it if it is one of these")
    if nvcc() is None:
        raise PtxError(
            f"expected nvcc on PATH to compile {path}, got none; install a CUDA toolkit, which needs no GPU, "
            f"or run `nvcc -ptx -arch={options.arch} -lineinfo {path}` elsewhere and give its .ptx"
        )
    flags = [*(f"-D{text}" for text in options.defines), *(f"-I{folder}" for folder in options.include)]
    return load(compile_ptx(path, options.arch, flags))


def chosen(module: CompiledModule, name: str | None) -> LaunchableKernel:
    """Kernel with this name, or with a name that alone contains it; the only kernel if none is named."""
    found = [k for k in module.kernels if k == name] or [k for k in module.kernels if (name or "") in k]
    if len(found) == 1:
        return module.kernel(found[0])
    if not module.kernels:
        raise PtxError("expected a file with kernels, got one without; declare them __global__")
    got = "several kernels" if name is None else f"--kernel {name}, which {'several have' if found else 'none has'}"
    raise PtxError(f"expected the name of one kernel, got {got}; give --kernel one of: {', '.join(module.kernels)}")


def argument(text: str, number: int, param: Variable) -> Any:
    """Value to pass for `param`: a tensor, an integer or a float. Raises if the text is none that fits its type."""
    kind, colon, shape = text.partition(":")
    shape, filled, value = shape.partition("=")
    is_float = param.type in ("f32", "f64")
    try:
        if colon:
            if kind not in DTYPES or not re.fullmatch(r"\d+(x\d+)*", shape):
                raise ValueError
            size, dtype = [int(n) for n in shape.split("x")], DTYPES[kind]
            if filled:
                tensor = torch.full(size, float(value) if dtype.is_floating_point else int(value, 0), dtype=dtype)
            else:
                tensor = torch.randn(size).to(dtype) if dtype.is_floating_point else torch.zeros(size, dtype=dtype)
            if param.bytes == 8 and not is_float:
                return tensor
        elif is_float:
            return float(text)
        elif param.bytes <= 8:
            bits = 8 * param.bytes
            if not -(1 << bits - 1) <= (found := int(text, 0)) < 1 << bits:
                raise ValueError
            return found
    except (ValueError, RuntimeError):
        pass
    if param.bytes > 8:
        fits = "the bytes of a struct, which only Python can pass"
    elif is_float:
        fits = "a number such as 1.5"
    elif param.bytes == 8:
        fits = f"a tensor such as f32:64x64 (of {', '.join(DTYPES)}), or an integer of 64 bits"
    else:
        fits = f"an integer of {8 * param.bytes} bits, such as 64"
    raise PtxError(f"argument {number}, of type {described(param)}: expected {fits}, got {text!r}")


def described(param: Variable) -> str:
    return param.type if param.count == 1 else f"{param.type}[{param.count}]"


def signature(kernel: LaunchableKernel) -> str:
    return f"{kernel.info.name}({', '.join(described(p) for _, p in kernel.info.params)})"


def arguments(texts: Sequence[str], kernel: LaunchableKernel) -> list[Any]:
    """Values of all arguments. Raises if there are too few or too many."""
    params = [p for _, p in kernel.info.params]
    if len(texts) != len(params):
        raise PtxError(f"expected {len(params)} arguments of {signature(kernel)}, got {len(texts)}; see --help")
    return [argument(text, i + 1, param) for i, (text, param) in enumerate(zip(texts, params, strict=True))]


def written(before: torch.Tensor, after: torch.Tensor) -> str:
    """Summary of what a kernel wrote to a tensor; empty if its bits are the same as before."""
    raw = lambda t: t.view(-1, 1).view(torch.uint8)
    changed = int((raw(before) != raw(after)).any(1).sum())
    if not changed:
        return ""
    values = after.flatten()[:SHOWN].tolist()
    text = " ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in values)
    return f"{changed} of {after.numel()} written: {text}{' ...' if after.numel() > SHOWN else ''}"


def launch(module: CompiledModule, options: argparse.Namespace) -> None:
    kernel = chosen(module, options.kernel)
    torch.manual_seed(options.seed)
    values = arguments(options.args, kernel)
    before = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
    profile = options.action == "profile"
    kernel.entry(options.races, profile)  # built before the clock starts
    begin = time.perf_counter()
    result = kernel.launch(
        options.grid,
        options.block,
        values,
        options.shared,
        order=options.order,
        asynchrony=options.asynchrony,
        seed=options.seed,
        races=options.races,
        profile=profile,
        resident=options.resident,
    )
    print(f"{kernel.info.name}: {time.perf_counter() - begin:.3f} s")
    if result.warnings:
        print(f"{result.warnings} warnings, the first: {result.warning}")
    for i, (old, new) in enumerate(zip(before, values, strict=True)):
        if isinstance(new, torch.Tensor) and (summary := written(old, new)):
            print(f"argument {i + 1}, {options.args[i].partition('=')[0]}: {summary}")
    if result.profile:
        print(result.profile.table())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (by default the process's arguments) describes; returns the exit status."""
    parser = command_line()
    options = parser.parse_intermixed_args(argv)
    if options.action == "list" and options.args:
        parser.error(f"list expected only a FILE, got the argument {options.args[0]!r} too; run takes arguments")
    try:
        module = compiled(options)
        if options.action == "list":
            for kernel in map(module.kernel, module.kernels):
                print(f"{signature(kernel)}: {kernel.threads} threads, {kernel.info.static_shared} bytes shared")
        else:
            launch(module, options)
    except PtxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
