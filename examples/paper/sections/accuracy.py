"""How exact powers of recorded matrices are, beside the authors' of [2]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

from experiments import Scale, Seeds
from intervals import Claim, estimate, verdicts

from .shared import table

WORDS = {"msgd": "momentum of msgd", "adam": "m̂/(√v̂ + eps) of adam"}

Found = dict[tuple[str, float, int], Seeds]


def show(found: Found, scale: Scale, figures: Path) -> Iterator[str]:
    """Show the errors of both by what is transformed, power and step."""
    first = next(iter(found.values()))[0]
    of = first["config"]["start"]
    yield (
        f"Relative error in the Frobenius norm, beside the SVD in float64, of every matrix of a model {of['width']} "
        f"wide with {of['layers']} layers, {len(first['errors'])} with queries, keys and values apart, over "
        f"{len(next(iter(found.values())))} seeds. *Ours* is `spectral_power`, a sum of bf16 iterates; *theirs* is the "
        "coupled fp32 iteration of the authors' code, which costs several times as much (docs/powers.md) and adds "
        "1e-6 to the Gram matrix. The last column is the share of singular values below a thousandth of the largest, "
        "which ours does not follow.\n\n"
    )
    rows = []
    for (name, power, step), seeds in found.items():
        ours, theirs, below = zip(*(numbers[1:] for result in seeds for numbers in result["errors"]), strict=True)
        cells = [f"{f(x):.1%}" for x in (ours, theirs) for f in (median, max)]
        rows.append([f"{WORDS[name]}, p = {power:g}, step {step}", *cells, f"{fmean(below):.0%}"])
    yield table(["matrices", "ours, median", "ours, worst", "theirs, median", "theirs, worst", "below 1/1000"], rows)
    claims = []
    for name, words in WORDS.items():
        every = [seeds for place, seeds in found.items() if place[0] == name]
        logs = [fmean(_ratio(result) for result in of_seed) for of_seed in zip(*every, strict=True)]
        claims.append(Claim(f"[ours] of the {words}, ours is nearer than theirs", estimate(logs), -1, " doublings"))
    yield verdicts(claims)


def _ratio(result: dict[str, list[list[float]]]) -> float:
    """Return the mean log2 of our error over the authors'."""
    return fmean(math.log2(ours / theirs) for _, ours, theirs, _ in result["errors"])
