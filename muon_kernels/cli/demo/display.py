"""Display of the demo: the progress of its trainings, the table and the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from .training import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Wide under narrow, so that curves on one another still show.
STYLES: dict[str, dict[str, Any]] = {
    "torch.optim.Muon": {"color": "#f2a541", "linewidth": 5.0},
    "muon_kernels": {"color": "#1f4e8c", "linewidth": 1.6},
    "AdamW": {"color": "#6b6b6b", "linewidth": 1.6, "linestyle": "--"},
}

CANNOT_TELL = "One seed, the first steps, single bytes: this cannot tell which optimizer is better for your model."


@contextmanager
def progress(runs: Sequence[Run], steps: int, console: Console) -> Iterator[Callable[[Run], None]]:
    """Show a bar for each run inside this context; yield a function that updates the bar of a run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description:<16}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}")
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks = {run.name: bars.add_task(run.name, total=steps, note="") for run in runs}

        def show(run: Run) -> None:
            note = "stopped, too slow" if run.stopped else f"loss {run.losses[-1]:.3f}"
            bars.update(tasks[run.name], completed=len(run.losses), total=run.steps, note=note)

        yield show


def table(runs: Sequence[Run]) -> Table:
    """Make the table of losses and times."""
    from rich.table import Table

    result = Table(caption="losses in nats per byte; times are medians over the steps")
    result.add_column("", no_wrap=True)
    for heading in ("steps", "train loss", "held-out loss", "optimizer ms", "of the step"):
        result.add_column(heading, justify="right")
    for run in runs:
        optimizer, whole = median(run.optimizer_seconds), median(run.step_seconds)
        result.add_row(
            run.name,
            str(len(run.losses)),
            f"{run.smoothed()[-1]:.4f}",
            "" if isnan(run.held_out_loss) else f"{run.held_out_loss:.4f}",
            f"{1e3 * optimizer:.1f}",
            f"{optimizer / whole:.0%}",
        )
    return result


def comparison(runs: Sequence[Run]) -> str:
    """Say how far apart the two Muons are; return an empty text unless both ran."""
    by_name = {run.name: run for run in runs}
    try:
        ours, torchs = by_name["muon_kernels"], by_name["torch.optim.Muon"]
    except KeyError:
        return ""
    steps = min(len(ours.losses), len(torchs.losses))
    gap = (ours.smoothed(steps) - torchs.smoothed(steps)).abs().max()
    held_out_gap = abs(ours.held_out_loss - torchs.held_out_loss)
    speedup = median(torchs.optimizer_seconds) / median(ours.optimizer_seconds)
    return (
        f"muon_kernels and torch.optim.Muon: smoothed training losses of {steps} steps at most {gap:.4f} apart, "
        + ("" if isnan(held_out_gap) else f"held-out losses {held_out_gap:.4f} apart; ")
        + f"optimizer step {speedup:.2f}x as fast"
    )


def plot(runs: Sequence[Run], path: Path) -> None:
    """Write the smoothed loss curves, against steps and against time, to `path` as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=150)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for name, style in STYLES.items():
        for run in runs:
            if run.name == name:
                loss = run.smoothed()
                steps = torch.arange(len(run.losses) - len(loss), len(run.losses)) + 1
                # The sum of the times would show what else the machine was doing.
                seconds = steps * median(run.step_seconds)
                end = {"marker": "o", "markevery": [-1]} if run.stopped else {}
                label = f"{name}, {len(run.losses)} steps" if run.stopped else name
                by_step.plot(steps, loss, label=label, **style, **end)
                by_time.plot(seconds, loss, label=label, **style, **end)
    by_step.set(xlabel="step", ylabel="training loss, nats per byte (running mean)")
    by_time.set(xlabel="seconds, at the median time of a step")
    by_step.legend(frameon=False)
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    figure.savefig(path)
