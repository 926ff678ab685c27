"""A whole optimizer step: torch.optim.Muon, the reference in bf16, and ours by backend, on every workload.

On a GPU too, where there is one: with everything in its memory, and so many copies of it that its cache does not help.

The implementations take turns, so that whatever else the machine does meets all of them; each benchmark then reports
its own times, with the ratio to torch.optim.Muon and the share of the device's bf16 rate in `extra_info`.

    pytest bench/ --benchmark-columns=median,iqr,rounds
    python bench/bench_step.py            a Markdown table, for RESULTS.md and README.md
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import cache

import measure
import pytest
import torch
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


def implementations(device: str) -> dict[str, Callable[[list[nn.Parameter]], Callable[[], object]]]:
    """Name -> a function from parameters to the step that is timed. A backend of ours appears by itself."""
    return {
        TORCH: lambda params: torch.optim.Muon(params).step,
        "reference": reference_step,
        **{
            name: lambda params, name=name: muon_kernels.Muon(params, backend=name).step for name in measure.own(device)
        },
    }


@cache
def times(workload: str, device: str) -> dict[str, list[float]]:
    """Seconds of every implementation's steps, taken in turn; parameters are in no cache that must not help."""
    params = measure.parameters(WORKLOADS[workload])
    bytes_ = 3 * sum(p.numel() * p.itemsize for p in params)  # with gradients and momenta
    steps = {
        name: measure.ring(lambda make=make: make(copied(params, device)), bytes_, measure.cache_bytes(device))
        for name, make in implementations(device).items()
    }
    for ring in steps.values():
        for step in ring:
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for i in range(ROUNDS):
        for name, ring in steps.items():
            taken[name].append(measure.seconds(ring[i % len(ring)], device))
    return taken


def copied(params: list[nn.Parameter], device: str) -> list[nn.Parameter]:
    """With their gradients, in memory of their own."""
    copies = []
    for p in params:
        assert p.grad is not None
        copies.append(nn.Parameter(p.detach().clone().to(device)))
        copies[-1].grad = p.grad.clone().to(device)
    return copies


def facts(workload: str, implementation: str, device: str) -> dict[str, float]:
    """Median seconds, the ratio to torch.optim.Muon, and for ours the FLOPs and their share of the bf16 rate."""
    taken = times(workload, device)
    median = statistics.median(taken[implementation])
    found = {"median_ms": median * 1e3, "faster_than_torch": statistics.median(taken[TORCH]) / median}
    if implementation in backends.BACKENDS:
        shapes = [(m, n, c) for m, n, c in WORKLOADS[workload]]
        flops = muon_kernels.plan.plan_for_shapes(shapes, device=device, backend=implementation).flops
        found["gflop"] = flops / 1e9
        found["percent_of_bf16_rate"] = 100 * flops / median / measure.measured_peak(device)
    return found


ROWS = [(device, name) for device in measure.DEVICES for name in implementations(device)]


@pytest.mark.parametrize(("device", "implementation"), ROWS)
def test_step(benchmark, workload: str, device: str, implementation: str) -> None:
    if reason := measure.missing(device):
        pytest.skip(reason)
    benchmark.group = f"{workload}, {device}"
    # The steps were timed in turns.
    measure.report(benchmark, times(workload, device)[implementation])
    benchmark.extra_info.update(facts(workload, implementation, device))


def table(device: str) -> str:
    """Every workload's medians in milliseconds, and how much faster than torch.optim.Muon the best of ours is."""
    names, best = list(implementations(device)), measure.own(device)[0]
    lines = [
        f"| workload | {', ms | '.join(names)}, ms | {best}: times faster | % of bf16 rate |",
        "|---" * (len(names) + 3) + "|",
    ]
    ratios = []
    for workload in WORKLOADS:
        figures = {name: facts(workload, name, device) for name in names}
        ratios.append(figures[best]["faster_than_torch"])
        cells = " | ".join(f"{figures[name]['median_ms']:.{1 if device == 'cpu' else 3}f}" for name in names)
        share = figures[best]["percent_of_bf16_rate"]
        lines.append(f"| {workload} | {cells} | **{ratios[-1]:.2f}** | {share:.0f} |")
    lines.append(f"| geometric mean | {' | ' * (len(names) - 1)} | **{statistics.geometric_mean(ratios):.2f}** | |")
    return "\n".join(lines)


if __name__ == "__main__":
    for device in measure.DEVICES:
        if reason := measure.missing(device):
            print(f"{device}: {reason}")
            continue
        print(f"{measure.describe(device)}\n{measure.peak_line(device)}\n")
        print(table(device), end="\n\n")
