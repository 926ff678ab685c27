"""Times: between events on a GPU that is warm, by the clock on a processor, where nothing but code is tried."""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Run = Callable[[], object]
SPIN = 0.3  # seconds in which an idle GPU reaches its clocks
_COOL = 0.5  # seconds without work after which it has left them
_FEWEST = 3  # rounds that a median is taken of, however little time is left


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


def one_after_another(calls: Sequence[Run], device: str) -> Run:
    """Return a function that makes all calls; on a GPU a recorded graph, in which no kernel waits for the host."""

    def run() -> None:
        for call in calls:
            call()

    if device == "cpu":
        return run
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what a first call allocates must not be recorded
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds(run: Run, device: str, before: Run | None = None) -> float:
    """Time one run: by the clock, or between two events on the GPU. `before` comes right before it and is not timed."""
    if device == "cpu":
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    if before is not None:
        before()
    begin.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3


def wall(run: Run, device: str, before: Run | None = None) -> float:
    """Time one run by the clock, from a device that waits to one that waits again: with the host's part."""
    if before is not None:
        before()
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flusher(device: str) -> Run | None:
    """Return what puts other data into the cache, twice its size; None on a processor."""
    if not (cache := cache_bytes(device)):
        return None
    block = torch.empty(2 * cache, dtype=torch.uint8, device=device)
    return block.zero_


def spin(device: str, for_seconds: float = SPIN) -> None:
    """Keep a GPU busy until its clocks are those of work: an idle one runs at a fifth of them."""
    if device == "cpu":
        return
    A = torch.randn(4096, 4096, device=device).bfloat16()
    start = time.perf_counter()
    while time.perf_counter() - start < for_seconds:
        torch.matmul(A, A)
        torch.cuda.synchronize()


_ASKED = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit", "driver_version")


def clocks(device: str) -> dict[str, str]:
    """Return clocks, temperature, power and driver as nvidia-smi says them now; nothing where it cannot."""
    if device == "cpu":
        return {}
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [] if uuid is None else [f"--id=GPU-{str(uuid).removeprefix('GPU-')}"]
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", *which]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = found.splitlines()[0].split(",") if found.strip() else []
    return dict(zip(_ASKED, map(str.strip, values), strict=False))


_last = -math.inf  # when something was timed last


def turns(
    runs: Mapping[str, Run],
    device: str,
    rounds: int,
    left: Callable[[], float] = lambda: math.inf,
    before: Run | None = None,
    time_: Callable[[Run, str, Run | None], float] = seconds,
) -> dict[str, list[float]]:
    """Time runs in turns, on a warm device, so that whatever else happens meets all; return each one's seconds.

    Args:
        runs: by name.
        device: that they run on.
        rounds: of all of them.
        left: seconds that are left; without any, there are no more rounds than a median needs.
        before: comes before each run, untimed.
        time_: `seconds` or `wall`.
    """
    for run in runs.values():
        run()
    global _last
    if time.monotonic() - _last > _COOL:
        spin(device)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        if i >= min(_FEWEST, rounds) and left() <= 0:
            break
        for name, run in runs.items():
            taken[name].append(time_(run, device, before))
    _last = time.monotonic()
    return taken


def in_turns(runs: Mapping[str, Run], device: str, rounds: int, *options: Any, **named: Any) -> dict[str, float]:
    """Return the medians of `turns`."""
    return {name: statistics.median(each) for name, each in turns(runs, device, rounds, *options, **named).items()}


def repeated(run: Run, times: int, device: str) -> Run:
    """Return a graph of so many equal runs: what a launch costs the host does not show in it."""
    return one_after_another([partial(run)] * times, device)


def fit(points: Mapping[int, float]) -> tuple[float, float]:
    """Return (fixed, slope) of the line fixed + slope k with the least squares of relative errors."""
    ks = torch.tensor(list(points), dtype=torch.float64)
    weights = 1 / torch.tensor(list(points.values()), dtype=torch.float64)
    A = torch.stack([weights, weights * ks], 1)
    fixed, slope = torch.linalg.lstsq(A, torch.ones(len(ks), 1, dtype=torch.float64)).solution.flatten().tolist()
    return fixed, slope
