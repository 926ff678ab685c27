"""Plans: what a step will do, decided once and shown on demand.

Matrices of equal shape, dtype and device form a bucket; a bucket is cut into chunks that fit the workspace; the form
of the iteration with the fewest FLOPs runs. FLOPs, launches and bytes are not formulas that could drift from the
code: the iteration itself is run over a backend that only counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from .. import backends
from ..coefficients import DEFAULT, Schedule, resolve
from ..newton_schulz import ALGORITHMS, squares_of
from ..options import check_algorithm, check_workspace, check_workspace_dtype
from ..stages.packed import floats
from .counting import count
from .options import StepOptions


@dataclass(frozen=True)
class Bucket:
    """Equal matrices that are stepped together.

    Attributes:
        shape: (m, n) with m ≤ n, as the iteration sees them.
        count: number of matrices.
        algorithm: "standard" or "gram", or "none" where the direction is the update.
        power: of the singular values: 0 for the polar factor.
        backend: who runs it.
        workspace_dtype: of the stacks that are multiplied; a fused step may have none.
        fused: whether a pass is one call of the backend's `fused_step`.
        chunks: number of matrices in each pass.
        slots: most matrices that are in the workspace at a time.
        launches: calls of a kernel in a step, at most.
        flops: FLOPs that are executed, 2 a multiply-add, all matrices.
        product_bytes: traffic of the products if each operand is read and each result written once; none if fused.
        bytes: traffic of prologue and epilogue: gradients, momenta and parameters read, momenta and parameters written,
            and, unless fused, the workspace written and read once each. Where the backend reads twice, so counted; and
            what the parts of matrices leave for one another, what signs, a second moment and what is packed take.
        least_bytes: the same if everything were read once.
        workspace_bytes: of all slots.
        packed: how many of momentum and parameter are kept in fewer bits and computed with in fp32 memory of the
            workspace.
        parts: of the columns of a matrix in a fused step, which takes two launches where there are several.
    """

    shape: tuple[int, int]
    count: int
    algorithm: str
    power: float
    backend: str
    workspace_dtype: torch.dtype
    fused: bool
    chunks: tuple[int, ...]
    slots: int
    launches: int
    flops: int
    product_bytes: int
    bytes: int
    least_bytes: int
    workspace_bytes: int
    packed: int = 0
    parts: int = 1


class Shared(NamedTuple):
    """Matrices that several ranks step together, seen from one of them.

    Attributes:
        ranks: how many.
        matrices: of all ranks.
        owned: of these, what this rank orthogonalizes; the plan's buckets have them.
        elements: of all matrices.
        bytes_sent: by this rank to others in a step, but for a few by which ranks agree to step.
        collectives: calls in a step.
        state_bytes: of the momenta that this rank keeps.
        buffer_bytes: of what is on its way, held beside the workspace.
    """

    ranks: int
    matrices: int
    owned: int
    elements: int
    bytes_sent: int
    collectives: int
    state_bytes: int
    buffer_bytes: int

    @property
    def adamw_state_bytes(self) -> int:
        """Bytes that AdamW under ZeRO-1 would keep on a rank: its part of two moments in fp32."""
        return 8 * self.elements // self.ranks

    def __str__(self) -> str:
        """Write two lines."""
        return (
            f"{self.ranks} ranks step {self.matrices} matrices together. This one multiplies {self.owned}, sends "
            f"{_scaled(self.bytes_sent, 'B')} in {self.collectives} collectives,\nkeeps "
            f"{_scaled(self.state_bytes, 'B')} of momenta (AdamW under ZeRO-1: {_scaled(self.adamw_state_bytes, 'B')}) "
            f"and holds {_scaled(self.buffer_bytes, 'B')} of buffers."
        )


@dataclass(frozen=True)
class Plan:
    """Plan of a step, bucket by bucket; `print` it.

    Attributes:
        buckets: equal matrices; of those that several ranks step together, this one's.
        notes: what "auto" could not use here, and how to fix it.
        shared: what other ranks have a part in.
        host_seconds: the host's time for a step, from the call of `step` to its return without the time of a closure:
            the median of the last 32 steps of this optimizer, None before the first. On a GPU that is the time to issue
            a step, which the GPU may take longer for. On a CPU the step has been done then, and on several ranks the
            time includes that of waiting for others.
    """

    buckets: tuple[Bucket, ...]
    notes: tuple[str, ...] = ()
    shared: tuple[Shared, ...] = ()
    host_seconds: float | None = field(default=None, compare=False)

    @property
    def launches(self) -> int:
        """Kernel calls in a step."""
        return sum(b.launches for b in self.buckets)

    @property
    def flops(self) -> int:
        """FLOPs executed in a step."""
        return sum(b.flops for b in self.buckets)

    @property
    def product_bytes(self) -> int:
        """Bytes moved by products in a step."""
        return sum(b.product_bytes for b in self.buckets)

    @property
    def bytes(self) -> int:
        """Bytes moved by prologue and epilogue in a step."""
        return sum(b.bytes for b in self.buckets)

    @property
    def least_bytes(self) -> int:
        """Bytes that a step would move if everything were read once."""
        return sum(b.least_bytes for b in self.buckets)

    @property
    def workspace_bytes(self) -> int:
        """Workspace that a step holds: buckets follow one another and share it."""
        return max((b.workspace_bytes for b in self.buckets), default=0)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others in a step."""
        return sum(s.bytes_sent for s in self.shared)

    @property
    def buffer_bytes(self) -> int:
        """Bytes held beside the workspace for what other ranks send and are sent."""
        return sum(s.buffer_bytes for s in self.shared)

    def __str__(self) -> str:
        """A table with a row for every bucket."""
        between = [str(s) for s in self.shared if s.matrices]
        if self.host_seconds is not None:
            between.append(f"The host took {1e3 * self.host_seconds:.2f} ms for a step, the median of the last.")
        if not self.buckets:
            return "\n".join([*between, *self.notes]) or "nothing to do: Muon was given no matrix"
        rows = [("matrices", "algorithm", "backend", "launches", "FLOPs", "bytes moved", "workspace")]
        for b in self.buckets:
            name = f"{b.count} x {b.shape[0]}x{b.shape[1]}"
            algorithm = f"{b.algorithm}, power {b.power:g}" if b.power else b.algorithm
            rows.append((name, algorithm, b.backend, *_figures(b)))
        rows.append(("total", "", "", *_figures(self)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * len(lines[0])
        note = ["A launch is a call of a kernel; where it is one, the whole step is fused."]
        if any(b.shape[0] < b.shape[1] for b in self.buckets):
            note.append("A matrix taller than wide is stepped, and shown, as its transpose.")
        note += [
            f"Each of {b.count} x {b.shape[0]}x{b.shape[1]} is cut along its columns into {b.parts} parts, and the "
            "fused step into two launches."
            for b in self.buckets
            if b.parts > 1
        ]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *between, *note, *self.notes])


