"""A whole optimizer step: torch.optim.Muon, torch's batched fp32 products, the reference in bf16, and ours by backend.

On a GPU, too, where there is one: with everything in its memory, and so many copies of it that its cache does not help.

The implementations take turns, so that whatever else the machine does meets all of them. Each benchmark then reports
its own times, with the ratios to torch's two and the share of the device's rate in `extra_info`. On a processor
MUON_KERNELS_CPU_ISA picks the instruction set.

    pytest bench/ --benchmark-columns=median,iqr,rounds
    python bench/bench_step.py            a Markdown table, for RESULTS.md and README.md
"""

from __future__ import annotations

import gc
import statistics
from collections import defaultdict
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
from muon_kernels.step.plan import plan_for_shapes

ROUNDS = 7
TORCH, BATCHED = "torch.optim.Muon", "torch, fp32"


def reference_step(params: list[nn.Parameter]) -> Callable[[], object]:
    """Return a step that runs the reference's lines in bf16, a matrix at a time: what a reader would write."""
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


def batched_step(params: list[nn.Parameter]) -> Callable[[], object]:
    """Return a step as users write it for a processor without bf16 products: equal shapes batched, in fp32."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
    for p in params:
        by_shape[p.shape].append(p)
    buffers = {shape: [torch.zeros_like(p) for p in group] for shape, group in by_shape.items()}
    triples = resolve("keller", 5).triples

    @torch.no_grad()
    def step() -> None:
        for shape, group in by_shape.items():
            grads = [p.grad for p in group]
            torch._foreach_lerp_(buffers[shape], grads, 0.05)
            X = torch.stack(torch._foreach_lerp(grads, buffers[shape], 0.95))
            tall = shape[0] > shape[1]
            X = X.mT if tall else X
            X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for a, b, c in triples:
                A = torch.bmm(X, X.mT)
                B = torch.baddbmm(A, A, A, beta=b, alpha=c)
                X = torch.baddbmm(X, B, X, beta=a)
            updates = (X.mT if tall else X).unbind()
            torch._foreach_mul_(group, 1 - 1e-4)
            torch._foreach_add_(group, updates, alpha=-1e-3 * max(1, shape[0] / shape[1]) ** 0.5)

    return step


def implementations(device: str) -> dict[str, Callable[[list[nn.Parameter]], Callable[[], object]]]:
    """Return, by name, functions from parameters to the step that is timed. A backend of ours appears by itself."""
    return {
        TORCH: lambda params: torch.optim.Muon(params).step,
        BATCHED: batched_step,
        "reference": reference_step,
        **{
            name: lambda params, name=name: muon_kernels.Muon(params, backend=name).step for name in measure.own(device)
        },
    }


@cache
def times(workload: str, device: str) -> dict[str, list[float]]:
    """Time every implementation's steps, in turns, with parameters in no cache that must not help; return seconds."""
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
    """Return copies of parameters and their gradients, in memory of their own."""
    copies = []
    for p in params:
        assert p.grad is not None
        copies.append(nn.Parameter(p.detach().clone().to(device)))
        copies[-1].grad = p.grad.clone().to(device)
    return copies


def facts(workload: str, implementation: str, device: str) -> dict[str, float]:
    """Return the median time, the ratios to torch's two, and for ours the FLOPs and their share of the peak."""
    taken = {name: statistics.median(seconds) for name, seconds in times(workload, device).items()}
    median = taken[implementation]
    found = {"median_ms": median * 1e3, "faster": taken[TORCH] / median, "faster_than_fp32": taken[BATCHED] / median}
    if implementation in backends.BACKENDS:
        shapes = [(m, n, c) for m, n, c in WORKLOADS[workload]]
        flops = plan_for_shapes(shapes, device=device, backend=implementation).flops
        found["gflop"] = flops / 1e9
        found["percent_of_rate"] = 100 * flops / median / measure.measured_peak(device)
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
    """Return a table: every workload's medians in milliseconds, and how much faster the best of ours is."""
    names, best = list(implementations(device)), measure.own(device)[0]
    lines = [
        f"| workload | {', ms | '.join(names)}, ms | {best}: times faster than {TORCH} | than {BATCHED} | % of rate |",
        "|---" * (len(names) + 4) + "|",
    ]
    ratios: dict[str, list[float]] = {"faster": [], "faster_than_fp32": []}
    for workload in WORKLOADS:
        figures = {name: facts(workload, name, device) for name in names}
        for ratio, values in ratios.items():
            values.append(figures[best][ratio])
        cells = [f"{figures[name]['median_ms']:.{1 if device == 'cpu' else 3}f}" for name in names]
        cells += [f"**{values[-1]:.2f}**" for values in ratios.values()]
        lines.append(f"| {workload} | {' | '.join(cells)} | {figures[best]['percent_of_rate']:.0f} |")
    means = " | ".join(f"**{statistics.geometric_mean(values):.2f}**" for values in ratios.values())
    lines.append(f"| geometric mean | {' | ' * (len(names) - 1)} | {means} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    for device in measure.DEVICES:
        if reason := measure.missing(device):
            print(f"{device}: {reason}")
            continue
        print(f"{measure.describe(device)}\n{measure.peak_line(device)}\n")
        print(table(device), end="\n\n")
