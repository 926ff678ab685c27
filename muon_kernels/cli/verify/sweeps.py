"""Stages 4 and 5: what a tile costs and what a launch costs besides; which backend is faster from which size on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...checks.products import Run
from .implementations import Implementation, implementations
from .stage import Context, Result
from .timing import clocks, fit, in_turns, repeated

TORCH = "torch"
_REPEATED = 8  # calls in a graph: the start of the first counts little
_TILE = 128  # side of the tiles by which a batch is made of waves


def rivals(context: Context) -> list[Implementation]:
    """Return all implementations of bf16 products that are timed, and torch's."""
    ours = [each for each in implementations(context.place, torch.bfloat16) if each.name != "eager"]
    return [*ours, Implementation(TORCH, _torchs)]


def _torchs(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    other, c = (b.mT if options.get("b_transposed") else b), options.get("c")
    if c is None:
        torch.bmm(a, other, out=out)
    else:
        torch.baddbmm(c, a, other, beta=options["beta"], out=out)


def _normal(context: Context, *shape: int) -> Tensor:
    return torch.randn(*shape, device=context.place.device).bfloat16()


def sweep(context: Context) -> Result:
    """Time every tile along k, on square results and on others, and fit fixed + slope k to each."""
    sizes, place = context.sizes, context.place
    data: dict[str, Any] = {"clocks before": clocks(place.device), "us": {}, "fits": {}}
    kinds: dict[str, Callable[..., Any]] = {"square": _square, "wide": _wide}
    left_out = 0
    for waves in sizes.waves:
        for kind, make in kinds.items():
            if context.left() <= 0:
                left_out += 1
                continue
            name = f"{kind}, {waves} waves"
            times = _along_k(context, waves, make, only_square=kind == "square")
            data["us"][name] = times
            data["fits"][name] = {rival: _fitted(points) for rival, points in times.items() if len(points) > 1}
    data["clocks after"] = clocks(place.device)
    best = {
        kind: min(fits, key=lambda rival: fits[rival]["slope, us a k-step of 64"])
        for kind, fits in data["fits"].items()
    }
    summary = "; ".join(f"{kind}: {rival}" for kind, rival in list(best.items())[:2])
    return Result(f"least slope: {summary}" + (f"; no time for {left_out} of the sweeps" if left_out else ""), data)


def _fitted(points: dict[int, float]) -> dict[str, float]:
    fixed, slope = fit(points)
    return {"fixed, us": fixed, "slope, us a k-step of 64": 64 * slope}


def _along_k(context: Context, waves: int, make: Callable[..., Any], only_square: bool) -> dict[str, dict[int, float]]:
    """Return microseconds of a product by implementation and k."""
    sizes, place = context.sizes, context.place
    along = sizes.side // _TILE
    tiles = along * (along + 1) // 2 if only_square else along**2
    batch = max(1, waves * place.multiprocessors // max(1, tiles))
    times: dict[str, dict[int, float]] = {}
    for k in sizes.ks:
        runs = {
            each.name: repeated(make(context, each.run, batch, sizes.side, k), _REPEATED, place.device)
            for each in rivals(context)
            if each.square or not only_square
        }
        for name, taken in in_turns(runs, place.device, sizes.rounds, context.left).items():
            times.setdefault(name, {})[k] = taken / _REPEATED * 1e6
        if context.left() <= 0:
            break
    return times


def _square(context: Context, run: Run, batch: int, side: int, k: int) -> Callable[[], None]:
    X, out = _normal(context, batch, side, k), _normal(context, batch, side, side)
    return partial(run, X, X, out, b_transposed=True, symmetric=True)


def _wide(context: Context, run: Run, batch: int, side: int, k: int) -> Callable[[], None]:
    A, X, out = _normal(context, batch, side, k), _normal(context, batch, k, side), _normal(context, batch, side, side)
    return partial(run, A, X, out)


def crossovers(context: Context) -> Result:
    """Time b A + c A² and a X + B X of every backend, as each chooses its tiles, and of torch, by size and batch."""
    sizes, place = context.sizes, context.place
    chosen = [each for each in rivals(context) if not each.fixed]
    data: dict[str, Any] = {"clocks before": clocks(place.device), "us": {}}
    left_out = 0
    for batch in sizes.batches:
        for m in sizes.sides:
            if context.left() <= 0:
                left_out += 1
                continue
            try:
                data["us"][f"{batch} of {m}"] = _compared(context, chosen, batch, m)
            except torch.OutOfMemoryError:
                left_out += 1
    data["clocks after"] = clocks(place.device)
    data["fastest"] = {
        at: {what: min(times, key=lambda name: times[name]) for what, times in both.items()}
        for at, both in data["us"].items()
    }
    wins = [who for both in data["fastest"].values() for who in both.values()]
    summary = ", ".join(f"{name} fastest in {wins.count(name)}" for name in dict.fromkeys(wins))
    return Result(
        f"of {len(wins)}: {summary}" + (f"; no time or memory for {left_out} sizes" if left_out else ""), data
    )


def _compared(context: Context, chosen: list[Implementation], batch: int, m: int) -> dict[str, dict[str, float]]:
    """Return microseconds by product and implementation; without those for which there is no memory."""
    place = context.place
    found = {}
    for what, b_transposed in (("square", True), ("gemm", False)):
        A, X, out = (_normal(context, batch, m, m) for _ in range(3))
        A.copy_(A + A.mT)
        options = {"b_transposed": b_transposed, "symmetric": b_transposed, "beta": 0.5}
        b, c = (A, A) if b_transposed else (X, X)
        runs = {
            each.name: repeated(partial(each.run, A, b, out, c=c, **options), _REPEATED, place.device)
            for each in chosen
        }
        times = in_turns(runs, place.device, min(3, context.sizes.rounds), context.left)
        found[what] = {name: taken / _REPEATED * 1e6 for name, taken in times.items()}
    return found
