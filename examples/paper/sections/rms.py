"""The RMS of updates, after tables 1 and 8 of [1]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from configs import Result, loss, schedule
from experiments import SHAPES, TARGETS, Rms, Scale, Seeds
from intervals import Claim, estimate, paired, verdicts

from .shared import BLUE, ORANGE, Style, band, figure, losses, mean_rows, spread, table

# Validation losses of table 8 of [1], by target; None is AdamW. And those of table 1, with weight RMS of query and MLP.
PAPER_TARGETS = {None: 3.679, 0.05: 3.503, 0.1: 3.374, 0.2: 3.325, 0.4: 3.314, 0.8: 3.543}
PAPER_RULES = {
    "width": ("Baseline", 2.812, 3.586e-2, 2.52e-2),
    "exact": ("Update Norm", 2.789, 4.918e-2, 5.01e-2),
    "adjusted": ("Adjusted LR", 2.789, 3.496e-2, 4.89e-2),
}
WORDS = {
    "width": "0.2·√width for all",
    "exact": "norm made exact (exact_rms=True)",
    "adjusted": "0.2·√max(A, B)",
}
MARGIN = 0.05  # largest difference of the RMS of updates, in learning rates, that counts as none
GROUPS: dict[str, Style] = {
    "qkv": {"linestyle": "-", "marker": "o"},
    "out": {"linestyle": "--", "marker": "s"},
    "mlp.up": {"linestyle": "-.", "marker": "^"},
    "mlp.down": {"linestyle": ":", "marker": "D"},
}


def show(found: Rms, scale: Scale, figures: Path) -> Iterator[str]:
    """Show the RMS by shape and set, over a training, and the losses by target and by rule."""
    yield (
        'An orthogonal A×B update times 0.2·√max(A, B) has RMS 0.2, which "match_rms_adamw" aims at. What a step of '
        "lr 1 changes a matrix by, for independent normal gradients, mean of the seeds:\n\n"
    )
    yield _probes(found) + _probe_sentence(found)
    yield "\n### In a training\n\n" + _figure(found, figures) + _sizes(found)
    yield verdicts(_size_claims(found))
    yield "\n### Other targets than 0.2, as table 8 of [1]\n\n" + _targets(found)
    yield verdicts(_target_claims(found))
    yield "\n### Three rules, as table 1 of [1]\n\n" + _rules(found)
    yield verdicts(_rule_claims(found))


def _probes(found: Rms) -> str:
    rows = []
    for name, exact, _ in [place for place in found.probes if place[2] == SHAPES[0]]:
        means = [fmean(result["rms"] for result in found.probes[name, exact, shape]) for shape in SHAPES]
        rows.append([f"{name}, exact_rms=True" if exact else name, *(f"{x:.3f}" for x in means)])
    return table(["coefficient set", *(f"{rows_}×{cols}" for rows_, cols in SHAPES)], rows)


def _probe_sentence(found: Rms) -> str:
    def ends(name: str, exact: bool, unit: float = 1.0) -> str:
        every = [result["rms"] / unit for shape in SHAPES for result in found.probes[name, exact, shape]]
        return f"{min(every):.3f} to {max(every):.3f}"

    return (
        f"\nThe default set gives {ends('keller', False)}: it leaves singular values whose root mean square is "
        f"{ends('keller', False, 0.2)}, not 1. The exact sets give {ends('you6', False)} (you6), and exact_rms=True "
        f"gives {ends('keller', True)} with keller.\n"
    )


def _update_rms(result: Result, group: str) -> dict[int, float]:
    """Return by step the mean RMS of a group's updates, in units of the learning rate that the step had."""
    config = result["config"]
    rows = [row for row in result["spectra"] if f".{group}." in f".{row['name']}." and row["step"]]
    found = mean_rows({"spectra": rows}, lambda row: float(row["rms"]), tensor="update")
    # The rate after the last step is 0, and that of step n is the schedule's at n - 1.
    return {step: x / (config["lr"] * schedule(config["steps"], step - 1)) for step, x in found.items()}


def _by_step(seeds: Seeds, group: str) -> dict[int, list[float]]:
    by_step: dict[int, list[float]] = {}
    for result in seeds:
        for step, value in _update_rms(result, group).items():
            by_step.setdefault(step, []).append(value)
    return by_step


def _figure(found: Rms, figures: Path) -> str:
    def draw(panels: Sequence[Any]) -> None:
        for axes, target, color in ((panels[0], None, ORANGE), (panels[1], 0.2, BLUE)):
            for group, style in GROUPS.items():
                by_step = _by_step(found.targets[target], group)
                band(axes, list(by_step), [estimate(x) for x in by_step.values()], group, color=color, **style)
            axes.axhline(0.2, color="black", linewidth=0.8)
            axes.set(xlabel="step", ylabel="RMS of the update / learning rate")
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])

    return figure(figures / "rms.png", ["AdamW", 'Muon, "match_rms_adamw", keller'], draw)


