"""Matrices on several ranks: put together one at a time, and each measured by one of the ranks that have it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.placement import dim_of, ranges_at
from ..layout import flattens, split_shape
from ..tensors import is_dtensor, local
from .quantities import QUANTITIES, summary

T = TypeVar("T")
Groups = tuple[dist.ProcessGroup, ...]


def groups_of(p: Tensor, copies: dist.ProcessGroup | None) -> Groups:
    """Return the process groups of those who have a part or a copy of `p`: one for each dimension of its mesh.

    What is gathered or reduced over each in turn comes from all of these ranks.

    Args:
        p: a parameter.
        copies: the ranks that have the same plain tensors.
    """
    if is_dtensor(p):
        mesh = p.device_mesh
        return tuple(mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1)
    return () if copies is None or copies.size() == 1 else (copies,)


def answered(what: str, collective: Callable[..., T], *args: Any, **options: Any) -> T:
    """Return what a function with a collective returns. If it fails, say in the error what it was for.

    Raises:
        RuntimeError: it failed, as where a rank did not take part in time.
    """
    try:
        return collective(*args, **options)
    except Exception as error:
        raise RuntimeError(
            f"{what} should be done on every rank that has a part or a copy of the matrices, but a collective "
            f"of them failed: {error}"
        ) from error


class Held(NamedTuple):
    """Ranks, of the last process group that was asked, that have something; and the first one's value of it."""

    ranks: Sequence[int]
    value: Any


def agree(groups: Groups, facts: Sequence[str], has: Sequence[Any], what: str) -> list[Held]:
    """Ask all ranks of these groups what they have; all of them have to call it.

    Args:
        groups: see `groups_of`. Without any, this rank is alone.
        facts: what should be the same on all.
        has: any values; one that is false says that this rank lacks it.
        what: what this is for, in an error.

    Returns:
        For each of `has`, the ranks whose value is true.

    Raises:
        ValueError: facts differ, on all ranks.
        RuntimeError: see `answered`.
    """
    wrong, held = "", [Held([0] if value else [], value) for value in has]
    for group in groups:
        everybody: list[Any] = [None] * group.size()
        own = list(facts), [each.value for each in held], wrong
        answered(what, dist.all_gather_object, everybody, own, group=group)
        # What another group of a mesh has found goes on to the next, so that all raise.
        wrong = next(filter(None, (each[2] for each in everybody)), "") or _difference([each[0] for each in everybody])
        held = []
        for values in zip(*(each[1] for each in everybody), strict=False):
            ranks = [rank for rank, value in enumerate(values) if value]
            held.append(Held(ranks, values[ranks[0]] if ranks else None))
    if wrong:
        raise ValueError(wrong)
    return held


def _difference(facts: Sequence[Sequence[str]]) -> str:
    """Return a sentence on the first rank that differs from the first, or nothing."""
    for rank, own in enumerate(facts):
        if own != facts[0]:
            pairs = zip([*facts[0], "nothing more"], [*own, "nothing more"], strict=False)
            first, other = next((a, b) for a, b in pairs if a != b)
            return (
                f"all ranks should record the same but rank {rank} of a process group has {other} where rank 0 has "
                f"{first}"
            )
    return ""


class Share:
    """The matrices of a parameter of which this rank has all or a part.

    Attributes:
        batch, rows, cols: number and size of all matrices of the parameter.
        indices: those of which this rank has a part.
        ranks: how many ranks have parts or copies of the same ones, this rank included.
        turn: the place of this rank among them.
        key: equal on these ranks, and for parameters of which the same ranks have parts.
    """

    def __init__(self, p: Tensor, flatten: bool | None) -> None:
        """Find out what is where.

        Args:
            p: a parameter of at least two dimensions; a DTensor may be placed in any way but as partial sums.
            flatten: see `Muon`.
        """
        shape = tuple(p.shape)
        self.batch, self.rows, self.cols = split_shape(shape, flatten)
        leading = 0 if flattens(shape, flatten) else len(shape) - 2
        self._matrix = (1,) * leading + shape[leading:]
        self._mesh: Any = None
        self.ranks, self.turn = 1, 0
        self.key: Hashable = None
        own = [(0, n) for n in shape]
        if is_dtensor(p):
            self._mesh, at = p.device_mesh, p.device_mesh.get_coordinate()
            assert at is not None
            batched = [i for i, to in enumerate(p.placements) if not to.is_replicate() and dim_of(to, shape) < leading]
            own = list(ranges_at(shape, p.device_mesh.shape, p.placements, batched, [at[i] for i in batched]))
            others = tuple(i for i in range(self._mesh.ndim) if i not in batched)
            self.key = self._mesh, others
            for i in others:
                self.ranks, self.turn = self.ranks * self._mesh.size(i), self.turn * self._mesh.size(i) + at[i]
            self._placements = p.placements, frozenset(batched)
        numbers = torch.arange(self.batch, device="cpu").view(shape[:leading])
        self.indices: list[int] = numbers[tuple(slice(*at) for at in own[:leading])].flatten().tolist()
        self._places = list(product(*(range(stop - start) for start, stop in own[:leading])))

    @property
    def gathers(self) -> bool:
        """Whether matrices are put together from parts, which all ranks that have one do at the same time."""
        return self._mesh is not None

    def part(self, t: Tensor, which: int) -> Tensor:
        """Return this rank's part of a matrix, as a view of `t`, which is placed as the parameter.

        Args:
            t: the parameter, or a tensor like it.
            which: counted among `indices`.
        """
        return local(t.detach())[tuple(slice(i, i + 1) for i in self._places[which])]

    def whole(self, part: Tensor) -> Tensor:
        """Return the matrix, (rows, cols), of which every rank gives its part."""
        if self._mesh is not None:
            from torch.distributed.tensor import DTensor, Replicate

            placements, batched = self._placements
            # Along the dimensions of the mesh that deal out the batch each rank goes its own way.
            at = [Replicate() if i in batched else placement for i, placement in enumerate(placements)]
            size, stride = torch.Size(self._matrix), torch.empty(self._matrix, device="meta").stride()
            of_all = DTensor.from_local(part.contiguous(), self._mesh, at, run_check=False, shape=size, stride=stride)
            part = of_all.full_tensor()
        return part.reshape(self.rows, self.cols)


