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
# Between elements, relative to their root mean square. Roundings to bf16 bring 0.03; a k-step of 64 that one tile loses
# brings 3.
_APART = 0.25
_MARGIN = 1.02  # by which a kind must be faster than the one that is expected to be

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
        DifferentResults: of two kinds, so that one of them is wrong here.
    """
    rankings: list[Ranking] = []
    for m in sides:
        batch = max(1, elements // (2 * m * m))
        runs = _runs(batch, m, device)
        _agree(runs, f"{batch} of {m}x{2 * m}")
        _agree(_runs(3, m + 24, device), f"3 of {m + 24}x{2 * m + 48}")  # not of whole tiles
        times = turns(runs)
        for kind, each in times.items():
            yield f"{batch} of {m}x{2 * m}, {kind}", 7 * batch * m**3 / median(each) / 1e12, None
        # Fewer rows than were timed are ranked as the fewest that were, down to those of fused steps.
        rows = m if rankings else min(m, max(cuda.FUSED_ROWS.values()) + 1)
        if not rankings or rankings[-1].kinds != _ranked(times):
            rankings.append(Ranking(rows, _ranked(times)))
    yield "", 0.0, tuple(rankings)


class DifferentResults(RuntimeError):
    """Products of two kinds that are not the same but for rounding."""


def _agree(runs: Runs, what: str) -> None:
    """Raise DifferentResults unless every element is the same but for rounding: "auto" would step by what is wrong."""
    results = {kind: run().float() for kind, run in runs.items()}
    for one, other in pairwise(results):
        apart = (results[one] - results[other]).abs().amax()
        if not apart <= _APART * results[one].square().mean().sqrt():
            raise DifferentResults(
                f"products by {one} and by {other} differ on {what}; python -m muon_kernels verify shows which are "
                "wrong; please report it"
            )


def _ranked(times: Mapping[str, list[float]]) -> tuple[str, ...]:
    """Return the kinds, the fastest first, by medians of ratios: a clock that changes changes both.

    The first of `times` is the one that is expected to be faster. It stays so unless another is by more than noise.
    """
    first = next(iter(times.values()))
    ratios = {kind: median(t / f for t, f in zip(each, first, strict=True)) for kind, each in times.items()}
    ratios[next(iter(times))] /= _MARGIN
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
