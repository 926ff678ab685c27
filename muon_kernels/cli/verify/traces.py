"""Stages 7, 8 and 9: what a step's kernels take one by one, passes over memory, fused steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...layout import Matrices, layout
from ...optimizers.muon import Muon
from ...verbs import ApplyUpdate, MomentumUpdate
from .facts import peaks
from .stage import Context, Result
from .steppers import Step, own, parameters
from .timing import clocks, flusher, in_turns, one_after_another, wall


class Ran(NamedTuple):
    """A kernel that ran, from `begin` to `end` in microseconds."""

    name: str
    begin: float
    end: float


def gaps(context: Context) -> Result:
    """Profile steps: how long the GPU was busy, how long it waited between kernels, and for which kernels."""
    data: dict[str, Any] = {}
    device = context.place.device
    for workload in context.sizes.traced:
        for name, make in own([n for n in context.place.backends if n != "eager"]).items():
            params = parameters(context.sizes.workloads[workload], device)
            step = make(params)
            for _ in range(2):
                step()
            took = in_turns({"step": step}, device, context.sizes.rounds, context.left, time_=wall)["step"]
            data[f"{workload}, {name}"] = {"wall, us": took * 1e6, **busy(profiled(step, device))}
    shares = [f"{name} {100 * each['busy, us'] / max(each['span, us'], 1e-9):.0f} %" for name, each in data.items()]
    return Result(f"busy: {'; '.join(shares)}", data)


def profiled(step: Step, device: str) -> list[Ran]:
    """Return what ran on the device in one step."""
    kind = "CUDA" if device == "cuda" else "CPU"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return [
        Ran(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name == kind and not getattr(event, "is_user_annotation", False)
    ]


def busy(kernels: Sequence[Ran]) -> dict[str, Any]:
    """Return the time that kernels ran, from the first to the last, and each one's; kernels may overlap."""
    total, reached = 0.0, float("-inf")
    by_name: dict[str, list[float]] = {}
    for name, begin, end in sorted(kernels, key=lambda each: each.begin):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
        by_name.setdefault(name, []).append(end - begin)
    return {
        "kernels": len(kernels),
        "busy, us": total,
        "span, us": max((k.end for k in kernels), default=0.0) - min((k.begin for k in kernels), default=0.0),
        "by name": {
            name: {"calls": len(each), "us": sum(each)}
            for name, each in sorted(by_name.items(), key=lambda item: -sum(item[1]))
        },
    }


def passes(context: Context) -> Result:
    """Time momentum_update and apply_update by dtype and shape, in bytes a second and in percent of a copy."""
    device = context.place.device
    data: dict[str, Any] = {"clocks before": clocks(device), "B/s": {}}
    _, copy = peaks(context)
    for name in context.place.backends:
        for dtype in (torch.float32, torch.bfloat16):
            if backends.get(name).refuses(torch.device(device), [dtype], torch.bfloat16) is not None:
                continue
            for rows, cols, count in context.sizes.passes:
                if context.left() <= 0:
                    break
                what = f"{name}, {str(dtype).removeprefix('torch.')}, {count} of {rows}x{cols}"
                data["B/s"][what] = _rates(context, name, dtype, rows, cols, count)
    data["clocks after"] = clocks(device)
    best = max((rate for both in data["B/s"].values() for rate in both.values()), default=0.0)
    return Result(f"at best {100 * best / copy:.0f} % of a copy's rate", data)


def _rates(context: Context, name: str, dtype: torch.dtype, rows: int, cols: int, count: int) -> dict[str, float]:
    """Return bytes a second of both passes: what is read and written counts twice."""
    device, ops = context.place.device, backends.get(name)
    grads, momenta, params = (
        [torch.randn(rows, cols, device=device).to(dtype) for _ in range(count)] for _ in range(3)
    )
    m, n = min(rows, cols), max(rows, cols)
    X = torch.empty(count, m, ops.leading_dimension(n), dtype=torch.bfloat16, device=device)[..., :n]
    scratch = torch.empty(count * ops.scratch_bytes(m, n), dtype=torch.uint8, device=device)
    lists = [[_matrices(t) for t in each] for each in (grads, momenta, params)]
    update = MomentumUpdate(lists[0], lists[1], X, 0.95, True, True, 1.0, 1e-7, 1.0, scratch)
    apply = ApplyUpdate(lists[2], X, 1e-3, 0.1, [1.0] * count)
    runs: dict[str, Step] = {
        "momentum": partial(ops.momentum_update, update),
        "apply": partial(ops.apply_update, apply),
    }
    graphs = {what: one_after_another([run], device) for what, run in runs.items()}
    times = in_turns(graphs, device, context.sizes.rounds, context.left, flusher(device))
    elements, size = count * rows * cols, dtype.itemsize
    bytes_ = {"momentum": elements * (3 * size + 2), "apply": elements * (2 * size + 2)}
    return {what: bytes_[what] / times[what] for what in runs}


def _matrices(t: Tensor) -> Matrices:
    at = layout(t.shape, t.stride(), None, ())
    assert at is not None
    return Matrices(t, at)


def fused(context: Context) -> Result:
    """Time fused steps by the number of matrices, and by their rows and columns."""
    sizes, device = context.sizes, context.place.device
    data: dict[str, Any] = {"clocks before": clocks(device), "us": {}}
    left_out = 0
    for name in context.place.backends:
        for rows in sizes.fused_rows:
            for cols, count in _crossed(sizes.fused_columns, sizes.fused_counts):
                if context.left() <= 0:
                    left_out += 1
                    continue
                if took := _fused(context, name, rows, cols, count):
                    data["us"][f"{name}, {count} of {rows}x{cols}"] = took * 1e6
    data["clocks after"] = clocks(device)
    return Result(f"{len(data['us'])} sizes" + (f"; no time for {left_out} more" if left_out else ""), data)


def _crossed(columns: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (columns, count): all counts of the second width, and all widths of as many as there are blocks."""
    middle = columns[min(1, len(columns) - 1)]
    some = counts[len(counts) // 2]
    return [*((middle, count) for count in counts), *((n, some) for n in columns if n != middle)]


def _fused(context: Context, name: str, rows: int, cols: int, count: int) -> float | None:
    """Return the seconds of a step, replayed; None where the backend does not fuse the step of such matrices."""
    device = context.place.device
    muon = Muon(parameters([(rows, cols, count)], device), backend=name)
    muon.step()
    if not all(bucket.fused for bucket in muon.plan().buckets):
        return None
    replay: Callable[[], object] = one_after_another([muon.step], device)
    return in_turns({"step": replay}, device, context.sizes.rounds, context.left)["step"]
