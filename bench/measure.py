"""Parameters with gradients, timing, and the rate at which a device multiplies; for a processor or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from shapes import Shapes
from torch import nn

from muon_kernels import backends

T = TypeVar("T")
DEVICES = ("cpu", "cuda")


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Return parameters of these shapes with gradients, in fp32."""
    params = []
    for rows, cols, count in shapes:
        for _ in range(count):
            p = nn.Parameter(torch.randn(rows, cols) * 0.02)
            p.grad = torch.randn(rows, cols)
            params.append(p)
    return params


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


def cache_bytes(device: str) -> int:
    """Return the size of the cache that must not help.

    0 on a processor, whose cache stays as it is between benchmarks of one product.
    """
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device == "cuda" else 0


def ring(make: Callable[[], T], bytes_: int, cache: int) -> list[T]:
    """Return so many results of `make` that each has left the cache when its turn comes again.

    Args:
        make: returns an object with memory of its own.
        bytes_: of that memory, at least.
        cache: its bytes; the ring takes more than twice as many.
    """
    return [make() for _ in range(2 * cache // max(1, bytes_) + 1)]


def one_after_another(calls: Sequence[Callable[[], object]], device: str) -> Callable[[], object]:
    """Return a function that makes all calls; on a GPU a recorded graph, in which no kernel waits for the host."""

    def run() -> None:
        for call in calls:
            call()

    if device == "cpu":
        return run
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what a first call allocates must not be recorded
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Callable[[], object], device: str) -> float:
    """Time one run: by the clock, or between two events on the GPU."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def measured_peak(device: str = "cpu") -> float:
    """Return `rate`, the median of seven."""
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
