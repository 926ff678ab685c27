"""Report versions, hardware, which backends are ready, and what runs where.

Paste the output into a bug report: it holds everything that decides which kernel runs.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import backends
from .._version import __version__
from ..backends import cuda, native
from ..step.plan import plan_for_shapes

# (rows, columns, how many) of the hidden matrices of known models.
_SHAPES = {
    "GPT-2 small, 12 layers": [(768, 768, 12), (768, 2304, 12), (768, 3072, 24)],
    "Llama-2 7B, one layer": [(4096, 4096, 4), (4096, 11008, 3)],
    "64 experts": [(1408, 2048, 64)],
    "256 small matrices": [(64, 64, 256)],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options."""


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0."""
    width = max(map(len, backends.BACKENDS))
    print("\n".join(f"{name:<14}{value}" for name, value in facts()))
    print("\nbackends")
    for name in backends.BACKENDS:
        print(f"  {name:<{width}}  {verdict(name)}")
    print('\nwhat backend="auto" picks')
    try:
        for title, shapes in _SHAPES.items():
            print(f"\n{title}\n{plan_for_shapes(shapes)}")
    except ValueError as error:
        print(f"nothing: {error}")
    return 0


def verdict(name: str) -> str:
    """Say whether a backend is ready, or why not."""
    try:
        reason = backends.unavailable(name)
    except ValueError as error:
        reason = str(error)
    return f"not ready: {reason}" if reason else f"ready: {backends.get(name).describe()}"


def facts() -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the facts about this machine and this installation."""
    yield "muon_kernels", __version__
    yield "built with", native.built_with()
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    try:
        yield "triton", version("triton")
    except PackageNotFoundError:
        yield "triton", "not installed"
    # Asked for by name because older versions of torch lack it.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    named = str(capabilities.get("cpu_name") or "Unknown")  # as torch calls most that are not x86
    yield "processor", named if named != "Unknown" else platform.processor() or platform.machine() or "unknown"
    instruction_sets = [
        name
        for name, present in sorted(capabilities.items())
        if present is True and name.startswith(("avx", "amx", "neon", "sve", "bf16"))
    ]
    if instruction_sets:
        yield "", " ".join(instruction_sets)
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    yield "GPUs", str(torch.cuda.device_count() or "none")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            f"  {index}",
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB",
        )
        if kept := cuda.rankings(torch.device("cuda", index)):
            yield f"  {index}, tuned", f"fastest {'; '.join(map(str, kept))}"
