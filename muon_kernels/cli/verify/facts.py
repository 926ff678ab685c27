"""Stages 0 and 1: what is here, and what this GPU can do at best."""

from __future__ import annotations

from typing import Any

import torch

from ... import backends
from ..doctor import facts, verdict
from .stage import Context, Result
from .timing import clocks, in_turns, one_after_another, wall

_LISTED = ("name", "multi_processor_count", "L2_cache_size", "total_memory", "shared_memory_per_block_optin")


def look(context: Context) -> Result:
    """List versions, backends and the GPU."""
    place = context.place
    data: dict[str, Any] = {name or "instructions": value for name, value in facts()}
    data["backends"] = {name: verdict(name) for name in backends.BACKENDS}
    data["checked"] = list(place.backends)
    data["device"] = described = "processor" if place.kind == "cpu" else f"executor of {place.architecture}"
    if place.kind == "gpu":
        properties = torch.cuda.get_device_properties(0)
        data["gpu"] = {name: getattr(properties, name, None) for name in _LISTED}
        data["gpu"] |= {"capability": f"{properties.major}.{properties.minor}", **clocks(place.device)}
        data["device"] = described = properties.name
    return Result(f"{described}; {', '.join(place.backends)}", data)


def ceilings(context: Context) -> Result:
    """Measure what everything else is a share of: a copy, torch's products, a launch, a node of a graph."""
    sizes, device = context.sizes, context.place.device
    data: dict[str, Any] = {"clocks before": clocks(device)}
    data["copy, B/s"] = _copy_rate(context)
    rates = {}
    for batch, side in ((1, side) for side in sizes.matmuls):
        rates[f"{side}³"] = _rate(context, batch, side)
    for batch, side in sizes.bmms:
        rates[f"{batch} of {side}³"] = _rate(context, batch, side)
    data["matmul, FLOP/s"] = rates
    data |= _launches(context)
    data["clocks after"] = clocks(device)
    best = max(rates.values())
    summary = f"{best / 1e12:.0f} TFLOP/s, {data['copy, B/s'] / 1e12:.2f} TB/s, {data['launch, us']:.1f} µs a launch"
    return Result(summary, data)


def _copy_rate(context: Context) -> float:
    """Return bytes a second, read and written ones, of a copy that takes a quarter of the free memory at most."""
    device, bytes_ = context.place.device, context.sizes.copied
    if device == "cuda":
        bytes_ = min(bytes_, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randn(bytes_ // 8, device=device)
    target = torch.empty_like(source)
    taken = in_turns({"copy": lambda: target.copy_(source)}, device, context.sizes.rounds)
    return 2 * source.numel() * source.itemsize / taken["copy"]


def _rate(context: Context, batch: int, side: int) -> float:
    """Return FLOP/s of torch's product of random bf16: of zeros it would be an eighth faster."""
    device = context.place.device
    A, B, out = (torch.randn(batch, side, side, device=device).bfloat16() for _ in range(3))
    taken = in_turns({"bmm": lambda: torch.bmm(A, B, out=out)}, device, context.sizes.rounds)
    return 2 * batch * side**3 / taken["bmm"]


def _launches(context: Context) -> dict[str, float]:
    """Return microseconds that the host takes for a launch, and that a graph takes for a node, of next to no work."""
    device, count = context.place.device, context.sizes.launches
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(count):
            x.add_(1)

    from_host = in_turns({"launches": many}, device, context.sizes.rounds, time_=wall)["launches"]
    graph = one_after_another([many], device)
    nodes = in_turns({"nodes": graph}, device, context.sizes.rounds)["nodes"]
    return {"launch, us": from_host / count * 1e6, "graph node, us": nodes / count * 1e6}


def peaks(context: Context) -> tuple[float, float]:
    """Return FLOP/s and B/s that were measured; infinite if they were not."""
    found = context.found.get("ceilings", {})
    rates = found.get("matmul, FLOP/s", {})
    return max(rates.values(), default=float("inf")), found.get("copy, B/s", float("inf"))
