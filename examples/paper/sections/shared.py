"""Tables, figures, and what is read off results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from configs import Result, loss
from intervals import Estimate, estimate

# Okabe and Ito's colours, which the colour-blind can tell apart; markers and lines differ as well.
BLUE, GREEN, ORANGE, GREY, PINK, SKY = "#0072B2", "#009E73", "#D55E00", "#6b6b6b", "#CC79A7", "#56B4E9"
Style = dict[str, Any]
# Legible at half of the size.
FONT = {"font.size": 13, "axes.titlesize": 13, "axes.labelsize": 13, "legend.fontsize": 11.5}


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table as Markdown, whose first column is of words and whose others are of numbers."""
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(x: float | None) -> str:
    return "diverged" if x is None or not math.isfinite(x) else f"{x:.3f}"


def rates(result: Result) -> str:
    """Name the learning rate of a training, or that of the matrices and that of the rest."""
    lr, rest = result["config"]["lr"], result["config"]["rest_lr"]
    return f"{lr:.3g}" if rest is None else f"{lr:.3g}, {rest:.3g}"


def losses(seeds: Sequence[Result], text: str | None = None) -> list[float]:
    """Return the held-out losses of the seeds, of a text if it is named."""
    if text is None:
        return [loss(result) for result in seeds]
    return [math.inf if result["losses"][text] is None else float(result["losses"][text]) for result in seeds]


def spread(numbers: Sequence[float], form: str = ".3f") -> str:
    """Format the mean and the standard deviation of the seeds; say how many diverged."""
    found = estimate(numbers)
    if not math.isfinite(found.mean):
        return found.lost if found.diverged else "diverged"
    return f"{found.mean:{form}} ± {found.sd:{form}}"


def interval(found: Estimate, form: str = "+.3f") -> str:
    """Format a mean and its 95 % interval; say how many diverged."""
    if not math.isfinite(found.mean):
        return found.lost if found.diverged else "diverged"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def series(seeds: Sequence[Result], name: str, column: int = 1) -> tuple[list[float], list[Estimate]]:
    """Return the steps of a list of tuples in results, and the estimates over the seeds, as far as all of them went."""
    rows = list(zip(*(result[name] for result in seeds), strict=False))
    rows = [row for row in rows if all(point[column] is not None for point in row)]
    return [row[0][0] for row in rows], [estimate([point[column] for point in row]) for row in rows]


def end(result: Result, name: str, column: int = 1) -> float:
    """Return what a list of tuples in a result ends with, infinite if the training diverged."""
    points = result[name]
    if math.isinf(loss(result)) or not points or points[-1][column] is None:
        return math.inf
    return float(points[-1][column])


def mean_rows(result: Result, quantity: Callable[[Result], float], **wanted: Any) -> dict[int, float]:
    """Return the mean of a quantity over the matrices of recorded spectra, by step; `wanted` are fields of the rows."""
    by_step: dict[int, list[float]] = {}
    for row in result["spectra"]:
        if all(row[field] == value for field, value in wanted.items()):
            by_step.setdefault(row["step"], []).append(quantity(row))
    return {step: fmean(values) for step, values in by_step.items()}


def band(axes: Any, x: Sequence[float], found: Sequence[Estimate], label: str | None = None, **style: Any) -> None:
    """Draw means, and a band of one standard deviation of the seeds on either side."""
    axes.plot(x, [of.mean for of in found], label=label, linewidth=1.8, **style)
    low, high = [of.mean - _sd(of) for of in found], [of.mean + _sd(of) for of in found]
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _sd(found: Estimate) -> float:
    return found.sd if math.isfinite(found.sd) else 0.0


def figure(
    path: Path,
    titles: Sequence[str],
    draw: Callable[[Sequence[Any]], object],
    columns: int | None = None,
    size: tuple[float, float] = (5.4, 4.8),
    share: bool = False,
    legends: bool = True,
) -> str:
    """Save panels, which `draw` fills, and return the Markdown that shows them.

    Args:
        path: of the PNG.
        titles: of the panels.
        draw: fills the panels.
        columns: panels in a row; None puts all in one.
        size: of a panel, in inches.
        share: whether panels have the axes in common.
        legends: whether every panel has a legend; else `draw` sees to it.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the figures need matplotlib; install it with: pip install 'muon-kernels[demo]', then "
            "python examples/paper/report.py: the trainings are kept",
            name="matplotlib",
        ) from error
    columns = columns or len(titles)
    lines = math.ceil(len(titles) / columns)
    with matplotlib.rc_context(FONT):
        picture = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained", dpi=110)
        grid = picture.subplots(lines, columns, squeeze=False, sharex=share, sharey=share).flatten()
        for axes in grid[len(titles) :]:
            axes.remove()
        panels = list(grid[: len(titles)])
        draw(panels)
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title)
            # Where all have diverged there is nothing to draw, and a logarithmic axis of nothing raises.
            for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
                if not math.isfinite(axis.get_minpos()):
                    scale("linear")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelbottom=True)
            if axes.get_xlabel() == "step":
                axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            if legends:
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
        path.parent.mkdir(exist_ok=True)
        picture.savefig(path)
    return f"![{', '.join(titles)}](figures/{path.name})\n\n"


def legend(axes: Any) -> None:
    """Add the legend of a panel below all panels, where it hides no curve."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


def rates_axis(axes: Any, rates: Sequence[float], label: str) -> None:
    """Make the x axis one of learning rates, logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", xlabel=label)
    decades = math.log10(max(rates) / min(rates)) if len(rates) > 1 else 0
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.5 else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
