"""Tables of estimates on many ranks, as text and as Markdown, and sentences about what is surprising in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..coefficients import Schedule
from ..distributed import traffic
from ..distributed.balance import assign_owners, least_load
from ..distributed.traffic import elements
from . import splitting
from .estimate import Gpu, kernels_on
from .layouts import LAYOUTS, Layouts, Row
from .models import Model
from .network import FACTS, PROTOCOLS_SOURCE, Fact, Network

RANKS = (8, 64, 256, 1024, 4096, 16384)
TOKENS = Fact(4096, "tokens of a rank in a step, assumed")
MFU = Fact(0.4, "of the GPU's FLOP/s; arXiv 2407.21783, table 4: 38 to 43 % on 8,192 and 16,384 H100")
HEAD = (
    *("ranks (nodes)", "layout", "sends, MB", "beside, MB", "keeps, MB", "holds, MB", "GFLOP", "/ mean", "calls"),
    *("est. exchange, ms", "of it latency", "est. iteration, ms", "est. step, ms", "est. of training", "fits"),
)


def ladder(ranks: int) -> list[int]:
    """Return the numbers of ranks of a table that ends at `ranks`."""
    return [*(each for each in RANKS if each < ranks), ranks]


def training_seconds(model: Model, gpu: Gpu) -> float:
    """Return the time of forward and backward of a step: 6 FLOPs a token and active parameter."""
    active = model.active or elements(model.shapes)
    return 6 * active * TOKENS.value / (MFU.value * gpu.flops)


def rows(model: Model, ranks: Sequence[int], gpu: Gpu, schedule: Schedule) -> list[Row]:
    """Return the estimates of every layout on each number of ranks, on a network of `gpu`'s."""
    network = Network(gpu.nvlink)
    return [row for each in ranks for row in Layouts(model, each, gpu, schedule, network).rows()]


def cells(row: Row, model: Model, gpu: Gpu, schedule: Schedule) -> list[str]:
    """Return a line of a table, see `HEAD`."""
    once = sum(traffic.flops(model.shapes, schedule=schedule, backend=kernels_on(gpu)[0].backend))
    cost, timeline, nodes = row.cost, row.timeline, Network(gpu.nvlink).group(row.ranks).nodes
    exchange, step = timeline.exchange, timeline.seconds
    return [
        f"{row.ranks} ({nodes})",
        row.name,
        *(f"{bytes_ / 1e6:,.0f}" for bytes_ in (cost.sent, row.beside, cost.state, cost.workspace + cost.buffers)),
        f"{cost.flops / 1e9:,.0f}",
        f"{cost.flops * row.ranks / once:.2f}",
        f"{cost.collectives:,.0f}",
        f"{exchange.both * 1e3:,.1f}",
        f"{exchange.latency / exchange.both:.0%}" if exchange.both else "",
        f"{timeline.iterating * 1e3:,.1f}",
        f"{step * 1e3:,.1f}",
        f"{step / (step + training_seconds(model, gpu)):.1%}",
        "yes" if row.memory <= gpu.memory else "no",
    ]


def assumptions(model: Model, gpu: Gpu) -> Iterator[str]:
    """Yield what the estimates of a model are of, with the sources."""
    kernels = kernels_on(gpu)[0].name
    yield f"estimates, not measurements: {gpu.name}, iteration by {kernels} as `ledger` without --ranks estimates it"
    yield (
        f"training, estimated: 6 x {(model.active or elements(model.shapes)) / 1e9:.4g} G parameters x {TOKENS.value} "
        f"tokens a rank at {MFU.value:.0%} take {training_seconds(model, gpu) * 1e3:,.0f} ms"
    )
    yield "estimated from"
    if model.source:
        yield f"  shapes: {model.source}"
    yield f"  {TOKENS.value}: {TOKENS.source}"
    yield f"  {MFU.value:.0%}: {MFU.source}"
    yield f"  fits: {gpu.memory / 1e9:g} GB (data sheet) have bf16 parameters, what is kept and held; no gradients"
    yield f"  {gpu.nvlink:g}: bytes/s of a GPU to its node, one way; data sheet of {gpu.name}: half of NVLink's"
    for fact in FACTS.values():
        yield f"  {fact.value:g}: {fact.source}"
    yield f"  {PROTOCOLS_SOURCE}"


