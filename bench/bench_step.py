"""A whole optimizer step: torch.optim.Muon, the reference in bf16, and ours by backend, on every workload.

The implementations take turns, so that whatever else the machine does meets all of them; each benchmark then reports
its own times, with the ratio to torch.optim.Muon and the share of the processor's bf16 rate in `extra_info`.

    pytest bench/ --benchmark-columns=median,iqr,rounds
    python bench/bench_step.py            a Markdown table, for RESULTS.md and README.md
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
from measure import measured_peak, parameters
from shapes import WORKLOADS
from torch import nn

import muon_kernels
from muon_kernels import backends, reference
from muon_kernels.coefficients import resolve

ROUNDS = 7
TORCH = "torch.optim.Muon"


def reference_step(params: list[nn.Parameter]) -> Callable[[], object]:
    """The oracle's lines in bf16, a matrix at a time: what a reader would write."""
    buffers = [torch.zeros_like(p) for p in params]
    triples = resolve("keller", 5).triples

    @torch.no_grad()
    def step() -> None:
        for i, p in enumerate(params):
            assert p.grad is not None
            buffers[i].lerp_(p.grad, 0.05)
            direction = p.grad.lerp(buffers[i], 0.95).bfloat16()
            update = reference.newton_schulz(direction, triples)
            p.mul_(1 - 1e-4).sub_(update, alpha=1e-3 * max(1, p.shape[0] / p.shape[1]) ** 0.5)

    return step


# Name -> a function from parameters to the step that is timed. A backend added to the package appears by itself.
IMPLEMENTATIONS: dict[str, Callable[[list[nn.Parameter]], Callable[[], object]]] = {
    TORCH: lambda params: torch.optim.Muon(params).step,
    "reference": reference_step,
    **{
        name: lambda params, name=name: muon_kernels.Muon(params, backend=name).step
        for name in backends.BACKENDS
        if backends.unavailable(name) is None
    },
}


@cache
def times(workload: str) -> dict[str, list[float]]:
    """Seconds of every implementation's steps, taken in turn."""
    params = parameters(WORKLOADS[workload])
    steps = {name: make(copy_with_grads(params)) for name, make in IMPLEMENTATIONS.items()}
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    return taken


def copy_with_grads(params: list[nn.Parameter]) -> list[nn.Parameter]:
    copies = copy.deepcopy(params)
    for p, original in zip(copies, params, strict=True):
        assert original.grad is not None
        p.grad = original.grad.clone()
    return copies


def facts(workload: str, implementation: str) -> dict[str, float]:
    """Median seconds, the ratio to torch.optim.Muon, and for ours the FLOPs and their share of the bf16 rate."""
    taken = times(workload)
    median = statistics.median(taken[implementation])
    found = {"median_ms": median * 1e3, "faster_than_torch": statistics.median(taken[TORCH]) / median}
    if implementation in backends.BACKENDS:
        shapes = [(m, n, c) for m, n, c in WORKLOADS[workload]]
        flops = muon_kernels.plan.plan_for_shapes(shapes, backend=implementation).flops
        found["gflop"] = flops / 1e9
        found["percent_of_bf16_rate"] = 100 * flops / median / measured_peak()
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_step(benchmark, workload: str, implementation: str) -> None:
    benchmark.group = workload
    taken = iter(times(workload)[implementation])
    clock = [0.0]

    # The steps were timed in turns above; the plugin is handed those times through its own clock.
    benchmark._timer = lambda: clock[0]

    def replay() -> None:
        clock[0] += next(taken)

    benchmark.pedantic(replay, rounds=ROUNDS, iterations=1)
    benchmark.extra_info.update(facts(workload, implementation))


def table() -> str:
    """Every workload's medians in milliseconds, and how much faster than torch.optim.Muon the best of ours is."""
    best = next(name for name in backends.BACKENDS if backends.unavailable(name) is None)
    lines = [
        f"| workload | {', ms | '.join(IMPLEMENTATIONS)}, ms | {best}: times faster | % of bf16 rate |",
        "|---" * (len(IMPLEMENTATIONS) + 3) + "|",
    ]
    ratios = []
    for workload in WORKLOADS:
        figures = {name: facts(workload, name) for name in IMPLEMENTATIONS}
        ratios.append(figures[best]["faster_than_torch"])
        cells = " | ".join(f"{figures[name]['median_ms']:.1f}" for name in IMPLEMENTATIONS)
        share = figures[best]["percent_of_bf16_rate"]
        lines.append(f"| {workload} | {cells} | **{ratios[-1]:.2f}** | {share:.0f} |")
    lines.append(
        f"| geometric mean | {' | ' * (len(IMPLEMENTATIONS) - 1)} | **{statistics.geometric_mean(ratios):.2f}** | |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {backends.get('cpu').describe()}")
    print(f"torch.matmul, bf16, 2048³: {measured_peak() / 1e9:.0f} GFLOP/s\n")
    print(table())
