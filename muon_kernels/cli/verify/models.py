"""Stage 6: steps of real models, ours and others', with the host and without it."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

from ... import backends
from ...step.plan import plan_for_shapes
from .facts import peaks
from .stage import Context, Result
from .steppers import BATCHED, COMPILED, Maker, Step, own, parameters, rivals
from .timing import clocks, flusher, in_turns, one_after_another, wall
from .workloads import Shapes

_LATE = (COMPILED, BATCHED)  # what takes seconds to compile, for every shape


def time_steps(context: Context) -> Result:
    """Time a step of every workload by every implementation, in turns."""
    device = context.place.device
    data: dict[str, Any] = {"clocks before": clocks(device), "workloads": {}, "left out": []}
    for i, (name, shapes) in enumerate(context.sizes.workloads.items()):
        if context.left() <= 0:
            data["left out"].append(name)
            continue
        share = context.left() / (len(context.sizes.workloads) - i)
        data["workloads"][name] = compared(context, shapes, time.monotonic() + share)
    data["clocks after"] = clocks(device)
    ratios = [faster for each in data["workloads"].values() if (faster := _faster(each)) is not None]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    summary = f"{mean:.2f} times as fast as the best of torch's, geometric mean of {len(ratios)}"
    if data["left out"]:
        summary += f"; no time for {len(data['left out'])} more"
    return Result(summary, data)


def _faster(rows: dict[str, dict[str, Any]]) -> float | None:
    """Return how much faster the best of ours is than the best of torch's, with the host."""
    times = {name: row["wall, ms"] for name, row in rows.items() if "wall, ms" in row}
    ours = [took for name, took in times.items() if name in backends.BACKENDS and name != "eager"]
    torchs = [took for name, took in times.items() if name not in backends.BACKENDS]
    return min(torchs) / min(ours) if ours and torchs else None


def compared(context: Context, shapes: Shapes, end: float = math.inf) -> dict[str, dict[str, Any]]:
    """Return by implementation its times in ms and its share of what this GPU can do, or why there is none.

    Args:
        context: of the stage.
        shapes: of the parameters.
        end: after which nothing more is compiled, by `time.monotonic`.
    """
    place, sizes = context.place, context.sizes
    torch.compiler.reset()  # of a function torch keeps eight compilations, and then runs it as it is
    params = parameters(shapes, place.device)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name, make in {**own(place.backends), **rivals(sizes.compiler)}.items():
        if name in _LATE and time.monotonic() > end:
            rows[name] = {"failed": "no time to compile it"}
            continue
        try:
            steps[name] = _ready(make, params)
            rows[name] = {}
        except Exception as error:
            rows[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    flush = flusher(place.device)
    for name, took in in_turns(steps, place.device, sizes.rounds, context.left, flush, wall).items():
        rows[name]["wall, ms"] = took * 1e3
    graphs = {name: graph for name, step in steps.items() if (graph := _captured(step, place.device, rows[name]))}
    for name, took in in_turns(graphs, place.device, sizes.rounds, context.left, flush).items():
        rows[name]["graph, ms"] = took * 1e3
        if name in backends.BACKENDS:
            rows[name]["% of roofline"] = 100 * _least(context, shapes, name) / took
    return rows


def _ready(make: Maker, params: list[nn.Parameter]) -> Step:
    """Make a step on parameters of its own; run it as often as it takes to allocate and compile."""
    own_params = copied(params)
    step = make(own_params)
    before = own_params[0].detach().clone()
    for _ in range(2):
        step()
    if torch.equal(own_params[0], before):
        raise RuntimeError("a step changed nothing")
    return step


def copied(params: list[nn.Parameter], device: str | None = None) -> list[nn.Parameter]:
    """Return copies of parameters and their gradients, in memory of their own."""
    copies = []
    for p in params:
        assert p.grad is not None
        copies.append(nn.Parameter(p.detach().clone().to(device)))
        copies[-1].grad = p.grad.clone().to(device)
    return copies


def _captured(step: Step, device: str, row: dict[str, Any]) -> Step | None:
    """Return a graph of a step; None, and why in the row, where it cannot be captured."""
    try:
        return one_after_another([step], device)
    except Exception as error:
        row["graph"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def _least(context: Context, shapes: Shapes, name: str) -> float:
    """Return the seconds that a step's FLOPs, or its bytes, take at the rates that were measured here."""
    flops_rate, copy_rate = peaks(context)
    plan = plan_for_shapes(shapes, device=context.place.device, backend=name)
    return max(plan.flops / flops_rate, plan.bytes / copy_rate)
