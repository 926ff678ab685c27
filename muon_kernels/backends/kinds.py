"""Kinds of products that a GPU has, and which of them `python -m muon_kernels tune` found to be faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from .. import kept
from .._version import __version__

# Triton's, and two of csrc/cuda: product_sm90.cu and product_sm80.cu.
TRITON, WGMMA, MMA = "triton", "wgmma", "mma.sync"


class Ranking(NamedTuple):
    """The order of all kinds, the fastest first, for matrices with so many rows and more.

    A backend that somebody has named takes the first of its own.
    """

    rows: int
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        """Write it for a person."""
        return f"from {self.rows} rows on: {', '.join(self.kinds)}"


def ranking_for(rankings: Sequence[Ranking], rows: int) -> Ranking | None:
    """Return the ranking for so many rows; None where nothing was measured."""
    return next((ranking for ranking in reversed(rankings) if ranking.rows <= rows), None)


def file_of(gpu: str) -> Path:
    """Return the file for the rankings on a GPU of that name, with these versions of both packages."""
    return kept.file_of(f"{gpu} muon_kernels {__version__} triton {_triton()}")


def _triton() -> str:
    """Return triton's version, without importing it."""
    for package in ("triton", "pytorch-triton"):  # the latter comes with torch's nightly builds
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "none"


def save(file: Path, rankings: Sequence[Ranking]) -> None:
    """Keep rankings for later processes; RuntimeError, with how to fix it, if that fails."""
    kept.save(file, {"kinds": [[ranking.rows, *ranking.kinds] for ranking in rankings]})


def load(file: Path, there: Callable[[], Sequence[str]]) -> tuple[Ranking, ...]:
    """Return the rankings that were kept; none, with a warning, if they are not of the kinds that are there now."""
    return kept.load(file, "ranking of products", partial(_read, there)) or ()


def _read(there: Callable[[], Sequence[str]], content: Any) -> tuple[Ranking, ...]:
    """Return the rankings in a file's content; raise ValueError, TypeError or KeyError if they are none."""
    rankings = tuple(Ranking(rows, tuple(kinds)) for rows, *kinds in content["kinds"])
    starts, here = [ranking.rows for ranking in rankings], sorted(there())
    if not all(type(rows) is int and rows > 0 for rows in starts) or starts != sorted(set(starts)):
        raise ValueError("rows are no positive integers that increase")
    for ranking in rankings:
        if sorted(ranking.kinds) != here:
            raise ValueError(f"it compares {', '.join(ranking.kinds)}, but here are {', '.join(here)}")
    return rankings