def text(model: Model, ranks: Sequence[int], gpu: Gpu, schedule: Schedule) -> Iterator[str]:
    """Yield the lines of a table for a terminal."""
    yield from assumptions(model, gpu)
    yield "layouts"
    yield from (f"  {name}: {meaning}" for name, meaning in LAYOUTS.items())
    yield ""
    found = rows(model, ranks, gpu, schedule)
    yield from _aligned(HEAD, [cells(row, model, gpu, schedule) for row in found])
    yield ""
    yield from remarks(model, found, gpu, schedule)
    yield ""
    yield "if ranks of a node shared the costliest matrices, which is not written"
    yield from _aligned(splitting.HEAD, list(splitting.lines(model, found, gpu, schedule)))


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table for a terminal, with a gap before each number of ranks."""
    table = [list(head), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    before = head[0]
    for line in table:
        if line[0] != before:
            yield ""
        before = line[0]
        padded = (
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()


def markdown(head: Sequence[str], table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    for line in (head, ["---"] * len(head), *table):
        yield f"| {' | '.join(line)} |"


def remarks(model: Model, found: Sequence[Row], gpu: Gpu, schedule: Schedule | None = None) -> Iterator[str]:
    """Yield sentences about the estimates: what is hidden, how even the owners are, which layout is fastest."""
    owners = [row for row in found if row.name == "owners, FSDP2"]
    if (late := _from(owners, [row.timeline.exchange.both > row.timeline.computing for row in owners])) is not None:
        yield (
            f"Under FSDP2 the exchange of owners is estimated to take longer than the slowest rank computes from "
            f"{late.ranks} ranks on: it is no longer hidden."
        )
    waits = [row.timeline.exchange.latency > row.timeline.exchange.bytes for row in owners]
    if (waiting := _from(owners, waits)) is not None:
        yield f"From {waiting.ranks} ranks on more than half of that exchange is estimated to be latency."
    flops = traffic.flops(model.shapes, schedule=schedule, backend=kernels_on(gpu)[0].backend)
    matrices, once = sum(count for *_, count in model.shapes), sum(flops)
    if (fewer := _from(owners, [row.ranks > matrices for row in owners])) is not None:
        yield (
            f"From {fewer.ranks} ranks on there are more ranks than the {matrices} matrices: some have none, and the "
            f"slowest has {fewer.cost.flops * fewer.ranks / once:.2f} times the mean."
        )
    for ranks in dict.fromkeys(row.ranks for row in found):
        whole = [r for r in found if r.ranks == ranks and not r.name.startswith(("AdamW", "MuonBP"))]
        fitting = [row for row in whole if row.memory <= gpu.memory]
        best = min(fitting, key=lambda row: row.timeline.seconds, default=None)
        if best is None:
            yield f"On {ranks} ranks no layout of whole Muon fits."
        else:
            milliseconds = f"{best.timeline.seconds * 1e3:,.1f} ms a step"
            yield f"Estimated fastest whole Muon that fits {ranks} ranks: {best.name}, {milliseconds}."


def _from(rows: Sequence[Row], holds: Sequence[bool]) -> Row | None:
    """Return the first row from which on it holds for all; None if it does not for the last."""
    first = None
    for row, does in zip(rows, holds, strict=True):
        first = (first or row) if does else None
    return first


def slowest(model: Model, ranks: Sequence[int]) -> list[str]:
    """Return, by ranks, FLOPs of the slowest owner over the mean; in brackets what no deal of whole matrices beats."""
    each = traffic.flops(model.shapes)
    found = []
    for count in ranks:
        loads, mean = [0] * count, sum(each) / count
        for cost, owner in zip(each, assign_owners(each, count), strict=True):
            loads[owner] += cost
        least = f"{least_load(each, count) / mean:.2f}"
        found.append(f"{max(loads) / mean:.2f}" + (f" ({least})" if least != "1.00" else ""))
    return found
