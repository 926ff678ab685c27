"""Rates of the products alone, ours beside torch's.

All are counted on the FLOPs of a symmetric result's triangle, in percent of torch.matmul in the dtype that our kernels
multiply in, timed before and after each: others on a machine slow both. On a GPU too, where there is one.
MUON_KERNELS_CPU_ISA picks a processor's instruction set.

    pytest bench/bench_products.py --benchmark-columns=median,iqr,rounds
    python bench/bench_products.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import measure
import pytest
import torch
from torch import Tensor

from muon_kernels import backends
from muon_kernels.newton_schulz import Square

# (batch, m, n): GPT-2's MLP and attention, a square, a Llama-style MLP, MoE experts, heads, small squares
SHAPES = {
    "cpu": [
        *((4, 768, 3072), (4, 768, 768), (1, 2048, 2048), (1, 2048, 5632)),
        *((16, 384, 1024), (128, 64, 768), (256, 64, 64)),
    ],
    "cuda": [
        *((24, 768, 3072), (12, 768, 768), (1, 2048, 2048), (1, 4096, 4096), (3, 4096, 11008)),
        *((64, 1024, 2048), (32, 384, 1024), (144, 64, 768), (256, 64, 64)),
    ],
}
# A fused step takes matrices as small as the last two through all products while caches hold them: so many in a row.
IN_A_ROW = 16
PRODUCTS = ("syrk", "syrk + C", "gemm + C")
TORCH = "torch"
ROUNDS = 7


class Timed(NamedTuple):
    """Seconds of a product and, from before and after it, torch.matmul's mean FLOP/s."""

    seconds: float
    rate: float


class Call(NamedTuple):
    """A product and the tensor that it writes."""

    run: Callable[[], object]
    out: Tensor


def calls(implementation: str, batch: int, m: int, n: int, device: str) -> dict[str, Call]:
    """Return X Xᵀ, b A + c A² and a X + B X, each of memory of its own; our squares with their fp32 diagonals."""
    pad = backends.get(implementation).leading_dimension if implementation != TORCH else lambda cols: cols

    def stack(cols: int) -> Tensor:
        values = torch.randn(batch, m, cols, device=device)
        return values.new_empty(batch, m, pad(cols), dtype=torch.bfloat16)[..., :cols].copy_(values)

    def square() -> Square:
        high = stack(m)
        return Square(high.copy_(high + high.mT), torch.randn(batch, m, device=device) * 1e-3)

    X, Y, A, B, out = stack(n), stack(n), square(), square(), square()
    if implementation == TORCH:
        dtype = measure.peak_dtype(device)
        X, Y = X.to(dtype), Y.to(dtype)
        A, B, out = (Square(S.high.to(dtype)) for S in (A, B, out))
        return {
            "syrk": Call(lambda: torch.bmm(X, X.mT, out=out.high), out.high),
            "syrk + C": Call(
                lambda: torch.baddbmm(A.high, A.high, A.high.mT, alpha=0.5, beta=0.5, out=out.high), out.high
            ),
            "gemm + C": Call(lambda: torch.baddbmm(X, B.high, X, beta=0.5, out=Y), Y),
        }
    ops = backends.get(implementation)
    return {
        "syrk": Call(lambda: ops.syrk(X, out=out), out.high),
        "syrk + C": Call(lambda: ops.syrk(A, C=A, alpha=0.5, beta=0.5, out=out), out.high),
        "gemm + C": Call(lambda: ops.gemm(B, X, C=X, beta=0.5, out=Y), Y),
    }


def flops(product: str, batch: int, m: int, n: int) -> int:
    return batch * m * {"syrk": (m + 1) * n, "syrk + C": (m + 1) * m, "gemm + C": 2 * m * n}[product]


def in_a_row(implementation: str, call: Call, count: int) -> Callable[[], object]:
    """Return what makes a product `count` times, matrix by matrix where the implementation's programs go so."""
    if count == 1:
        return call.run

    def run() -> Tensor:
        for _ in range(count):
            call.run()
        return call.out

    return run if implementation == TORCH else backends.get(implementation).program(run)


@cache
def times(implementation: str, shape: tuple[int, int, int], device: str, count: int = 1) -> dict[str, list[Timed]]:
    """Time each product in every round, `count` in a row; return means over operands that no cache holds at first."""
    batch, m, n = shape
    fewest = 2 * 2 * batch * m * min(m, n)  # bytes of what the smallest product reads and writes
    ring = measure.ring(lambda: calls(implementation, *shape, device), fewest, measure.cache_bytes(device))
    taken = {}
    for product in PRODUCTS:
        run = measure.one_after_another([in_a_row(implementation, each[product], count) for each in ring], device)
        rounds = []
        measure.spin(device)
        for _ in range(ROUNDS + 1):
            before, seconds = measure.rate(device), measure.seconds(run, device) / len(ring) / count
            rounds.append(Timed(seconds, (before + measure.rate(device)) / 2))
        taken[product] = rounds[1:]
    return taken


def percent(implementation: str, shape: tuple[int, int, int], product: str, device: str, count: int = 1) -> float:
    """Return a product's rate in percent of torch.matmul's."""
    rounds = times(implementation, shape, device, count)[product]
    return 100 * flops(product, *shape) * statistics.median(1 / each.seconds / each.rate for each in rounds)


ROWS = [
    (device, name, shape)
    for device in measure.DEVICES
    for name in (TORCH, *measure.own(device))
    if name != "eager"
    for shape in SHAPES[device]
]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("device", "implementation", "shape"), ROWS, ids=["-".join([*r[:2], "x".join(map(str, r[2]))]) for r in ROWS]
)
def test_product(benchmark, device: str, implementation: str, product: str, shape: tuple[int, int, int]) -> None:
    if reason := measure.missing(device):
        pytest.skip(reason)
    benchmark.group = f"{product}, {shape}, {device}"
    measure.report(benchmark, [each.seconds for each in times(implementation, shape, device)[product]])
    benchmark.extra_info["percent_of_rate"] = percent(implementation, shape, product, device)


def table(device: str) -> str:
    """Return a table with a line for every shape: ours, and in parentheses torch's."""
    own = measure.own(device)[0]
    lines = [f"{measure.describe(device)}\n{measure.peak_line(device)}; {own} (torch) in percent of it\n"]
    rows = *((shape, 1) for shape in SHAPES[device]), *((shape, IN_A_ROW) for shape in SHAPES[device][-2:])
    for shape, count in rows:
        cells = (
            f"{p} {percent(own, shape, p, device, count):4.0f} ({percent(TORCH, shape, p, device, count):3.0f})"
            for p in PRODUCTS
        )
        lines.append(f"{shape!s:16} " + "  ".join(cells) + (f"  {count} in a row" if count > 1 else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    for device in measure.DEVICES:
        reason = measure.missing(device)
        print(f"{device}: {reason}" if reason else table(device), end="\n\n")
