"""Times the candidates of `configs` on the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import NamedTuple

import torch
from triton.runtime import driver

from . import products
from .configs import Config, Shape, Table, choose, turns_of
from .configs import table as shipped

_ROUNDS = 3
_SIDES = (1024, 2048, 4096, 8192)
_SHORT = 4  # the other k is so many times shorter: two show what a tile takes beside its k
_TILES_A_MULTIPROCESSOR = 8  # of the largest tiles: enough that the last ones do not count


class _Fit(NamedTuple):
    """Time of a product as a sum: of a k of 1 by element, and of what a tile takes beside, as so many k."""

    slope: float
    fixed: float


def _fit(config: Config, shape: Shape, multiprocessors: int, short: float, long: float) -> _Fit:
    """Fit the times of a product with a k of shape.k / _SHORT and of shape.k."""
    tiles, turns = turns_of(config, shape, multiprocessors)
    slope = max(long - short, 1e-3 * long) / (tiles * (shape.k - shape.k // _SHORT))
    fixed = max(0.0, long - slope * tiles * shape.k) / (turns * slope)
    return _Fit(slope / (config.block_m * config.block_n), fixed)


def _relative(fits: dict[Config, list[_Fit]]) -> tuple[Config, ...]:
    """Return the candidates with the means of their fits; costs are relative to the least."""
    best = min(fit.slope for of_one in fits.values() for fit in of_one)
    return tuple(
        config._replace(cost=mean(f.slope for f in of_one) / best, fixed=mean(f.fixed for f in of_one))
        for config, of_one in fits.items()
    )


def measure(
    time: Callable[[Callable[[], None]], float], sides: tuple[int, ...] = _SIDES
) -> Iterator[tuple[str, float, Table | None]]:
    """Time all candidates on the current device.

    Args:
        time: milliseconds that a call takes.
        sides: of the matrices for which the vendor's library is tried.

    Yields:
        (what was timed, TFLOP/s, None), and at last ("", 0, the table).
    """
    device = driver.active.get_current_device()
    multiprocessors = int(driver.active.utils.get_device_properties(device)["multiprocessor_count"])
    torch_device = driver.active.get_active_torch_device()
    side = sides[0]
    ks = side // _SHORT, side
    candidates = shipped(driver.active.get_current_target().arch).configs
    largest = max(c.block_m * c.block_n for c in candidates)
    batch = max(1, _TILES_A_MULTIPROCESSOR * multiprocessors * largest // side**2)
    a, x, c, out = (torch.randn(batch, side, side, device=torch_device).bfloat16() for _ in range(4))

    def call(config: Config, symmetric: bool, k: int) -> Callable[[], None]:
        A, B = a[..., :k], a[..., :k] if symmetric else x[:, :k]
        return lambda: products.product(
            A, B, out, b_transposed=symmetric, symmetric=symmetric, c=c, beta=0.5, config=config
        )

    rivals = [(config, s, k) for config in candidates for s in (False, True) if config.residents[s] for k in ks]
    times: dict[tuple[Config, bool, int], list[float]] = {rival: [] for rival in rivals}
    for _ in range(_ROUNDS):  # in turns: a clock that changes changes all
        for rival in rivals:
            times[rival].append(time(call(*rival)))
    fits: dict[Config, list[_Fit]] = {config: [] for config in candidates}
    for config, s, k in rivals:
        took = median(times[config, s, k])
        what = f"{'syrk' if s else 'gemm'} {config.block_m}x{config.block_n}x{config.block_k}, k = {k}"
        yield what, batch * side**2 * k * (1 if s else 2) / took / 1e9, None
        if k == side:
            shape = Shape(batch, side, side, side, s)
            fits[config].append(_fit(config, shape, multiprocessors, median(times[config, s, ks[0]]), took))
    table = Table(_relative(fits), None)
    for side in reversed(sides):
        shape = Shape(1, side, side, side, False)
        try:
            a, x, c, out = (torch.randn(1, side, side, device=torch_device).bfloat16() for _ in range(4))
            diagonal = torch.randn(1, side, device=torch_device)
            config = choose(shape, table, multiprocessors)
            ours = lambda: products.product(a, x, out, a_diagonal=diagonal, c=c, beta=0.5, config=config)  # noqa: B023
            theirs = lambda: products.gemm_by_vendor(a, x, c, out, diagonal, 1.0, 0.5, None)  # noqa: B023
            turns = [(time(ours), time(theirs)) for _ in range(_ROUNDS)]
        except torch.OutOfMemoryError:
            continue
        for who, took in zip(("ours", "the vendor's"), map(median, zip(*turns, strict=True)), strict=True):
            yield f"gemm of {side}, {who}", 2.0 * side**3 / took / 1e9, None
        if not median(their / our for our, their in turns) < 1:
            break
        table = table._replace(vendor_from=side)
    yield "", 0.0, table
