"""Costs of a step of several ranks by other implementations and strategies, by formula; see traffic.py."""

from __future__ import annotations

from .. import backends
from ..coefficients import DEFAULT, Schedule, resolve
from ..segments import segments
from .traffic import Cost, Mesh, Shapes, elements, owners, plan_of, plan_part


def _ring(bytes_: float, ranks: int) -> float:
    """Return the bytes that a rank sends where so many are gathered or scattered."""
    return bytes_ * (ranks - 1) / ranks


def adamw(shapes: Shapes, ranks: int) -> Cost:
    """Return the cost of AdamW under ZeRO-1, whose state is two moments in fp32 of a slice of all parameters.

    It sends nothing but what is `BESIDE`.
    """
    return Cost(0, 8 * elements(shapes) / ranks, 0, 0, 0, 0)


def gathered(shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> Cost:
    """Return the cost of Muon under ZeRO-1 by Algorithm 1 of https://arxiv.org/abs/2502.16982.

    Every rank gathers every matrix's direction in bf16, orthogonalizes it, and keeps its slice of the result. See
    `sliced` for the cheaper reading, in which a rank gathers only the matrices that its slice has elements of.
    """
    schedule = schedule or resolve(DEFAULT)
    plans = [(plan_of(m, n, schedule=schedule, backend=backend), count) for m, n, count in shapes]
    return Cost(
        sent=_ring(2 * elements(shapes), ranks),
        state=4 * elements(shapes) / ranks,
        workspace=max(plan.workspace_bytes for plan, _ in plans),
        buffers=max(2 * m * n for m, n, _ in shapes),
        flops=sum(count * plan.flops for plan, count in plans),
        collectives=sum(count for _, _, count in shapes),
    )


def sliced(shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> list[Cost]:
    """Return the costs of every rank of `ZeroMuon`: its slice of all parameters is one run of their elements.

    It gathers, in one collective, those matrices of which its slice has any element, and multiplies them; matrices at
    the borders of slices are multiplied by several ranks. `collectives` leaves out those that are `BESIDE`.

    Parameters are of bf16, so a rank keeps momentum and master copies in fp32. It holds what it gathers and, in fp32,
    all gradients.
    """
    schedule = schedule or resolve(DEFAULT)
    share = -(-elements(shapes) // ranks)
    sent, flops_, workspace, held = [0] * ranks, [0] * ranks, [0] * ranks, [0] * ranks
    start = 0
    for rows, cols, count in shapes:
        plan, size = plan_of(rows, cols, schedule=schedule, backend=backend), rows * cols
        for _ in range(count):
            first, last = start // share, (start + size - 1) // share
            for rank in range(first, last + 1):
                own = min((rank + 1) * share, start + size) - max(rank * share, start)
                sent[rank] += 2 * own * (last - first)
                flops_[rank] += plan.flops
                workspace[rank] = max(workspace[rank], plan.workspace_bytes)
                held[rank] += 2 * size
            start += size
    whole = 4 * share * ranks
    return [Cost(sent[r], 8 * share, workspace[r], held[r] + whole, flops_[r], 1) for r in range(ranks)]


def padded(shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> Cost:
    """Return the cost where every kind of matrix is exchanged at once, filled up with zeros to a multiple of the ranks.

    Each rank gets as many whole matrices, and as many rows of each. https://github.com/microsoft/dion does so under
    FSDP2 (01287d7, megabatch_base.py). What it holds are inputs and outputs of an exchange of one kind; three kinds may
    be under way.
    """
    schedule = schedule or resolve(DEFAULT)
    sent = state = flops = 0.0
    workspace = buffers = 0
    for rows, cols, count in shapes:
        each, slice_ = padding(rows, cols, count, ranks)
        plan = plan_of(rows, cols, schedule=schedule, backend=backend)
        sent += 2 * each * slice_ * (ranks - 1)
        state += 4 * count * rows * cols / ranks
        flops += each * plan.flops
        workspace, buffers = max(workspace, each * plan.workspace_bytes), max(buffers, 2 * each * slice_ * ranks)
    return Cost(sent, state, workspace, buffers, flops, 2 * len(shapes))


def padding(rows: int, cols: int, count: int, ranks: int) -> tuple[int, int]:
    """Return how many of such matrices each rank gets, zeros among them, and the bytes of a rank's rows of one."""
    return -(-count // ranks), 2 * -(-rows // ranks) * cols


def gram(shapes: Shapes, ranks: int, *, schedule: Schedule | None = None, backend: str = "cuda") -> Cost:
    """Return the cost where each rank multiplies its shard of the longer side and A = Σ Xᵢ Xᵢᵀ is summed in fp32.

    That takes 4 m² bytes each time that A is made of X: for every step in the standard form, for every segment in the
    Gram form. Polynomials of A are every rank's own. https://github.com/NVIDIA-NeMo/Emerging-Optimizers ("distributed")
    does so.
    """
    schedule = schedule or resolve(DEFAULT)
    sent = state = flops = collectives = 0.0
    workspace = buffers = 0
    for rows, cols, count in shapes:
        m, n = min(rows, cols), -(-max(rows, cols) // ranks)
        plan = plan_part(m, n, schedule, backend)
        sums = len(schedule.triples)
        if plan.algorithm == "gram":
            sums = len(segments(schedule, m, backends.get(backend).precise_squares))
        sent += count * sums * 2 * _ring(4 * m * m, ranks)
        state += count * 4 * m * n
        flops += count * plan.flops
        collectives += count * sums
        workspace, buffers = max(workspace, plan.workspace_bytes), max(buffers, 4 * m * m)
    return Cost(sent, state, workspace, buffers, flops, collectives)


def blockwise(
    shapes: Shapes, mesh: Mesh, period: int, *, schedule: Schedule | None = None, backend: str = "cuda"
) -> list[Cost]:
    """Return the costs of MuonBP (https://arxiv.org/abs/2510.16981), the mean over a period of steps.

    One step of `period` has owners; in the others each rank orthogonalizes its own shards.
    """
    schedule = schedule or resolve(DEFAULT)
    alone = [0.0] * mesh.ranks
    for rows, cols, count in shapes:
        for rank, shard in enumerate(mesh.rectangles(rows, cols) * mesh.replicas):
            alone[rank] += count * plan_of(shard.rows, shard.cols, schedule=schedule, backend=backend).flops
    return [
        whole._replace(
            sent=whole.sent / period,
            flops=(whole.flops + (period - 1) * blocks) / period,
            collectives=whole.collectives / period,
        )
        for whole, blocks in zip(owners(shapes, mesh, schedule=schedule, backend=backend), alone, strict=True)
    ]
