"""Muon and AdamW over sizes, after [1]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from configs import Result, compute, iterations, tokens
from experiments import BOTH, MUON, ONE, TAKEN, TWO, Scale, Seeds
from intervals import Claim, Line, estimate, fit, paired, verdicts

from .shared import BLUE, GREEN, GREY, ORANGE, PINK, Style, band, figure, interval, legend, losses, rates, spread, table

STYLES: dict[str, Style] = {
    ONE: {"color": GREY, "marker": "s", "linestyle": ":"},
    TWO: {"color": ORANGE, "marker": "s", "linestyle": "--"},
    TAKEN: {"color": GREEN, "marker": "^", "linestyle": "-."},
    BOTH: {"color": PINK, "marker": "v", "linestyle": "-."},
    MUON: {"color": BLUE, "marker": "o", "linestyle": "-"},
}
PAPER_FITS = "2.608·C^-0.054 for AdamW and 2.506·C^-0.052 for Muon"

Found = dict[tuple[int, int], dict[str, Seeds]]


def iteration_share(result: Result) -> float:
    """Return the share of a training's compute that is of Newton-Schulz steps."""
    return result["config"]["steps"] * iterations(result["config"]) / compute(result["config"])


def law(found: Found, name: str, seed: int | None = None) -> Line:
    """Fit log loss = log a + b log C over the sizes, to means over the seeds or to one of them."""
    x = [math.log(compute(size[name][0]["config"])) for size in found.values()]
    each = [losses(size[name]) for size in found.values()]
    y = [math.log(sum(of) / len(of) if seed is None else of[seed]) for of in each]
    return fit(x, y)


def savings(found: Found, name: str, beside: str) -> list[float]:
    """Return by seed log2 of the share of compute with which one reaches the other's losses, by its fit."""
    shares = []
    for seed in range(len(next(iter(found.values()))[name])):
        line = law(found, name, seed)
        logs = []
        for size in found.values():
            needed = (math.log(losses(size[beside])[seed]) - line.intercept) / line.slope.mean
            logs.append((needed - math.log(compute(size[beside][seed]["config"]))) / math.log(2))
        shares.append(sum(logs) / len(logs))
    return shares


def show(found: Found, scale: Scale, figures: Path) -> Iterator[str]:
    """Show losses over sizes, their fits, and the leads."""
    of = next(iter(found.values()))[ONE][0]
    first, *_, last = found.values()
    batch = of["config"]["batch"] * of["config"]["context"]
    yield (
        'Muon with the settings of [1]: weight decay 0.1 and adjust_lr_fn="match_rms_adamw". Every model sees '
        f"{tokens(of['config']) / of['active_parameters']:.0f} bytes a parameter of its layers; 80 are 20 "
        f"tokens of four bytes, about compute-optimal. *{ONE}* has the same rate for all parameters, *{TWO}* another "
        f"for embeddings, head and norms, both tuned. *{TAKEN}* takes the one rate over, as [1] does; *{BOTH}* takes "
        f"over both; *{MUON}* has a rate tuned for the matrices and AdamW's second one for the rest: beside *{TWO}* it "
        "differs in nothing but what steps the matrices, and by which rate. Losses are compared at equal bytes. "
        "Compute, in the figure and in the fits, is 6 FLOP a byte for each parameter of layers and output head, and "
        "with Muon also that of five Newton-Schulz steps as full products, which is "
        f"{iteration_share(first[MUON][0]):.0%} of all for the smallest model and {iteration_share(last[MUON][0]):.0%} "
        f"for the largest at {batch} bytes a step; products of queries and keys are not in it.\n\n"
    )
    yield _figure(found, figures) + _table(found)
    yield verdicts(_claims(found))
    yield "\n### Fits\n\n" + _fits(found)
    yield verdicts(_fit_claims(found))