def _figures(of: Bucket | Plan) -> tuple[str, str, str, str]:
    return str(of.launches), _scaled(of.flops, ""), _scaled(of.bytes, "B"), _scaled(of.workspace_bytes, "B")


def _scaled(value: float, unit: str) -> str:
    """Write a number with three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T{unit}"


def choose_algorithm(name: str, backend: str, m: int, n: int, schedule: Schedule) -> str:
    """Return the form that runs: `name`, or for "auto" that of fewest FLOPs among those as exact as torch's loop."""
    if name != "auto":
        return name
    if not backends.get(backend).precise_squares:
        return "standard"  # the Gram form holds the standard form's accuracy only where a backend has precise squares
    return min(ALGORITHMS, key=lambda a: _count_on(backend, a, m, n, schedule)[1])


def _count_on(backend: str, algorithm: str, m: int, n: int, schedule: Schedule) -> tuple[int, int, int]:
    ops = backends.get(backend)
    return count(algorithm, m, n, schedule, ops.symmetric_products, ops.precise_squares)


def workspace_bytes(backend: str, algorithm: str, m: int, n: int, schedule: Schedule, packed: int = 0) -> int:
    """Return the workspace of one m x n matrix, in bytes; momentum and parameter are in it one after the other."""
    ops, squares = backends.get(backend), squares_of(algorithm, schedule)
    # An fp64 and four fp32 numbers, and what they may need to be aligned.
    wide, numbers = (3, 32) if schedule.weights else (2, 0)
    stacks = 2 * m * (wide * ops.leading_dimension(n) + squares * ops.leading_dimension(m))
    unpacked = 4 * floats(m, n) if packed else 0
    diagonals = 4 * m * squares if ops.precise_squares else 0
    return unpacked + stacks + ops.scratch_bytes(m, n) + diagonals + numbers


