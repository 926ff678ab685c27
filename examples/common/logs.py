"""The log of a training: a file of JSON lines, a progress bar, and a picture of the losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Log:
    """Lines of a training, shown and written on the first rank. Use it as a context.

    Args:
        path: of the file. Lines of steps after `begin`, which a training that was stopped has left, are dropped.
        begin: number of steps that are done.
        steps: number of steps in all.
        first: whether this is the first rank; others write and show nothing.
    """

    def __init__(self, path: Path, begin: int, steps: int, first: bool = True) -> None:
        self._path, self._first = path, first
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read(path) if row["step"] <= begin] if path.exists() else []
            writing = path.with_name(f"{path.name}.writing")  # whoever stops this here has the old one
            writing.write_text("".join(json.dumps(row) + "\n" for row in kept))
            writing.replace(path)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._bars = Progress(*columns, console=Console(quiet=not first))
        self._bar = self._bars.add_task("", total=steps, completed=begin, note="")

    def __enter__(self) -> Log:
        self._bars.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bars.stop()

    def step(self, step: int, **numbers: Any) -> None:
        """Write the numbers of a step, `loss` among them, and move the bar on."""
        self._bars.update(self._bar, completed=step, note=f"loss {numbers['loss']:.3f}")
        self.write({"step": step, **numbers})

    def evaluation(self, step: int, val_loss: float) -> None:
        """Write and show the loss on held-out text."""
        self._bars.console.print(f"step {step}: held-out loss {val_loss:.4f}")
        self.write({"step": step, "val_loss": val_loss})

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line to the file."""
        if self._first:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log. A last one that was cut off is left out.

    Raises:
        ValueError: a line is no object in JSON with a step.
    """
    text = path.read_text()
    rows = []
    for n, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
            int(rows[-1]["step"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path} should be a log, in each line an object in JSON with a step, but line {n} is: {line[:80]!r}"
            ) from None
    return rows


def draw(logs: Mapping[str, Path], to: Path) -> None:
    """Draw losses over steps into a PNG, of several trainings by their names: a running mean, and the held-out ones.

    The mean is of as many steps for all, a fiftieth of the longest training, so that all are smoothed alike.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    rows_of = {name: read(path) for name, path in logs.items()}
    window = max(1, max(sum("loss" in row for row in rows) for rows in rows_of.values()) // 50)
    for name, rows in rows_of.items():
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        held_out = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
        steps, means = running(losses, max(1, min(window, len(losses))))
        (line,) = axes.plot(steps, means, label=f"{name}, training", linewidth=1.6)
        if held_out:
            style = {"color": line.get_color(), "label": f"{name}, held out", "markersize": 5}
            axes.plot(*zip(*held_out, strict=True), "o--", **style)
    axes.grid(alpha=0.3)
    over_steps(axes, "loss, nats per token")
    figure.savefig(to)


def over_steps(axes: Axes, what: str, **legend: Any) -> None:
    """Label axes of a picture over steps, large enough to be read at half its size."""
    axes.set_xlabel("step", fontsize=13)
    axes.set_ylabel(what, fontsize=13)
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(**{"frameon": False, "fontsize": 12, **legend})


def running(points: Sequence[tuple[int, float]], window: int) -> tuple[list[int], list[float]]:
    """Return steps and the means of the last `window` losses at each, from the first full window."""
    ends = range(window, len(points) + 1)
    means = [sum(loss for _, loss in points[end - window : end]) / window for end in ends]
    return [points[end - 1][0] for end in ends], means
