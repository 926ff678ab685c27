"""Weight decay in the over-trained regime, after [1]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from configs import loss, tokens
from experiments import DECAYS, DTYPES, Scale, Seeds
from intervals import Claim, Estimate, estimate, paired, verdicts

from .shared import BLUE, GREEN, ORANGE, Style, band, end, figure, losses, rates, series, spread, table

STYLES: dict[str, Style] = {
    "AdamW": {"color": ORANGE, "marker": "s", "markersize": 4},
    "Muon": {"color": BLUE, "marker": "o", "markersize": 4},
    "Muon without decay": {"color": GREEN, "marker": "^", "markersize": 4},
}
LINES = {"float32": "-", "bfloat16": ":"}

Found = dict[tuple[str, str], Seeds]


def show(found: Found, scale: Scale, figures: Path) -> Iterator[str]:
    """Show losses, and the sizes of weights and outputs over the steps."""
    of = found["Muon", "float32"][0]
    yield (
        f"A model of {of['active_parameters']} parameters in the layers, {of['config']['steps']} steps, "
        f"{tokens(of['config']) / of['active_parameters']:.0f} bytes a parameter: {scale.over} times what "
        "the sizes above have, as [1] trains 800 million parameters on 100 billion tokens, 6.25 times 20 each. "
        "Rates of the matrices and of the rest, if that has another, tuned at this length in fp32: "
        f"{rates(found['AdamW', 'float32'][0])} for AdamW, and {rates(of)} for Muon, with decay and without as in [1], "
        "whose second one is AdamW's. In bf16 all parameters are bf16, without fp32 copies.\n\n"
    )
    yield _figure(found, figures) + _table(found)
    yield verdicts(_claims(found, scale))


def _figure(found: Found, figures: Path) -> str:
    def draw(panels: Sequence[Any]) -> None:
        for (name, dtype), seeds in found.items():
            style = {**STYLES[name], "linestyle": LINES[dtype]}
            label = name if dtype == "float32" else None
            if name != "Muon":
                band(panels[0], *_behind(seeds, found["Muon", dtype]), label, **style)
            for axes, column in zip(panels[1:], (1, 2), strict=True):
                band(axes, *series(seeds, "sizes", column), label, **style)
        for axes in panels:
            axes.plot([], [], color="black", linestyle=":", label="bf16")
            axes.set(xlabel="step")
        panels[0].axhline(0, color="black", linewidth=0.8)
        panels[0].set(ylabel="training loss less Muon's (decay), nats")
        panels[1].set(ylabel="mean RMS of the layers' matrices")
        panels[2].set(ylabel="RMS of the last layer's output", yscale="log")

    return figure(figures / "decay.png", ["loss, same batches", "weights", "output"], draw)


def _behind(seeds: Seeds, beside: Seeds) -> tuple[list[int], list[Estimate]]:
    """Return steps, and how far a training is behind another with the same batches, as far as both went."""
    curves = [zip(a["curve"], b["curve"], strict=False) for a, b in zip(seeds, beside, strict=True)]
    rows = [row for row in zip(*curves, strict=False) if all(None not in (*a, *b) for a, b in row)]
    return [row[0][0][0] for row in rows], [estimate([a[1] - b[1] for a, b in row]) for row in rows]


def _last(seeds: Seeds, column: int) -> list[float]:
    return [end(result, "sizes", column) for result in seeds]


def _table(found: Found) -> str:
    rows = []
    for name in DECAYS:
        cells = [spread(losses(found[name, dtype])) for dtype in DTYPES]
        cells += [spread(_last(found[name, dtype], column)) for column in (1, 2) for dtype in DTYPES]
        rows.append([name, *cells])
    kinds = [f"{what}, {dtype}" for what in ("held-out loss", "weight RMS", "output RMS") for dtype in ("fp32", "bf16")]
    return table(["optimizer", *kinds], rows)


def _early(seeds: Seeds, share: float) -> list[float]:
    """Return by seed the mean training loss of the first steps, without the first point, which is of warm-up.

    It is infinite if the training has not got that far.
    """
    found = []
    for result in seeds:
        until = share * result["config"]["steps"] + 0.5  # points are at whole steps
        points = [x for n, (step, x) in enumerate(result["curve"]) if n == 1 or (n and step <= until)]
        reached = result["curve"][-1][0] if result["curve"] else 0
        lost = math.isinf(loss(result)) and reached < until - 1
        found.append(math.inf if lost or not points or None in points else fmean(points))
    return found


def _log_ratio(first: Seeds, second: Seeds, column: int) -> Estimate:
    return paired(*([math.log2(x) for x in _last(seeds, column)] for seeds in (first, second)))


def _cost_of_bf16(found: Found, name: str) -> list[float]:
    exact, rounded = (losses(found[name, dtype]) for dtype in DTYPES)
    return [b - a for a, b in zip(exact, rounded, strict=True)]


def _claims(found: Found, scale: Scale) -> list[Claim]:
    plain, decayed, adamw = (found[name, "float32"] for name in ("Muon without decay", "Muon", "AdamW"))
    early = paired(*(_early(seeds, 1 / scale.over) for seeds in (plain, decayed)))
    cost = {name: _cost_of_bf16(found, name) for name in DECAYS}
    return [
        Claim(f"without decay Muon is ahead in the first 1/{scale.over} of the steps", early, -1),
        Claim("without decay it is behind at the end", paired(losses(plain), losses(decayed)), 1),
        Claim("Muon with decay is ahead of AdamW at the end", paired(losses(decayed), losses(adamw)), -1),
        Claim("without decay weights grow larger", _log_ratio(plain, decayed, 1), 1, " doublings"),
        Claim("without decay the output grows larger", _log_ratio(plain, decayed, 2), 1, " doublings"),
        Claim("so bf16 costs more without decay", paired(cost["Muon without decay"], cost["Muon"]), 1),
    ]
