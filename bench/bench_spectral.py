"""Powers of the spectrum: their costs beside `orthogonalize` and the paper's iteration, and how exact they are.

pytest bench/bench_spectral.py --benchmark-columns=median,iqr,rounds
python bench/bench_spectral.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache, partial

import measure
import pytest
import torch
from papers_power import papers_power
from torch import Tensor

from muon_kernels import orthogonalize, spectral_power

# (batch, m, n), as in bench_products.py, and small ones
SHAPES = [(4, 768, 3072), (8, 768, 768), (2, 2048, 2048), (16, 384, 1024), (128, 64, 768), (512, 64, 64)]
POWERS = (0.5, 0.25)
ROUNDS = 5


RUNS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonalize": orthogonalize,
    **{f"power {p}": partial(spectral_power, p=p) for p in POWERS},
    **{f"paper {p}": partial(papers_power, p=p) for p in POWERS},
}


@cache
def times(shape: tuple[int, int, int]) -> dict[str, list[float]]:
    """Time all implementations in turns, so that what else the machine does meets all of them; return seconds."""
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(ROUNDS + 1):
        for name, run in RUNS.items():
            begin = time.perf_counter()
            run(G)
            taken[name].append(time.perf_counter() - begin)
    return {name: of[1:] for name, of in taken.items()}


def ratio(shape: tuple[int, int, int], name: str, to: str) -> float:
    """Return how many times as long `name` takes as `to`, the median over the rounds."""
    taken = times(shape)
    return statistics.median(a / b for a, b in zip(taken[name], taken[to], strict=True))


def error(p: float, run: Callable[[Tensor], Tensor], shape: tuple[int, int] = (256, 1024)) -> tuple[float, float]:
    """Return the worst and the rms relative error of singular values on a logarithmic scale from 1 to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    U = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64)).Q
    S = torch.logspace(0, -3, m, dtype=torch.float64)
    Y = run(((U * S) @ V.mT).float()[None])[0].double()
    off = torch.einsum("mi,mn,ni->i", U, Y, V) / S**p - 1
    return off.abs().max().item(), off.square().mean().sqrt().item()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", RUNS)
def test_power(benchmark, name: str, shape: tuple[int, int, int]) -> None:
    benchmark.group = str(shape)
    measure.report(benchmark, times(shape)[name])
    benchmark.extra_info["to_orthogonalize"] = ratio(shape, name, "orthogonalize")


def table() -> str:
    """Return a table with a line for every shape, and one for every implementation's errors."""
    lines = [f"{measure.describe('cpu')}\n"]
    heads = [f"{kind} {p:g}" for p in POWERS for kind in ("power/orthogonalize", "paper/power")]
    lines.append(f"{'':16}" + "".join(f"{head:>27}" for head in heads))
    for shape in SHAPES:
        cells = (
            f"{ratio(shape, a, b):27.2f}"
            for p in POWERS
            for a, b in ((f"power {p}", "orthogonalize"), (f"paper {p}", f"power {p}"))
        )
        lines.append(f"{shape!s:16}" + "".join(cells))
    lines.append("\nrelative error of singular values from 1 to 1e-3, worst and rms")
    for p in POWERS:
        for name in (f"power {p}", f"paper {p}"):
            worst, rms = error(p, RUNS[name])
            lines.append(f"{name:16}{100 * worst:6.1f} %{100 * rms:6.1f} %")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
