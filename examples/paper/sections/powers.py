"""Powers of the spectrum, after [2]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs import Result, loss, schedule, tokens
from experiments import WINDOW, Power, Scale
from intervals import Claim, Estimate, estimate, paired, verdicts

from .shared import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    Style,
    band,
    figure,
    interval,
    legend,
    losses,
    mean_rows,
    rates_axis,
    series,
    spread,
    table,
)

# Best final losses in [2], of GPT-2 124M and 100 billion tokens of OpenWebText (github.com/Ocram7/BeyondMuon).
PAPER_LOSS = {
    "msgd": 3.092,
    "msgd_s": 2.895,
    "msgd_q": 2.876,
    "msgd_z": 2.887,
    "adam": 2.871,
    "adam_s": 2.870,
    "adam_q": 2.872,
    "adam_z": 2.879,
}
POWERS = {"": "1", "_s": "1/2", "_q": "1/4", "_z": "0"}
STYLES: dict[str, Style] = {
    "": {"color": GREY, "marker": "o", "linestyle": "-"},
    "_s": {"color": GREEN, "marker": "^", "linestyle": "-."},
    "_q": {"color": ORANGE, "marker": "s", "linestyle": "--"},
    "_z": {"color": BLUE, "marker": "D", "linestyle": "-"},
}
FAMILIES = {"msgd": "momentum (mSGD)", "adam": "RMS-normalised (Adam)"}
FACTORS = {0.25: "best/4", 0.5: "best/2", 1.0: "best", 2.0: "best·2", 4.0: "best·4"}
RATES: dict[float, Style] = {
    0.25: {"color": BLUE, "linestyle": ":"},
    0.5: {"color": GREEN, "linestyle": "--"},
    1.0: {"color": "black", "linestyle": "-"},
    2.0: {"color": ORANGE, "linestyle": "--"},
    4.0: {"color": PINK, "linestyle": ":"},
}


def show(found: dict[str, Power], scale: Scale, figures: Path) -> Iterator[str]:
    """Show losses over rates, curves, the coarse scan, and the spectra of updates."""
    of = found["adam"].window[1.0][0]
    yield (
        f"The eight optimizers of [2] for {of['config']['steps']} steps, {tokens(of['config']) / 1e6:.2f} MB, "
        f"{of['active_parameters']} parameters in the layers, without weight decay. The learning rate is that of all "
        "matrices, embeddings and head included, as in [2].\n\n"
    )
    yield _losses(found, figures)
    yield _table(found)
    yield verdicts(_claims(found))
    yield "\n### How much the learning rate matters\n\n" + _rises(found)
    yield verdicts(_rise_claims(found))
    yield "\n### Curves by learning rate, as figures 2 and 3 of [2]\n\n"
    yield _curves(found, figures) + _coarse(found, figures)
    yield "### Spectra of the updates\n\n" + _spectra_figure(found, figures) + _spectra_table(found)
    yield verdicts(_spectra_claims(found))


def _losses(found: dict[str, Power], figures: Path) -> str:
    def draw(panels: Sequence[Any]) -> None:
        means: list[float] = []
        for axes, family in zip(panels, FAMILIES, strict=True):
            rates: list[float] = []
            for suffix, power in POWERS.items():
                of = found[family + suffix]
                points = {of.lr * factor: estimate(losses(seeds)) for factor, seeds in of.window.items()}
                finite = {lr: each for lr, each in points.items() if math.isfinite(each.mean)}
                band(axes, list(finite), list(finite.values()), f"{family + suffix}, p = {power}", **STYLES[suffix])
                means += [each.mean for each in finite.values()]
                rates += finite
            rates_axis(axes, rates, "learning rate of the matrices")
        # Losses that explode are cut off: they would flatten all others to a line.
        panels[0].set(ylabel="held-out loss, nats per byte")
        if means:
            panels[0].set(ylim=(min(means) - 0.05, min(max(means), min(means) + 1)))
            panels[1].set(ylim=panels[0].get_ylim())

    return figure(figures / "powers.png", list(FAMILIES.values()), draw)


def _table(found: dict[str, Power]) -> str:
    rows = []
    for name, of in found.items():
        cells = [spread(losses(of.window[factor])) for factor in WINDOW]
        rows.append([name, f"{of.lr:.3g}", *cells, f"{PAPER_LOSS[name]:.3f}"])
    return table(["optimizer", "best lr", *FACTORS.values(), "best in [2], per token"], rows)


def _best(found: dict[str, Power], first: str, second: str) -> Estimate:
    return paired(losses(found[first].window[1.0]), losses(found[second].window[1.0]))


def _claims(found: dict[str, Power]) -> list[Claim]:
    return [
        Claim("Muon (msgd_z) is behind Adam", _best(found, "msgd_z", "adam"), 1),
        Claim("compression helps momentum: msgd_s is ahead of msgd", _best(found, "msgd_s", "msgd"), -1),
        Claim("p = 1/4 is the best of momentum: msgd_q is ahead of msgd_z", _best(found, "msgd_q", "msgd_z"), -1),
        Claim("adam_s is as good as adam", _best(found, "adam_s", "adam"), 0),
        Claim("adam_z is behind adam", _best(found, "adam_z", "adam"), 1),
    ]


def _rise(of: Power, factor: float) -> list[float]:
    """Return by seed how much the loss rises from the best rate to the two that are `factor` away, in the mean."""
    middle = losses(of.window[1.0])
    ends = zip(losses(of.window[1 / factor]), losses(of.window[factor]), strict=True)
    return [(low + high) / 2 - best for (low, high), best in zip(ends, middle, strict=True)]


def _family(found: dict[str, Power], family: str, factor: float) -> list[float]:
    """Return by seed the mean rise of a family."""
    each = [_rise(found[family + suffix], factor) for suffix in POWERS]
    return [sum(of_seed) / len(each) for of_seed in zip(*each, strict=True)]


def _rises(found: dict[str, Power]) -> str:
    rows = [
        [name, *(interval(estimate(_rise(of, factor)), ".3f") for factor in (2.0, 4.0))] for name, of in found.items()
    ]
    rows += [
        [f"mean, {title}", *(interval(estimate(_family(found, family, factor)), ".3f") for factor in (2.0, 4.0))]
        for family, title in FAMILIES.items()
    ]
    heading = ["loss at the two ends less loss in the middle", "best/2 … best·2", "best/4 … best·4"]
    return "Windows are symmetric around the best rate. In brackets is the 95 % interval.\n\n" + table(heading, rows)


def _rise_claims(found: dict[str, Power]) -> list[Claim]:
    claims = []
    for factor, name in ((2.0, "twice"), (4.0, "four times")):
        both = paired(_family(found, "msgd", factor), _family(found, "adam", factor))
        claims.append(Claim(f"{name} off the best rate, RMS-normalised updates lose less", both, 1))
        compressed = paired(_rise(found["msgd"], factor), _rise(found["msgd_q"], factor))
        claims.append(Claim(f"{name} off, msgd_q loses less than msgd", compressed, 1))
    return claims


def _curves(found: dict[str, Power], figures: Path) -> str:
    least = min((y.mean for of in found.values() for y in series(of.window[1.0], "curve")[1]), default=0.0)

    def draw(panels: Sequence[Any]) -> None:
        for axes, of in zip(panels, found.values(), strict=True):
            for factor, seeds in of.window.items():
                x, y = series(seeds, "curve")
                band(axes, x, y, FACTORS[factor], **RATES[factor])
            axes.set(xlabel="step")
            axes.set_ylim(least - 0.1, least + 2.0)
        for axes in panels[::4]:
            axes.set(ylabel="training loss, nats per byte")
        legend(panels[3])

    titles = [f"{name}, best lr {of.lr:.3g}" for name, of in found.items()]
    return figure(figures / "powers_curves.png", titles, draw, 4, (3.9, 3.6), legends=False)


def _coarse(found: dict[str, Power], figures: Path) -> str:
    from matplotlib.ticker import LogFormatter

    def draw(panels: Sequence[Any]) -> None:
        for axes, family in zip(panels, FAMILIES, strict=True):
            rates: list[float] = []
            for suffix, power in POWERS.items():
                finite = {lr: loss(of) for lr, of in found[family + suffix].coarse.items() if loss(of) < math.inf}
                label = f"{family + suffix}, p = {power}"
                axes.plot(list(finite), list(finite.values()), label=label, linewidth=1.8, **STYLES[suffix])
                rates += finite
            rates_axis(axes, rates, "learning rate of the matrices")
            axes.set(yscale="log", ylabel="held-out loss, nats per byte")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # 2.4, not 2.4 × 10⁰

    steps = next(iter(found["adam"].coarse.values()))["config"]["steps"]
    return (
        f"The coarse scan: rates four times apart, {steps} steps, one seed, which is none of the others. It is where "
        "losses that explode are seen.\n\n" + figure(figures / "powers_coarse.png", list(FAMILIES.values()), draw)
    )


LEAST_SHARE = 0.1  # of the largest learning rate
QUANTITIES = {"condition": "condition number", "svd_entropy": "SVD entropy"}


def _spectra(result: Result, quantity: str) -> dict[int, float]:
    """Return a quantity of the updates by step: the mean over matrices, of logarithms of conditions.

    Fused projections, whose three parts are transformed alone, are left out, and so are steps at next to no learning
    rate: what the weights change by is their rounding there.
    """

    def read(row: dict[str, Any]) -> float:
        value = row[quantity]
        return math.log10(value) if quantity == "condition" else float(value)

    steps = result["config"]["steps"]
    # Step n has the schedule's share at n - 1, and step 0 is before the training.
    rows = [row for row in result["spectra"] if row["step"] and schedule(steps, row["step"] - 1) > LEAST_SHARE]
    rows = [row for row in rows if "qkv" not in row["name"] and row[quantity]]
    return mean_rows({"spectra": rows}, read, tensor="update")


def _last(of: Power, quantity: str) -> list[float]:
    """Return by seed a quantity at the last step of `_spectra`, NaN if the training diverged."""
    each = [(loss(result), list(_spectra(result, quantity).values())) for result in of.window[1.0]]
    return [values[-1] if values and math.isfinite(lost) else math.nan for lost, values in each]


def _spectra_figure(found: dict[str, Power], figures: Path) -> str:
    def draw(panels: Sequence[Any]) -> None:
        for n, quantity in enumerate(QUANTITIES):
            for axes, family in zip(panels[2 * n : 2 * n + 2], FAMILIES, strict=True):
                for suffix, power in POWERS.items():
                    by_step: dict[int, list[float]] = {}
                    for result in found[family + suffix].window[1.0]:
                        for step, value in _spectra(result, quantity).items():
                            by_step.setdefault(step, []).append(value)
                    label = f"{family + suffix}, p = {power}"
                    band(axes, list(by_step), [estimate(x) for x in by_step.values()], label, **STYLES[suffix])
                log = "log10 of the " if quantity == "condition" else ""
                axes.set(xlabel="step", ylabel=log + QUANTITIES[quantity])

    titles = [f"{name} of updates, {family}" for name in QUANTITIES.values() for family in FAMILIES]
    return figure(figures / "powers_spectra.png", titles, draw, 2)


def _spectra_table(found: dict[str, Power]) -> str:
    rows = []
    for name, of in found.items():
        rows.append([name, spread(_last(of, "condition"), ".2f"), spread(_last(of, "svd_entropy"))])
    return (
        f"Updates of the last recorded step whose learning rate was above {LEAST_SHARE:g} of the largest, as in the "
        "figure, mean over the matrices: near its end a training changes weights by little more than their "
        "rounding.\n\n"
    ) + table(["optimizer", "log10 of the condition number", "SVD entropy"], rows)


def _spectra_claims(found: dict[str, Power]) -> list[Claim]:
    claims = []
    for family in FAMILIES:
        for suffix in ("_s", "_q"):
            last = [_last(found[name], "condition") for name in (family + suffix, family)]
            words = f"{family + suffix}'s updates are better conditioned than {family}'s"
            claims.append(Claim(words, paired(*last), -1, " decades"))
    return claims
