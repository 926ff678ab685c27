"""A whole optimizer step: torch.optim.Muon, torch's batched fp32 products, the reference in bf16, and ours by backend.

On a GPU, too, where there is one: of whole models, with a cache that holds none of them, with the host's part and,
replayed as a graph, without it. There the others are torch.optim.Muon, eager and compiled, a compiled loop over stacks
in bf16, and peers that can be imported; `python -m muon_kernels verify` measures the same.

The implementations take turns, so that whatever else the machine does meets all of them. Each benchmark then reports
its own times, with the ratios to torch's two and the share of the device's rate in `extra_info`. On a processor
MUON_KERNELS_CPU_ISA picks the instruction set.

    pytest bench/ --benchmark-columns=median,iqr,rounds
    python bench/bench_step.py            a Markdown table, for RESULTS.md and README.md
"""

from __future__ import annotations

import gc
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import cache

import measure
import pytest
import torch
from shapes import BY_DEVICE
from torch import nn

from muon_kernels import backends, reference
from muon_kernels.cli.verify import steppers
from muon_kernels.coefficients import resolve
from muon_kernels.step.plan import plan_for_shapes

ROUNDS = 7
TORCH, BATCHED = steppers.TORCH, "torch, fp32"
SECOND = {"cpu": BATCHED, "cuda": steppers.BATCHED}  # what ours are compared with beside torch.optim.Muon


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
    of_torch = {TORCH: lambda params: torch.optim.Muon(params).step, BATCHED: batched_step}
    others = {**of_torch, "reference": reference_step} if device == "cpu" else steppers.rivals()
    return {**others, **steppers.own(measure.own(device))}


@cache
def steps(workload: str, device: str) -> dict[str, Callable[[], object]]:
    """Return the steps of all implementations, each on parameters of its own; without those that raise."""
    params = measure.parameters(BY_DEVICE[device][workload])
    torch.compiler.reset()  # of a function torch keeps eight compilations, and then runs it as it is
    made = {}
    for name, make in implementations(device).items():
        step = make(measure.copied(params, device))
        try:
            step()
        except Exception as error:  # of a peer, or of a compiler
            warnings.warn(f"{workload}, {name}: {error}", stacklevel=2)
            continue
        made[name] = step
    return made


@cache
def times(workload: str, device: str) -> dict[str, list[float]]:
    """Time every implementation's steps, in turns, from an idle device to an idle device; return seconds."""
    gc.collect()
    return measure.turns(steps(workload, device), device, ROUNDS, before=measure.flusher(device), time_=measure.wall)


@cache
def replays(workload: str, device: str) -> dict[str, float]:
    """Return the medians of steps that were captured in a graph on a GPU; without those that cannot be."""
    graphs = {}
    for name, step in steps(workload, device).items():
        try:
            graphs[name] = measure.one_after_another([step], device)
        except RuntimeError as error:
            warnings.warn(f"{workload}, {name} cannot be captured: {error}", stacklevel=2)
    return measure.in_turns(graphs, device, ROUNDS, before=measure.flusher(device))


def facts(workload: str, implementation: str, device: str) -> dict[str, float]:
    """Return the median time, the ratios to torch's two, and for ours the FLOPs and their share of the peak."""
    taken = {name: statistics.median(seconds) for name, seconds in times(workload, device).items()}
    median, second = taken.get(implementation, math.nan), taken.get(SECOND[device], math.nan)
    found = {"median_ms": median * 1e3, "faster": taken[TORCH] / median, "faster_than_second": second / median}
    if device != "cpu":
        found["replayed_ms"] = replays(workload, device).get(implementation, math.nan) * 1e3
    if implementation in backends.BACKENDS:
        flops = plan_for_shapes(BY_DEVICE[device][workload], device=device, backend=implementation).flops
        found["gflop"] = flops / 1e9
        found["percent_of_rate"] = 100 * flops / median / measure.measured_peak(device)
    return found


ROWS = [
    (device, workload, name)
    for device in measure.DEVICES
    for workload in BY_DEVICE[device]
    for name in implementations(device)
]


@pytest.mark.parametrize(("device", "workload", "implementation"), ROWS)
def test_step(benchmark, workload: str, device: str, implementation: str) -> None:
    if reason := measure.missing(device):
        pytest.skip(reason)
    if implementation not in times(workload, device):
        pytest.skip(f"{implementation} raises, see the warnings")
    benchmark.group = f"{workload}, {device}"
    # The steps were timed in turns.
    measure.report(benchmark, times(workload, device)[implementation])
    benchmark.extra_info.update(facts(workload, implementation, device))


def cell(figures: dict[str, float]) -> str:
    """Return a table's cell of milliseconds."""
    if "replayed_ms" not in figures:
        return f"{figures['median_ms']:.1f}"
    return f"{figures['median_ms']:.3f} ({figures['replayed_ms']:.3f})"


def table(device: str) -> str:
    """Return a table: every workload's medians in milliseconds, and how much faster the best of ours is.

    On a GPU with the host, and in parentheses replayed as a graph.
    """
    names, best = list(implementations(device)), measure.own(device)[0]
    faster = f"{best}: times faster than {TORCH} | than {SECOND[device]}"
    lines = [
        f"| workload | {', ms | '.join(names)}, ms | {faster} | % of rate |",
        "|---" * (len(names) + 4) + "|",
    ]
    ratios: dict[str, list[float]] = {"faster": [], "faster_than_second": []}
    for workload in BY_DEVICE[device]:
        figures = {name: facts(workload, name, device) for name in names}
        for ratio, values in ratios.items():
            values.append(figures[best][ratio])
        cells = [cell(figures[name]) for name in names]
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
        print(f"{measure.describe(device)}\n{measure.peak_line(device)}\n{measure.clocks(device) or ''}\n")
        print(f"{table(device)}\n{measure.clocks(device) or ''}\n")
