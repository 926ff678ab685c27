"""Times the candidates of `configs` on the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import torch
from triton.runtime import driver

from . import products
from .configs import Config, Shape, Table, choose
from .configs import table as shipped

_ROUNDS = 3
_SIDES = (1024, 2048, 4096, 8192)
_TILES_A_MULTIPROCESSOR = 8  # of the largest tiles: enough that the last ones do not count


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
    candidates = shipped(driver.active.get_current_target().arch).configs
    largest = max(c.block_m * c.block_n for c in candidates)
    batch = max(1, _TILES_A_MULTIPROCESSOR * multiprocessors * largest // side**2)
    a, x, c, out = (torch.randn(batch, side, side, device=torch_device).bfloat16() for _ in range(4))
    flops = 2.0 * batch * side**3

    def call(config: Config, symmetric: bool) -> Callable[[], None]:
        b = a if symmetric else x
        return lambda: products.product(
            a, b, out, b_transposed=symmetric, symmetric=symmetric, c=c, beta=0.5, config=config
        )

    rivals = [(config, s) for config in candidates for s in (False, True) if not s or config.block_m == config.block_n]
    times: dict[tuple[Config, bool], list[float]] = {rival: [] for rival in rivals}
    for _ in range(_ROUNDS):  # in turns: a clock that changes changes all
        for rival in rivals:
            times[rival].append(time(call(*rival)))
    relative: dict[Config, list[float]] = {config: [] for config in candidates}
    for s in (False, True):
        best = min(median(times[rival]) for rival in rivals if rival[1] == s)
        for config, symmetric in rivals:
            if symmetric == s:
                took = median(times[config, s])
                relative[config].append(took / best)
                what = f"{'syrk' if s else 'gemm'} {config.block_m}x{config.block_n}x{config.block_k}"
                yield what, flops * (0.5 if s else 1) / took / 1e9, None
    table = Table(tuple(c._replace(cost=sum(relative[c]) / len(relative[c])) for c in candidates), None)
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