def _figure(found: Found, figures: Path) -> str:
    from matplotlib.ticker import EngFormatter, NullFormatter

    def draw(panels: Sequence[Any]) -> None:
        n = [size[TWO][0]["active_parameters"] for size in found.values()]
        for name, style in STYLES.items():
            x = [compute(size[name][0]["config"]) for size in found.values()]
            band(panels[0], x, [estimate(losses(size[name])) for size in found.values()], name, **style)
        panels[0].set(xscale="log", yscale="log", xlabel="compute, FLOP")
        panels[0].set(ylabel="held-out loss, nats per byte")
        panels[0].yaxis.set_major_formatter("{x:.1f}")
        panels[0].yaxis.set_minor_formatter("{x:.1f}")
        for name in (ONE, TAKEN, BOTH, MUON):
            leads = [paired(losses(size[TWO]), losses(size[name])) for size in found.values()]
            band(panels[1], n, leads, name, **STYLES[name])
        panels[1].axhline(0, color="black", linewidth=0.8)
        panels[1].set(xscale="log", xlabel="parameters of the layers, N", ylabel="AdamW's loss less this one's, nats")
        panels[1].set_xticks(n)
        panels[1].xaxis.set_major_formatter(EngFormatter(places=1, sep=""))
        panels[1].xaxis.set_minor_formatter(NullFormatter())
        legend(panels[0])

    return figure(figures / "scaling.png", ["loss, bands ± sd", "lead on AdamW with two rates"], draw, legends=False)


def _table(found: Found) -> str:
    rows = []
    for (width, layers), size in found.items():
        first = size[ONE][0]
        cells = [f"{spread(losses(size[name]))} at {rates(size[name][0])}" for name in STYLES]
        seen = f"{tokens(first['config']) / 1e6:.2f}M ({first['passes']:.2f})"
        n = f"{first['active_parameters'] / 1e3:.1f}k"
        flop = [f"{compute(size[name][0]['config']):.1e}" for name in (TWO, MUON)]
        rows.append([f"{width} wide, {layers} layers", n, seen, *flop, *cells])
    return table(
        ["model", "N", "bytes (passes)", "FLOP by AdamW", "by Muon", *(f"{name}: loss at lr" for name in STYLES)], rows
    )


def mean_of_sizes(found: Found, name: str) -> list[float]:
    """Return by seed the mean loss over the sizes."""
    return [fmean(of_seed) for of_seed in zip(*(losses(size[name]) for size in found.values()), strict=True)]


def _claims(found: Found) -> list[Claim]:
    last = list(found.values())[-1]
    of = {name: losses(last[name]) for name in STYLES}
    every = {name: mean_of_sizes(found, name) for name in of}
    return [
        Claim("at the largest size Muon with AdamW's rate is ahead of AdamW", paired(of[TAKEN], of[ONE]), -1),
        Claim("at the largest size Muon is ahead of AdamW, both tuned", paired(of[MUON], of[TWO]), -1),
        Claim("so it is in the mean of the sizes", paired(every[MUON], every[TWO]), -1),
        Claim("AdamW's rate is as good for Muon as its own, mean of the sizes", paired(every[BOTH], every[MUON]), 0),
    ]


def _fits(found: Found) -> str:
    rows = []
    for name in STYLES:
        line = law(found, name)
        cells = ["diverged"] * 3
        reach = estimate(savings(found, name, TWO))
        if math.isfinite(line.slope.mean):
            cells[:2] = [f"{math.exp(line.intercept):.2f}", interval(line.slope, ".4f")]
        if math.isfinite(reach.mean):
            cells[2] = f"{2**reach.mean:.0%} [{2**reach.low:.0%}, {2**reach.high:.0%}]"
        rows.append([name, *cells])
    return (
        f"Loss = a·C^b by least squares of logarithms, through the means of {len(found)} sizes; the interval of b has "
        f"{len(found) - 2} degrees of freedom. [1] has {PAPER_FITS}. The last column is the compute with which the "
        "optimizer reaches the loss of AdamW with two rates, by a fit to each seed, as geometric mean over the sizes; "
        "its interval is over the seeds, and does not know whether a power law is true. Output head and "
        "Newton-Schulz steps are in C, here and in the claims below.\n\n"
    ) + table(["optimizer", "a", "b", "compute for AdamW's loss"], rows)


def _fit_claims(found: Found) -> list[Claim]:
    taken = estimate(savings(found, TAKEN, ONE))
    tuned = estimate(savings(found, MUON, TWO))
    return [
        Claim("Muon needs less compute (52 % in [1]), with AdamW's one rate", taken, -1, " doublings"),
        Claim("so it does where both are tuned", tuned, -1, " doublings"),
    ]
