"""Parameters with gradients, timing, and the rate at which a device multiplies; for a processor or a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from muon_kernels import backends
from muon_kernels.cli.verify.models import copied
from muon_kernels.cli.verify.steppers import parameters
from muon_kernels.cli.verify.timing import (
    cache_bytes,
    clocks,
    flusher,
    in_turns,
    one_after_another,
    ring,
    seconds,
    spin,
    turns,
    wall,
)

# What benchmarks use of these, beside what is below.
__all__ = [
    "cache_bytes",
    "clocks",
    "copied",
    "flusher",
    "in_turns",
    "one_after_another",
    "parameters",
    "ring",
    "seconds",
    "spin",
    "turns",
    "wall",
]
DEVICES = ("cpu", "cuda")


def missing(device: str) -> str | None:
    """Return why nothing can be measured on this device; None if it can."""
    if device == "cpu":
        return None
    reasons = {name: backends.unavailable(name) for name in _for_gpus()}
    return None if None in reasons.values() else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _for_gpus() -> list[str]:
    return [name for name in backends.BACKENDS if "cuda" in backends.get(name).device_types]


def own(device: str) -> list[str]:
    """Return our backends that run on this device, first the one that "auto" takes; without a GPU, those for GPUs."""
    if missing(device):
        return _for_gpus()
    names = [name for name in backends.BACKENDS if backends.unavailable(name) is None]
    return [
        name
        for name in names
        if backends.get(name).refuses(torch.device(device), [torch.float32], torch.bfloat16) is None
    ]


def describe(device: str) -> str:
    """Return a line on the software and the device that figures are of."""
    if device == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name()}"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {backends.get('cpu').describe()}"


@cache
def measured_peak(device: str = "cpu") -> float:
    """Return `rate`, the median of seven, of a device that is warm."""
    spin(device)
    return statistics.median([rate(device) for _ in range(8)][1:])


def rate(device: str = "cpu") -> float:
    """Return FLOP/s of a torch.matmul in `peak_dtype` at `peak_size`³."""
    A = _peak_operand(device)
    return 2 * len(A) ** 3 / seconds(lambda: torch.matmul(A, A), device)


@cache
def _peak_operand(device: str) -> torch.Tensor:
    size = peak_size(device)
    return torch.randn(size, size, device=device).to(peak_dtype(device))


def peak_size(device: str) -> int:
    """Return the size at which torch.matmul is at its best: a GPU takes 2048³ in the time of a few launches."""
    return 2048 if device == "cpu" else 8192


def peak_dtype(device: str) -> torch.dtype:
    """Return the dtype that our kernels multiply in: fp32 where the instruction set has no products of bf16."""
    native = device != "cpu" or "cpu" not in own(device) or _isa() in ("amx", "avx512bf16")
    return torch.bfloat16 if native else torch.float32


def _isa() -> str:
    return backends.get("cpu").describe().partition(",")[0]


def peak_line(device: str) -> str:
    """Return a line on the rate that percentages are of."""
    dtype = str(peak_dtype(device)).removeprefix("torch.")
    return f"torch.matmul, {dtype}, {peak_size(device)}³: {measured_peak(device) / 1e9:.0f} GFLOP/s"


def report(benchmark: Any, taken: Sequence[float]) -> None:
    """Hand these seconds to pytest-benchmark, a round each, through its own clock."""
    times = iter(taken)
    clock = [0.0]
    benchmark._timer = lambda: clock[0]

    def replay() -> None:
        clock[0] += next(times)

    benchmark.pedantic(replay, rounds=len(taken), iterations=1)