class Job(NamedTuple):
    """A matrix to measure.

    Attributes:
        row: where its quantities go.
        key: equal for jobs that the same ranks share.
        ranks: how many these are; they take turns.
        turn: this rank's; None if it does not have the matrix.
        gathers: whether all of them have to call `whole` together.
        whole: returns the matrix, (rows, cols).
    """

    row: int
    key: Hashable
    ranks: int
    turn: int | None
    gathers: bool
    whole: Callable[[], Tensor]


def jobs_of(
    share: Share, groups: Groups, by: Held, row: int, read: Callable[[int], Tensor], what: str
) -> Iterator[Job]:
    """Yield a job for each matrix of which this rank has a part, of a parameter or of a tensor that is placed like it.

    Args:
        share: of the parameter.
        groups: see `groups_of`.
        by: the ranks that have it, which of a plain tensor is the whole.
        row: where the quantities of the first matrix go.
        read: returns this rank's part of a matrix, counted among `share.indices`.
        what: what this is for, in an error.
    """
    rank = groups[0].rank() if groups else 0
    turn = by.ranks.index(rank) if rank in by.ranks else None
    for which, index in enumerate(share.indices):

        def whole(which: int = which) -> Tensor:
            return answered(what, share.whole, read(which))

        if share.gathers:
            yield Job(row + index, share.key, share.ranks, share.turn, True, whole)
        else:
            yield Job(row + index, tuple(by.ranks), len(by.ranks), turn, False, whole)


def measure(jobs: Iterable[Job], numbers: Tensor) -> Exception | None:
    """Measure those of the matrices whose turn is this rank's. All ranks that share some have to call it.

    A rank has two matrices at most: the one that it measures, and one that it helps to put together. Matrices are put
    together in rounds, one for each rank, before all ranks measure theirs at the same time.

    Args:
        jobs: those of the same key in the same order on all ranks that share them.
        numbers: (rows, quantities), float64; written at the rows of those that this rank measures.

    Returns:
        What `summary` raised, for it goes on, as other ranks wait for its parts.
    """
    failure: Exception | None = None
    shared: dict[Hashable, list[Job]] = {}
    for job in jobs:
        shared.setdefault(job.key, []).append(job)
    for own in shared.values():
        for first in range(0, len(own), own[0].ranks):
            row, mine = _taken(own[first : first + own[0].ranks])
            if mine is None:
                continue
            try:
                numbers[row] = torch.stack(summary(mine)).to(numbers.device)
            except Exception as error:
                failure = error
    return failure


def _taken(jobs: Sequence[Job]) -> tuple[int, Tensor | None]:
    """Put the matrices of a round together; return the one that is this rank's, and its row."""
    row, mine = 0, None
    for turn, job in enumerate(jobs):
        if turn == job.turn:
            row, mine = job.row, job.whole()
        elif job.gathers:
            job.whole()
    return row, mine


def measure_together(
    jobs: Iterable[Job], count: int, groups: Groups, device: torch.device, what: str
) -> list[list[float]]:
    """Measure matrices, and have every rank know what all have measured.

    Args:
        jobs: this rank's; see `measure`.
        count: number of matrices of all ranks.
        groups: see `groups_of`.
        device: of the parameters.
        what: what this is for, in an error.

    Returns:
        For every matrix its quantities, in the order of `QUANTITIES`.

    Raises:
        RuntimeError: another rank could not measure a matrix, or did not take part. A rank that could not measure one
            raises what it met.
    """
    numbers = torch.zeros(count + 1, len(QUANTITIES), dtype=torch.float64, device=device)
    failure = measure(jobs, numbers)
    numbers[count] = float(failure is not None)
    for group in groups:  # of every matrix one rank has numbers and the others zeros
        answered(what, dist.all_reduce, numbers, group=group)
    if failure is not None:
        raise failure
    *found, failed = numbers.tolist()
    if any(failed):
        raise RuntimeError(f"{what}: another rank could not measure a matrix, and says why; no row has been added")
    return found
