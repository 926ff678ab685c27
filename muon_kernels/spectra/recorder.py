"""Recorder that hooks into an optimizer and keeps the spectra of its matrices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports dynamo when called only
from torch.optim import Optimizer

from ..distributed.placement import team_of
from ..distributed.ranks import Ranks
from ..layout import split_shape
from ..tensors import check_dense, is_dtensor, local
from .rows import Row, load, make_rows, save
from .shares import Groups, Held, Job, Share, agree, groups_of, jobs_of, measure_together

TENSORS = ("weight", "momentum", "update")

# State keys of a momentum: of Muon and SGD; of Adam, AdamW and Lion.
_MOMENTA = ("momentum_buffer", "exp_avg")


class _Subject(NamedTuple):
    """A parameter to record, its name, and the `flatten` of its group."""

    name: str
    param: Tensor
    flatten: bool | None


class Recorder:
    """Recorder of the spectra of an optimizer's matrices, every so many steps. It changes nothing in the training.

        recorder = Recorder(optimizer, model.named_parameters(), every=100)

    It hooks into `optimizer.step` (`register_step_pre_hook` and `register_step_post_hook`), of any torch optimizer. A
    recorded step keeps a copy of the matrices' weights while it runs, and takes about a second more for a 768x3072 on
    one core. Other steps take no longer than before. A recorded step adds rows (see `describe`) of

    - "weight": the parameter as the step left it;
    - "momentum": the state `momentum_buffer` or `exp_avg`, where the optimizer has it;
    - "update": the parameter after the step less the one before, with learning rate, weight decay, and rounding to the
      parameter's dtype in it; no row where there was no gradient. A step that GradScaler leaves out is not counted.

    It records what Muon sees as matrices: parameters of two dimensions, each matrix of a stack of three, convolutions
    and whatever else the group's `flatten` makes (first, all others). It leaves out complex numbers and vectors, also
    those that are matrices of one row or column.

    On several ranks, every one that has a part or a copy of the matrices makes a recorder, steps, and calls `record`
    alike. All of them get the rows that one process would have, and rank 0 of them saves. DTensors say themselves
    which ranks these are, of plain tensors `process_group` does. A recorded step puts the matrices of DTensors
    together (`full_tensor`), one at a time, and each is decomposed on one rank; matrices that ranks have whole, as
    copies or as experts, are not sent. Other steps send nothing. Plain tensors without a process group are each
    rank's own: it records all of them, and saves them unless a DTensor makes another rank 0.

    Args:
        optimizer: optimizer whose steps are counted.
        named_parameters: (name, parameter) pairs. Other parameters, and all if None, have the names of the
            `param_names` of their group, as `muon_kernels.param_groups` sets them, or "group.place in it".
        every: positive int; the steps every, 2 every, 3 every ... are recorded.
        names: `fnmatch` patterns; a name has to match one. Leave out an embedding, whose decomposition takes long.
        tensors: those of "weight", "momentum" and "update" to record.
        process_group: ranks that have the same plain tensors, as under DistributedDataParallel, for any optimizer.
            None takes that of a `Muon`, `MuonAdamW` or `SpectralMomentum` that has one, where momenta are with their
            owners.

    Attributes:
        rows: rows of all recorded steps, on all ranks.
        step: number of steps that were done.

    Raises:
        ValueError: there is nothing to record, a tensor is unknown, `every` is below 1, a DTensor has partial sums, or
            ranks differ in what they record. A recorded step raises as well if ranks differ; no row is added then.
        TypeError: `optimizer` is no optimizer, `named_parameters` are no pairs, or `process_group` is none.
        RuntimeError: a rank did not take part within the timeout of the process group, or could not decompose a
            matrix; no row is added then. A recorded step raises it, too.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        *,
        every: int = 100,
        names: str | Iterable[str] = "*",
        tensors: str | Iterable[str] = TENSORS,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Hook into the optimizer."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer should be a torch.optim.Optimizer but is: {type(optimizer).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every should be an int >= 1 but is: {every!r}")
        self.rows: list[Row] = []
        self.step = 0
        self._optimizer = optimizer
        self._process_group = None if process_group is None else team_of(process_group).replicas
        self._every = every
        self._patterns = (names,) if isinstance(names, str) else tuple(names)
        self._tensors = (tensors,) if isinstance(tensors, str) else tuple(tensors)
        if unknown := [tensor for tensor in self._tensors if tensor not in TENSORS]:
            raise ValueError(f"tensors should be among {', '.join(map(repr, TENSORS))} but include: {unknown[0]!r}")
        try:
            self._names = {p: name for name, p in named_parameters or ()}
        except (TypeError, ValueError):
            raise TypeError(
                "named_parameters should be (name, parameter) pairs, as model.named_parameters() has them, but is: "
                f"{type(named_parameters).__name__}"
            ) from None
        if self._names and not any(p in self._names for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "named_parameters should be those of the optimizer but none of them is; give the model's that it steps"
            )
        self._check()
        self._before: dict[Tensor, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._prepare),
            optimizer.register_step_post_hook(self._count),
        ]

    def record(self) -> None:
        """Add rows of the weights and momenta as they are now, for instance before the first step.

        Raises:
            ValueError, RuntimeError: ranks differ, or one does not call it; see `Recorder`.
        """
        self._record({})

    def remove(self) -> None:
        """Detach from the optimizer. The rows stay."""
        for handle in self._handles:
            handle.remove()
        self._before = {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a file; see `save`.

        Of several ranks that share the matrices, rank 0 writes, whether the others call this or not. Ranks that share
        none, as stages of a pipeline, have records of their own and need paths of their own.
        """
        if all(group.rank() == 0 for groups in self._teams() for group in groups):
            save(self.rows, path)

    def load(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        """Continue a saved recorder: take its rows and count steps from there. On several ranks all do it.

        Args:
            path: file that `save` wrote.
            step: step of the checkpoint that the training resumes from; rows of later steps are left out. None takes
                the last row's.
        """
        rows = load(path)
        last = max((row["step"] for row in rows), default=0)
        self.step = last if step is None else step
        self.rows = [row for row in rows if row["step"] <= self.step]

    @property
    def _copies(self) -> dist.ProcessGroup | None:
        """The ranks that have the same plain tensors: those that were given, or the optimizer's."""
        if self._process_group is not None:
            return self._process_group
        ranks = getattr(getattr(self._optimizer, "_muon", self._optimizer), "_ranks", None)
        owned = ranks.owned.values() if isinstance(ranks, Ranks) else ()
        return next((placement.team.replicas for placement in owned), None)

    def _matrices(self) -> Iterator[_Subject]:
        """Yield every parameter to record."""
        for number, group in enumerate(self._optimizer.param_groups):
            named = group.get("param_names", [])
            for place, p in enumerate(group["params"]):
                name = self._names.get(p) or (named[place] if place < len(named) else f"{number}.{place}")
                if p.ndim < 2 or not p.is_floating_point():
                    continue
                flatten = group.get("flatten")
                if min(split_shape(p.shape, flatten)[1:]) > 1 and any(fnmatchcase(name, at) for at in self._patterns):
                    yield _Subject(name, p, flatten)

    def _teams(self) -> dict[Groups, list[_Subject]]:
        """Return the parameters to record by those who share them."""
        teams: dict[Groups, list[_Subject]] = {}
        copies = self._copies
        for subject in self._matrices():
            teams.setdefault(groups_of(subject.param, copies), []).append(subject)
        return teams

    def _check(self) -> None:
        """Raise unless all parameters can be recorded, and all ranks that share some record the same."""
        teams = self._teams()
        if not teams:
            raise ValueError(f"a matrix of the optimizer should be called like {self._patterns} but none is")
        for subjects in teams.values():
            for name, p, _ in subjects:
                check_dense(name, local(p))
                if is_dtensor(p) and any(at.is_partial() for at in p.placements):
                    raise ValueError(f"{name} should be sharded or replicated but has placements: {p.placements}")
        for groups, subjects in teams.items():
            facts = [f"every={self._every}", f"tensors={self._tensors}", *map(_fact, subjects)]
            agree(groups, facts, (), "making a spectra.Recorder")

    @_disable_dynamo
    @torch.no_grad()
    def _prepare(self, *_: object) -> None:
        due = (self.step + 1) % self._every == 0 and "update" in self._tensors
        self._before = {p: p.detach().clone() for _, p, _ in self._matrices()} if due else {}

    @_disable_dynamo
    def _count(self, *_: object) -> None:
        self.step += 1
        before, self._before = self._before, {}
        if self.step % self._every == 0:
            self._record(before)

    @torch.no_grad()
    def _record(self, before: Mapping[Tensor, Tensor]) -> None:
        found: dict[Tensor, list[Row]] = {}
        for groups, subjects in self._teams().items():
            found |= self._record_team(groups, subjects, before)
        self.rows += [row for _, p, _ in self._matrices() for row in found[p]]

    def _record_team(
        self, groups: Groups, subjects: Sequence[_Subject], before: Mapping[Tensor, Tensor]
    ) -> dict[Tensor, list[Row]]:
        """Return the rows of parameters that the same ranks share."""
        what = f"recording the spectra of step {self.step}"
        kinds = [(subject, tensor) for subject in subjects for tensor in self._tensors]
        has = [self._has(tensor, subject.param, before) for subject, tensor in kinds]
        held = agree(groups, [f"step {self.step}", *map(_fact, subjects)], has, what)
        jobs: list[Job] = []
        recorded: list[tuple[_Subject, str, Share, int]] = []
        count = 0
        for (subject, tensor), by in zip(kinds, held, strict=True):
            if by.ranks:
                share = Share(subject.param, subject.flatten)
                jobs += jobs_of(share, groups, by, count, self._reader(tensor, subject.param, share, by, before), what)
                recorded.append((subject, tensor, share, count))
                count += share.batch
        numbers = measure_together(jobs, count, groups, local(subjects[0].param).device, what)
        rows: dict[Tensor, list[Row]] = {subject.param: [] for subject in subjects}
        for subject, tensor, share, first in recorded:
            own = numbers[first : first + share.batch]
            rows[subject.param] += make_rows(subject.name, (share.rows, share.cols), own, tensor, self.step)
        return rows

    def _has(self, tensor: str, p: Tensor, before: Mapping[Tensor, Tensor]) -> Any:
        """Return whether this rank has a tensor of `p`: the dtype of a momentum, for those that lack their part."""
        if tensor == "momentum":
            return None if (momentum := self._momentum(p)) is None else momentum.dtype
        return tensor == "weight" or (p in before and p.grad is not None)

    def _momentum(self, p: Tensor) -> Tensor | None:
        """Return the momentum of a parameter, if this rank has one that is placed like it."""
        state = self._optimizer.state.get(p, {})
        for key in _MOMENTA:
            t = state.get(key)
            # Some optimizers keep codes there.
            if isinstance(t, Tensor) and t.is_floating_point() and t.shape == p.shape:
                if getattr(t, "placements", None) == getattr(p, "placements", None):
                    return t
        return None

    def _reader(
        self, tensor: str, p: Tensor, share: Share, by: Held, before: Mapping[Tensor, Tensor]
    ) -> Callable[[int], Tensor]:
        """Return what reads this rank's part of a matrix of a tensor of `p`."""
        if tensor == "weight":
            return lambda which: share.part(p, which)
        if tensor == "update":
            return lambda which: share.part(p, which).double() - share.part(before[p], which).double()
        momentum = self._momentum(p)
        if momentum is None:  # where no gradient has come yet it would be zero
            return lambda which: torch.zeros_like(share.part(p, which), dtype=by.value)
        return lambda which: share.part(momentum, which)


def _fact(subject: _Subject) -> str:
    """Return what all ranks should have alike."""
    name, p, flatten = subject
    where = f", placements {p.placements}" if is_dtensor(p) else ""
    return f"{name} of size {tuple(p.shape)} and {p.dtype}{where}, flatten={flatten}"