def _size(result: Result, group: str) -> float:
    """Return the mean over the steps but the last, whose rate is next to nothing; NaN if the training diverged."""
    return math.nan if math.isinf(loss(result)) else fmean(list(_update_rms(result, group).values())[:-1])


def mean_size(seeds: Seeds) -> list[float]:
    """Return by seed the mean over groups and steps; see `_size`."""
    return [fmean(_size(of, group) for group in GROUPS) for of in seeds]


def _sizes(found: Rms) -> str:
    rows = []
    for name, target in (("AdamW", None), ("Muon", 0.2)):
        cells = []
        for group in GROUPS:
            cells.append(spread([_size(of, group) for of in found.targets[target]]))
        rows.append([name, *cells, spread(mean_size(found.targets[target]))])
    return (
        "Mean over the recorded steps, weight decay included. [1] says 0.2 to 0.4 for AdamW. Sizes are alike here "
        f"where the whole interval of their difference is within ±{MARGIN:g}.\n\n"
    ) + table(["optimizer", *GROUPS, "all"], rows)


def _size_claims(found: Rms) -> list[Claim]:
    adamw, muon = (mean_size(found.targets[target]) for target in (None, 0.2))
    return [
        Claim("AdamW's updates are above 0.2", estimate([x - 0.2 for x in adamw]), 1, ""),
        Claim("and below 0.4", estimate([x - 0.4 for x in adamw]), -1, ""),
        Claim(f"Muon's are as large as AdamW's, within {MARGIN:g}", paired(muon, adamw), 0, "", MARGIN),
    ]


def _targets(found: Rms) -> str:
    rows = []
    for target, paper in PAPER_TARGETS.items():
        name = "AdamW" if target is None else f"Muon, {target:g}"
        rows.append([name, spread(losses(found.targets[target])), f"{paper:.3f}"])
    rate = found.targets[None][0]["config"]["lr"]
    return (
        f"AdamW's one rate, {rate:.3g}, and its decay are taken over, as [1] does; {TARGETS[0]:g} to {TARGETS[-1]:g} "
        "is what replaces the 0.2.\n\n"
    ) + table(["target RMS", "held-out loss", "validation loss in [1], per token"], rows)


def _target_claims(found: Rms) -> list[Claim]:
    of = {target: losses(seeds) for target, seeds in found.targets.items()}
    return [
        Claim("0.2 is better than 0.05", paired(of[0.2], of[0.05]), -1),
        Claim("0.2 is better than 0.1", paired(of[0.2], of[0.1]), -1),
        Claim("0.2 is as good as 0.4", paired(of[0.2], of[0.4]), 0),
        Claim("0.2 is better than 0.8", paired(of[0.2], of[0.8]), -1),
        Claim("Muon at 0.2 is ahead of AdamW", paired(of[0.2], of[None]), -1),
    ]


def _weights(seeds: Seeds, group: str) -> list[float]:
    """Return by seed the RMS of a group's weights after the last step that was recorded; infinite if it diverged."""
    found = []
    for result in seeds:
        if math.isinf(loss(result)):
            found.append(math.inf)
            continue
        rows = [row for row in result["spectra"] if f".{group}." in f".{row['name']}."]
        found.append(list(mean_rows({"spectra": rows}, lambda row: float(row["rms"]), tensor="weight").values())[-1])
    return found


def _rules(found: Rms) -> str:
    rows = []
    for name, (paper, their_loss, query, mlp) in PAPER_RULES.items():
        seeds = found.rules[name]
        own = [spread(losses(seeds)), *(spread(_weights(seeds, group)) for group in ("qkv", "mlp.up"))]
        rows.append([f"{WORDS[name]}, “{paper}”", *own, f"{their_loss:.3f}", f"{query:.3g}", f"{mlp:.3g}"])
    heading = ["rule", "held-out loss", "weight RMS of qkv", "of mlp.up"]
    return table([*heading, "validation loss in [1]", "query weight RMS in [1]", "MLP weight RMS in [1]"], rows)


def _rule_claims(found: Rms) -> list[Claim]:
    of = {name: losses(seeds) for name, seeds in found.rules.items()}
    weights = {name: _weights(seeds, "mlp.up") for name, seeds in found.rules.items()}
    return [
        Claim("exact norms are better than one factor for all", paired(of["exact"], of["width"]), -1),
        Claim("so is 0.2·√max(A, B)", paired(of["adjusted"], of["width"]), -1),
        Claim("the two are alike", paired(of["adjusted"], of["exact"]), 0),
        Claim("with it MLP weights grow larger", paired(weights["adjusted"], weights["width"]), 1, ""),
    ]
