"""Times the kinds of products that can run on the GPU at hand, each through its backend's verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from ..coefficients import DEFAULT, resolve
from ..newton_schulz import Square, standard
from . import cuda, get
from .kinds import TRITON, Ranking

_SIDES = (256, 512, 1024, 2048, 4096)
_ELEMENTS = 1 << 26  # of a stack: thousands of tiles, so that the last ones do not count
_APART = 0.01  # more than rounding to bf16 brings, relative to the norm

Runs = Mapping[str, Callable[[], Tensor]]


def measure(
    turns: Callable[[Runs], Mapping[str, list[float]]],
    device: torch.device,
    sides: tuple[int, ...] = _SIDES,
    elements: int = _ELEMENTS,
) -> Iterator[tuple[str, float, tuple[Ranking, ...] | None]]:
    """Time the products of a step of the iteration, of stacks of m x 2m, by every kind.

    Args:
        turns: seconds that each of the calls takes, measured in turns.
        device: a GPU that the cuda backend takes.
        sides: m, increasing.
        elements: of a stack.

    Yields:
        (what was timed, TFLOP/s, None), and at last ("", 0, the rankings).

    Raises:
        RuntimeError: kinds give different results, so that one of them is wrong here.
    """
    rankings: list[Ranking] = []
    for m in sides:
        batch = max(1, elements // (2 * m * m))
        runs = _runs(batch, m, device)
        _agree(runs, f"{batch} of {m}x{2 * m}")
        times = turns(runs)
        for kind, each in times.items():
            yield f"{batch} of {m}x{2 * m}, {kind}", 7 * batch * m**3 / median(each) / 1e12, None
        # Fewer rows than were timed are ranked as the fewest that were, down to those of fused steps.
        rows = m if rankings else min(m, max(cuda.FUSED_ROWS.values()) + 1)
        if not rankings or rankings[-1].kinds != _ranked(times):
            rankings.append(Ranking(rows, _ranked(times)))
    yield "", 0.0, tuple(rankings)


def _agree(runs: Runs, what: str) -> None:
    """Raise RuntimeError unless all kinds give one result: "auto" would step by one that nobody has verified here."""
    results = {kind: run().clone() for kind, run in runs.items()}
    for one, other in pairwise(results):
        apart = torch.linalg.vector_norm(results[one].float() - results[other].float())
        if not apart <= _APART * torch.linalg.vector_norm(results[one].float()):
            raise RuntimeError(
                f"products by {one} and by {other} differ on {what}; python -m muon_kernels verify shows which are "
                "wrong; please report it"
            )


def _ranked(times: Mapping[str, list[float]]) -> tuple[str, ...]:
    """Return the kinds, the fastest first, by medians of ratios: a clock that changes changes both."""
    first = next(iter(times.values()))
    ratios = {kind: median(t / f for t, f in zip(each, first, strict=True)) for kind, each in times.items()}
    return tuple(sorted(ratios, key=lambda kind: ratios[kind]))


def _runs(batch: int, m: int, device: torch.device) -> Runs:
    """Return a program of one step for every kind.

    X is only read, so that it may run again and again; its singular values are about 1, so that every product counts.
    """
    X = (torch.randn(batch, m, 2 * m, device=device) / (2 * m) ** 0.5).bfloat16()
    Y = torch.empty_like(X)
    A, B = (Square(X.new_empty(batch, m, m), torch.empty(batch, m, device=device)) for _ in range(2))
    runs: dict[str, Callable[[], Tensor]] = {}
    for kind in cuda.kinds_there(X.device):
        ops = get(TRITON if kind == TRITON else "cuda")
        with cuda.multiplying_by(kind, X.device):
            runs[kind] = ops.program(partial(standard, ops, X, Y, (A, B), None, resolve(DEFAULT, 1)))
    return runs
