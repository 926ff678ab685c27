"""Report for a person: a line for each stage, a table of the models' steps, a row for bench/RESULTS.md."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from ... import backends
from .runner import BAD, FAILED, NEEDS_GPU, NOT_RUN, OK, SKIPPED, STOPPED, WRONG, Record

_STYLES = {OK: "green", WRONG: "bold red", FAILED: "bold red", NOT_RUN: "yellow", SKIPPED: "yellow", STOPPED: "yellow"}
_MOST = 20  # lines on what is wrong


def line(record: Record) -> str:
    """Return the line that appears when a stage begins, or ends."""
    if record.status == NOT_RUN and not record.summary:
        return f"{record.number:2} {record.name}: {record.question}"
    if record.status in (NEEDS_GPU, NOT_RUN):
        return f"{record.number:2} {record.name}: {record.status}{', ' if record.summary else ''}{record.summary}"
    return f"   {record.status}, {record.seconds:.0f} s{': ' if record.summary else ''}{record.summary}"


def show(records: Sequence[Record]) -> None:
    """Print the tables, with rich if it is installed."""
    rows = [(str(r.number), r.name, r.status, f"{r.seconds:.0f}", r.summary or r.question) for r in records]
    _table("", ("", "stage", "result", "s", "found"), rows, right=(0, 3))
    for record in records:
        for each in record.wrong[:_MOST]:
            print(f"{record.name}: {each}")
        if len(record.wrong) > _MOST:
            print(f"{record.name}: and {len(record.wrong) - _MOST} more, which --json FILE has")
    for heading, header, body in _models(records):
        _table(heading, header, body, right=range(1, len(header)))
    if row := results_row(records):
        print(f"\nfor bench/RESULTS.md:\n{row}")
    print(f"\n{verdict(records)}")


def verdict(records: Sequence[Record]) -> str:
    """Return the sentence that all comes down to."""
    bad = [record.name for record in records if record.status in BAD]
    if bad:
        return f"something is wrong: {', '.join(bad)}"
    done = [record.name for record in records if record.status == OK]
    if not done:
        return "nothing was run"
    unchecked = sum(len(record.data["left out"]) for record in records if "checks" in record.data)
    more = f"; {unchecked} checks had no time, give more --minutes" if unchecked else ""
    return f"nothing is wrong in what was run: {', '.join(done)}{more}"


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        _plain(title, header, list(rows))
        return
    table = Table(title=title or None, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console().print(table)


def _plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    if title:
        print(title)
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _found(records: Sequence[Record], name: str) -> dict[str, Any]:
    return next((record.data for record in records if record.name == name and record.status == OK), {})


def _models(records: Sequence[Record]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Return (heading, header, rows) of the table of steps, if they were timed."""
    workloads = _found(records, "models").get("workloads", {})
    names = list(dict.fromkeys(name for rows in workloads.values() for name in rows))
    if not names:
        return []
    heading = "ms a step: with the host, and replayed as a graph in parentheses; % of what FLOPs or bytes take at best"
    return [
        (
            heading,
            ("workload", *names),
            [[w, *(_cell(rows.get(n, {})) for n in names)] for w, rows in workloads.items()],
        )
    ]


def _cell(row: dict[str, Any]) -> str:
    if "wall, ms" not in row:
        return "none" if "failed" in row else ""
    graph = f" ({row['graph, ms']:.3f})" if "graph, ms" in row else ""
    share = f", {row['% of roofline']:.0f} %" if "% of roofline" in row else ""
    return f"{row['wall, ms']:.3f}{graph}{share}"


def results_row(records: Sequence[Record]) -> str:
    """Return the row of "What each change brought"; an empty text unless steps were timed."""
    workloads = _found(records, "models").get("workloads", {})
    if not workloads:
        return ""
    parts = []
    for workload, rows in workloads.items():
        times = {name: row["wall, ms"] for name, row in rows.items() if "wall, ms" in row}
        ours = {name: took for name, took in times.items() if name in backends.BACKENDS}
        others = {name: took for name, took in times.items() if name not in backends.BACKENDS}
        if ours and others:
            mine, theirs = min(ours, key=lambda n: ours[n]), min(others, key=lambda n: others[n])
            parts.append(f"{workload} {mine} {ours[mine]:.3f}, {theirs} {others[theirs]:.3f}")
    facts = _found(records, "facts")
    gpu = f"{facts.get('device')}, torch {facts.get('torch')}, triton {facts.get('triton')}"
    date = datetime.date.today().isoformat()
    measured = f"ms a step with the host, best of ours and of others: {'; '.join(parts)}"
    return f"| {date} | `python -m muon_kernels verify` on {gpu} | | {measured} |"
