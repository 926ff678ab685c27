"""Picture of a record: a quantity against the step, by matplotlib, which is imported when something is drawn."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .quantities import QUANTITIES
from .rows import Row

# Okabe and Ito's colours, which the colour-blind tell apart, and dashes for those who print in grey.
STYLES: Sequence[dict[str, Any]] = [
    {"color": color, "linestyle": dashes, "marker": marker}
    for color, dashes, marker in [
        ("#0072B2", "-", "o"),
        ("#D55E00", "--", "s"),
        ("#009E73", "-.", "^"),
        ("#CC79A7", ":", "D"),
        ("#56B4E9", (0, (5, 1)), "v"),
        ("#E69F00", (0, (3, 1, 1, 1)), "P"),
    ]
]

# Values by training and step.
ByRun = dict[str, dict[int, list[float]]]

LABELS = {
    "svd_entropy": "SVD entropy",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "condition": "condition number",
    "rms": "RMS",
}


def plot(
    rows: Sequence[Row] | Mapping[str, Sequence[Row]],
    path: str | os.PathLike[str],
    quantity: str = "svd_entropy",
    *,
    tensor: str = "weight",
) -> None:
    """Draw a quantity against the step, with a panel for each group of matrices: their median, and a band over all.

    Args:
        rows: rows of one training, or of several by name, which are laid over each other.
        path: path of the PNG that is written.
        quantity: field of `Summary`; "condition" and "rms" get a logarithmic axis. Values that are not finite, and
            there those that are not positive, are left out.
        tensor: "weight", "momentum" or "update".

    Raises:
        ValueError: the quantity is unknown, there are more than six trainings, or there is nothing to draw.
        ModuleNotFoundError: matplotlib is missing.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity should be one of {', '.join(map(repr, QUANTITIES))} but is: {quantity!r}")
    runs = rows if isinstance(rows, Mapping) else {"": rows}
    if len(runs) > len(STYLES):
        raise ValueError(f"at most {len(STYLES)} trainings can be told apart but there are: {len(runs)}")
    logarithmic = quantity in ("condition", "rms")
    values = _by_group(runs, quantity, tensor, positive=logarithmic)
    if not values:
        there = sorted({row["tensor"] for own in runs.values() for row in own})
        raise ValueError(f"rows should have a finite {quantity} of tensor {tensor!r} but have of: {there}")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "spectra.plot needs matplotlib; install it with: pip install 'muon-kernels[demo]'", name="matplotlib"
        ) from error

    columns = min(math.ceil(math.sqrt(len(values))), 4)
    lines = math.ceil(len(values) / columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.0 + 2.7 * lines), layout="constrained", dpi=150)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    styles = dict(zip(runs, STYLES, strict=False))
    drawn: dict[str, Any] = {}
    for axes, (group, by_run) in zip(panels, values.items(), strict=False):
        for run, line in _panel(axes, group, by_run, styles, logarithmic).items():
            drawn.setdefault(run, line)
    for axes in panels[len(values) :]:
        axes.remove()
    figure.supxlabel("step")
    figure.supylabel(f"{LABELS[quantity]} of the {tensor}\nmedian and range", multialignment="center")
    if drawn.keys() - {""}:
        figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=len(drawn), frameon=False)
    figure.savefig(Path(path), format="png")


def _by_group(runs: Mapping[str, Sequence[Row]], quantity: str, tensor: str, positive: bool) -> dict[str, ByRun]:
    """Collect the finite values of each group, training and step; with `positive` only those above 0."""
    values: dict[str, ByRun] = {}
    for run, own in runs.items():
        for row in own:
            y = row[quantity]
            if row["tensor"] == tensor and math.isfinite(y) and (y > 0 or not positive):
                by_step = values.setdefault(row["group"], {}).setdefault(run, {})
                by_step.setdefault(row["step"], []).append(y)
    return values


def _panel(
    axes: Any, group: str, by_run: ByRun, styles: Mapping[str, Mapping[str, Any]], logarithmic: bool
) -> dict[str, Any]:
    """Draw the median and the range of one group of matrices; return the line of each training."""
    from statistics import median  # brings decimal, which takes longer to import than all of this package

    from matplotlib.ticker import LogFormatter, MaxNLocator

    drawn = {}
    for run, by_step in by_run.items():
        steps = sorted(by_step)
        middle = [median(by_step[step]) for step in steps]
        drawn[run] = axes.plot(steps, middle, markersize=3, linewidth=1.6, label=run, **styles[run])[0]
        least, most = ([pick(by_step[step]) for step in steps] for pick in (min, max))
        axes.fill_between(steps, least, most, color=styles[run]["color"], alpha=0.18, linewidth=0)
    axes.set_title(textwrap.fill(group.replace(".", ". "), 40).replace(". ", "."), fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    if logarithmic:
        axes.set_yscale("log")
        # Some tick gets its number also where the range has no power of ten.
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True)
    return drawn
