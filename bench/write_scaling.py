"""Write the tables of SCALING.md: estimates of a step on many ranks.

    python bench/write_scaling.py            writes them between the marks of SCALING.md; half a minute

Nothing is measured: muon_kernels/cli/scale.py has the tables, and what they are estimated from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from muon_kernels.cli import scale, splitting
from muon_kernels.cli.estimate import GPUS
from muon_kernels.cli.layouts import LAYOUTS
from muon_kernels.cli.models import MODELS
from muon_kernels.coefficients import DEFAULT, resolve
from muon_kernels.distributed.traffic import elements, flops

PAGE = Path(__file__).with_name("SCALING.md")
GPU = GPUS["h100"]
RANKS = scale.RANKS[1:]
ESTIMATED = ("moonlight-16b", "llama-70b", "deepseek-v3")
SMALL, SHARED = (8, 16, 32, 48, 64, 1024), (8, *RANKS)
DEALT = (2, 4, 8, 16, 24, 32, 48, 64, 128, *RANKS[1:])


def slowest() -> Iterator[str]:
    """Yield the table of the slowest owners."""
    table = []
    for name in ("gpt2", "llama-7b", "experts", *ESTIMATED):
        count = sum(n for *_, n in MODELS[name].shapes)
        table.append([name, f"{count:,}", *scale.slowest(MODELS[name], DEALT)])
    yield from scale.markdown(("model", "matrices", *map(str, DEALT)), table)


def layouts() -> Iterator[str]:
    """Yield the table of what the names of layouts stand for."""
    yield from scale.markdown(("layout", "what it is"), list(LAYOUTS.items()))


def estimated(name: str) -> Iterator[str]:
    """Yield a model's section: its head, the table, and what it says."""
    model, schedule = MODELS[name], resolve(DEFAULT)
    count = sum(n for *_, n in model.shapes)
    size, work = elements(model.shapes) / 1e9, sum(flops(model.shapes)) / 1e12
    yield f"### Estimates of {name}: {size:,.2f} G elements in {count:,} matrices, {work:,.0f} TFLOP a step"
    yield ""
    yield from (f"- {line.strip()}" for line in scale.assumptions(model, GPU) if not line.startswith("estimated from"))
    yield ""
    found = scale.rows(model, RANKS, GPU, schedule)
    yield from scale.markdown(scale.HEAD, [scale.cells(row, model, GPU, schedule) for row in found])
    yield ""
    yield from (f"- {sentence}" for sentence in scale.remarks(model, found, GPU))


def shared() -> Iterator[str]:
    """Yield the table of steps in which ranks of a node share matrices."""
    table = []
    for name in ("gpt2", *ESTIMATED):
        found = scale.rows(MODELS[name], SHARED if name != "gpt2" else SMALL, GPU, resolve(DEFAULT))
        table += [[name, *line] for line in splitting.lines(MODELS[name], found, GPU, resolve(DEFAULT))]
    yield from scale.markdown(("model", *splitting.HEAD), table)


SECTIONS = {
    "slowest": slowest,
    "layouts": layouts,
    "shared": shared,
    **{name: lambda name=name: estimated(name) for name in ESTIMATED},
}


def marks(section: str) -> tuple[str, str]:
    """Return the lines between which a section of the page is."""
    return f"<!-- {section} -->\n", f"<!-- end of {section} -->\n"


def main() -> None:
    """Write all sections."""
    text = PAGE.read_text()
    for section, lines in SECTIONS.items():
        begin, end = marks(section)
        before, rest = text.split(begin)
        text = before + begin + "\n" + "\n".join(lines()) + "\n\n" + end + rest.split(end)[1]
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