def chunk_counts(total: int, each: int, cap: int | None, backend: str) -> tuple[int, ...]:
    """Divide `total` matrices into passes through the workspace, as evenly as the cap allows.

    Raises:
        ValueError: the cap that the user set does not even hold one matrix.
    """
    if cap is not None and each > cap:
        raise ValueError(f"max_workspace_bytes should be at least {each} to hold one matrix but is: {cap}")
    most = max(1, (backends.get(backend).default_workspace_bytes if cap is None else cap) // max(each, 1))
    passes = -(-total // most)
    return tuple(total * (i + 1) // passes - total * i // passes for i in range(passes))


def plan_bucket(
    shape: tuple[int, int],
    count_: int,
    options: StepOptions,
    backend: str,
    *,
    bytes_per_element: int,
    direction_bytes: int = 0,
    stepped: bool = True,
    stage_bytes: int = 0,
) -> Bucket:
    """Plan `count_` matrices of one shape (m ≤ n) on a backend that was chosen.

    Args:
        shape: (m, n).
        count_: number of matrices.
        options: of the group. No step with stages is fused.
        backend: a name in BACKENDS, in place of that in the options.
        bytes_per_element: of gradient once, momentum and parameter twice.
        direction_bytes: of these, what is read of an element for its direction; only counts where a step may be fused.
        stepped: whether parameters are updated, so that a whole step may be fused.
        stage_bytes: scratch of the stages for a matrix.

    Raises:
        ValueError, TypeError: an algorithm or a dtype that there is not, a cap that is none or holds no matrix.
    """
    check_algorithm(options.ns_algorithm)
    check_workspace(options.max_workspace_bytes)
    check_workspace_dtype(options.workspace_dtype)
    (m, n), schedule, stages, ops = shape, options.schedule, options.stages, backends.get(backend)
    algorithm = choose_algorithm(options.ns_algorithm, backend, m, n, schedule)
    packed, size = sum(stage.packed for stage in stages), options.workspace_dtype.itemsize
    nothing = (), 0, 0, 0, 0, 0, 0, 0
    bucket = Bucket(
        shape, count_, algorithm, schedule.power, backend, options.workspace_dtype, False, *nothing, packed=packed
    )
    if m == 0 or count_ == 0:
        return bucket
    each = workspace_bytes(backend, algorithm, m, n, schedule, packed) + stage_bytes
    launches, flops, product_bytes = _count_on(backend, algorithm, m, n, schedule)
    elements, cap = count_ * m * n, options.max_workspace_bytes
    fused = None
    if stepped and not stages and not schedule.weights:
        fused = ops.fused_plan(m, n, count_, schedule, options.stochastic_rounding, cap)
    needed = 0 if fused is None else fused.slots * each + fused.partial_bytes
    if fused is not None and needed <= (ops.default_workspace_bytes if cap is None else cap):
        least = elements * bytes_per_element
        return replace(
            bucket,
            fused=True,
            chunks=(count_,),
            slots=fused.slots,
            launches=fused.launches,
            flops=count_ * (flops if fused.flops is None else fused.flops),
            bytes=least + elements * direction_bytes * (fused.reads - 1) + fused.partial_bytes * (1 + fused.parts),
            least_bytes=least,
            workspace_bytes=needed,
            parts=fused.parts,
        )
    chunks = chunk_counts(count_, each, cap, backend)
    least = elements * (bytes_per_element + 2 * size)
    return replace(
        bucket,
        chunks=chunks,
        slots=max(chunks),
        launches=sum(
            launches + ops.update_launches(chunk) + sum(stage.launches for stage in stages) for chunk in chunks
        ),
        flops=count_ * flops,
        product_bytes=count_ * product_bytes,
        bytes=least + elements * sum(stage.visits * size + stage.state_bytes for stage in stages),
        least_bytes=least,
        workspace_bytes=max(chunks) * each,
    )


def plain_bucket(shape: tuple[int, int], count_: int, bytes_per_element: int) -> Bucket:
    """Plan matrices that go through no iteration."""
    bytes_ = count_ * shape[0] * shape[1] * bytes_per_element
    fp32 = torch.float32
    return Bucket(shape, count_, "none", 1.0, "eager", fp32, False, (), 0, count_, 0, 0, bytes_, bytes_, 0)


def plan_for_shapes(
    shapes: Iterable[tuple[int, int, int]],
    *,
    schedule: Schedule | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    ns_algorithm: str = "auto",
    max_workspace_bytes: int | None = None,
    workspace_dtype: torch.dtype = torch.bfloat16,
    available: bool = True,
) -> Plan:
    """Plan a step for (rows, cols, count) of every kind of matrix, without any tensor.

    Args:
        shapes: (rows, cols, count).
        available: False to plan for a named backend that need not be able to run here.
        schedule, device, dtype, backend, ns_algorithm, max_workspace_bytes, workspace_dtype: as in a step.
    """
    shapes = list(shapes)
    for given in shapes:
        if len(given) != 3 or not all(type(n) is int and n >= 0 for n in given):
            raise ValueError(f"shapes should be (rows, cols, count), three integers >= 0, but one is: {given!r}")
    counts: dict[tuple[int, int], int] = {}
    for rows, cols, count_ in shapes:  # tall and wide ones share a bucket
        shape = min(rows, cols), max(rows, cols)
        counts[shape] = counts.get(shape, 0) + count_
    options = StepOptions(
        schedule or resolve(DEFAULT, None),
        ns_algorithm=ns_algorithm,
        max_workspace_bytes=max_workspace_bytes,
        workspace_dtype=workspace_dtype,
    )
    buckets, notes = [], {}
    for shape, count_ in counts.items():
        name = backend
        if available:
            name, why = backends.choose(backend, torch.device(device), [dtype], workspace_dtype, shape)
            notes.update(dict.fromkeys(why))
        buckets.append(
            plan_bucket(
                shape,
                count_,
                options,
                name,
                bytes_per_element=5 * dtype.itemsize,
                direction_bytes=2 * dtype.itemsize,
            )
        )
    return Plan(tuple(buckets), tuple(notes))
