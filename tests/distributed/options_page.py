"""The page about options on several ranks, from what test_options.py runs.

PYTHONPATH=tests python tests/distributed/options_page.py > docs/distributed-options.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from option_layouts import BITS, LAYOUTS, REFUSED, ROUNDING, Layout, claim
from test_options import CASES, shapes_of

HEAD = """# Options on several ranks

What a step of each option is in each layout, on a CPU, beside that of one process with the same gradients.
`tests/distributed/test_options.py` runs every cell and compares. It fails as well where a cell says "rounding" and
none is seen. `PYTHONPATH=tests python tests/distributed/options_page.py` writes this page from its tables.

- **bits**: bit for bit that of one process.
- **rounding**: the same but for the order of sums or for one rounding more, see below the table.
- **refused**: raises on all ranks before anything is written, for the reason below the table.
- A dash: no matrix of the case can be like that, or the optimizer has no such thing.

"Rounding on 3" is bits on the other numbers of ranks that the layout names. On one rank all DTensors are the same.

| layout | what it is | ranks |
|---|---|---|
"""

BETWEEN = """
Options are those of `Muon` where no other optimizer is named.
"""

TAIL = """
What is rounded:

- `second_moment="element"` sums squares over the matrix, `"neuron"` over each row: in another order where several
  ranks have parts of it.
- The backend "eager", which steps `workspace_dtype=torch.float16` on a CPU, normalizes slices before it rounds them.
- `momentum_dtype=torch.int8` keeps the largest magnitude of every 2048 elements. A cut within these makes it another.
- `strategy="gram"` sums Gram matrices. What is not cut along its longer side goes to owners, with the bits of one
  process.
- ZeRO-1 rounds directions to bf16 before their norm is taken. With `power=1` nothing is rounded but
  the mean of three gradients.
"""


def _text(value: Any) -> str:
    return f"torch.{str(value).removeprefix('torch.')}" if isinstance(value, torch.dtype) else repr(value)


def options_text(kind: type, own: Mapping[str, Any]) -> str:
    """The optimizer, unless it is `Muon`, and its arguments."""
    inner = ", ".join(f"{key}={_text(value)}" for key, value in own.items())
    if kind.__name__ != "Muon":
        return f"`{kind.__name__}({inner})`"
    return f"`{inner}`" if inner else "none"


def _ranks(sizes: Sequence[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} and {last}" if first else last


def cell(case: str, name: str, layout: Layout) -> str:
    """What the table says of a case in a layout."""
    kind, _, own = CASES[case]
    there = [n for n in layout.sizes if any(layout.has(shape, n, own) for shape in shapes_of(case))]
    by_size = {size: claim(case, kind, own, name, size) for size in there}
    said = list(dict.fromkeys(by_size.values()))
    if not said or said == [None]:
        return "–"
    shown = {BITS: BITS, ROUNDING: ROUNDING} | {text: f"refused ({i})" for i, text in enumerate(REFUSED, 1)}
    if len(said) == 1:
        return shown[str(said[0])]
    others = [text for text in said if text != BITS]
    parts = [f"{shown[str(t)]} on {_ranks([n for n, of in by_size.items() if of == t])}" for t in others]
    return "; ".join(parts)


def page() -> str:
    """The whole page."""
    lines = [f"| {name} | {at.description} | {_ranks(at.sizes)} |" for name, at in LAYOUTS.items()]
    heads = ["case: options", *LAYOUTS]
    rows = [heads, ["---"] * len(heads)]
    for case, (kind, _, own) in CASES.items():
        cells = [cell(case, name, layout) for name, layout in LAYOUTS.items()]
        rows.append([f"{case}: {options_text(kind, own)}", *cells])
    table = [f"| {' | '.join(row)} |" for row in rows]
    reasons = [f"{i}. {text}" for i, text in enumerate(REFUSED, 1)]
    return HEAD + "\n".join([*lines, BETWEEN, *table, "", "Refused because:", "", *reasons, TAIL])


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "distributed-options.md").write_text(page())
