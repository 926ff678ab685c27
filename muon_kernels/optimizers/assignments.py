"""The result of `param_groups`: groups of parameters, and a table of what went where."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple


class Assignment(NamedTuple):
    """The optimizer that a parameter was assigned to, with the reason.

    Attributes:
        name: full name of the parameter.
        shape: its size.
        optimizer: "Muon", "AdamW" or "none" for a frozen parameter.
        reason: in words.
    """

    name: str
    shape: tuple[int, ...]
    optimizer: str
    reason: str


class ParamGroups(list[dict[str, Any]]):
    """List of param groups, those of Muon first, then those of AdamW. Print it to see what went where."""

    def __init__(self, groups: Iterable[dict[str, Any]], assignments: Iterable[Assignment]) -> None:
        """Hold `groups`, and the assignments that `summary` shows."""
        super().__init__(groups)
        self.assignments = tuple(assignments)

    @property
    def muon(self) -> list[dict[str, Any]]:
        """The groups of Muon: one, unless learning rates or weight decays are given by name."""
        return [group for group in self if group["use_muon"]]

    @property
    def adamw(self) -> list[dict[str, Any]]:
        """The groups of AdamW: one, unless learning rates or weight decays are given by name."""
        return [group for group in self if not group["use_muon"]]

    def summary(self) -> str:
        """Return a table: name, shape, optimizer and reason, then the totals.

        Parameters that differ in nothing but numbers in their names, as those of equal layers do, are one line, with
        how many they are before the shape. `assignments` has all.
        """
        rows = [("parameter", "shape", "optimizer", "reason")]
        totals: dict[str, list[int]] = {}
        for at in self.assignments:
            totals.setdefault(at.optimizer, []).append(math.prod(at.shape))
        for at, count in _folded(self.assignments):
            shape = "x".join(map(str, at.shape))
            rows.append(
                (
                    _SCATTERED.sub(r"\1...,\2", at.name),
                    f"{count} x {shape}" if count > 1 else shape,
                    at.optimizer,
                    at.reason,
                )
            )
        lines = list(_lines(rows))
        for optimizer in ("Muon", "AdamW", "none"):
            if sizes := totals.get(optimizer):
                lines.append(f"{optimizer}: {len(sizes)} parameters, {sum(sizes):,} elements")
        return "\n".join(lines)

    __str__ = summary


def _folded(assignments: Iterable[Assignment]) -> list[tuple[Assignment, int]]:
    """Join rows that are alike but for numbers in the name; return each with the number of parameters it stands for.

    The joint name is, for example, `layers.0..11.weight`.
    """
    rows = [(at, 1) for at in assignments]
    # The last number first: experts of a layer, then layers that have the same experts.
    for depth in reversed(range(max((at.name.count(".") for at, _ in rows), default=-1) + 1)):
        alike: dict[tuple[Any, ...], list[tuple[Assignment, int]]] = {}
        for at, count in rows:
            parts = at.name.split(".")
            numbered = depth < len(parts) and parts[depth].isdecimal()
            name = (*parts[:depth], "", *parts[depth + 1 :]) if numbered else at.name
            alike.setdefault((name, at[1:]), []).append((at, count))
        rows = [(_joined([at for at, _ in same], depth), sum(count for _, count in same)) for same in alike.values()]
    return rows


def _joined(same: Sequence[Assignment], depth: int) -> Assignment:
    """Return one assignment for all of `same`, its name with all their numbers at that depth: `0..11`, or `0..3,8`."""
    if len(same) == 1:
        return same[0]
    parts = same[0].name.split(".")
    runs: list[list[int]] = []
    for number in sorted(int(at.name.split(".")[depth]) for at in same):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts[depth] = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return same[0]._replace(name=".".join(parts))


_SCATTERED = re.compile(r"((?:\d[\d.]*,){2})(?:\d[\d.]*,){2,}(\d)")  # more than four numbers or runs of them
_WIDTH, _REASON = 100, 24


def _lines(rows: Sequence[tuple[str, str, str, str]]) -> Iterator[str]:
    """Yield the lines of a table of four columns. A long name has a line of its own, a long reason several."""
    names, shapes, optimizers, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    names = min(names, _WIDTH - shapes - optimizers - _REASON - 6)
    margin = names + shapes + optimizers + 6
    for name, shape, optimizer, reason in rows:
        if len(name) > names:
            yield name
            name = ""
        texts = textwrap.wrap(reason, _WIDTH - margin, break_long_words=False, break_on_hyphens=False)
        first, *more = texts or [""]
        yield f"{name.ljust(names)}  {shape.ljust(shapes)}  {optimizer.ljust(optimizers)}  {first}".rstrip()
        yield from (" " * margin + text for text in more)
