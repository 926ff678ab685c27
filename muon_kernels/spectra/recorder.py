"""Recorder that hooks into an optimizer and keeps the spectra of its matrices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports dynamo when called only
from torch.optim import Optimizer

from ..layout import split_shape
from ..tensors import check_dense
from .rows import Row, describe, load, save

TENSORS = ("weight", "momentum", "update")

# State keys of a momentum: of Muon and SGD; of Adam, AdamW and Lion.
_MOMENTA = ("momentum_buffer", "exp_avg")


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

    Args:
        optimizer: optimizer whose steps are counted.
        named_parameters: (name, parameter) pairs. Other parameters, and all if None, have the names of the
            `param_names` of their group, as `muon_kernels.param_groups` sets them, or "group.place in it".
        every: positive int; the steps every, 2 every, 3 every ... are recorded.
        names: `fnmatch` patterns; a name has to match one. Leave out an embedding, whose decomposition takes long.
        tensors: those of "weight", "momentum" and "update" to record.

    Attributes:
        rows: rows of all recorded steps.
        step: number of steps that were done.

    Raises:
        ValueError: there is nothing to record, a tensor is unknown, or `every` is below 1.
        TypeError: `optimizer` is no optimizer, or `named_parameters` are no pairs.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        *,
        every: int = 100,
        names: str | Iterable[str] = "*",
        tensors: str | Iterable[str] = TENSORS,
    ) -> None:
        """Hook into the optimizer."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer should be a torch.optim.Optimizer but is: {type(optimizer).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every should be an int >= 1 but is: {every!r}")
        self.rows: list[Row] = []
        self.step = 0
        self._optimizer = optimizer
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
        if not (found := list(self._matrices())):
            raise ValueError(f"a matrix of the optimizer should be called like {self._patterns} but none is")
        for name, p, _ in found:
            check_dense(name, p)
        self._before: dict[Tensor, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._prepare),
            optimizer.register_step_post_hook(self._count),
        ]

    def record(self) -> None:
        """Add rows of the weights and momenta as they are now, for instance before the first step."""
        self._record({})

    def remove(self) -> None:
        """Detach from the optimizer. The rows stay."""
        for handle in self._handles:
            handle.remove()
        self._before = {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a file; see `save`."""
        save(self.rows, path)

    def load(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        """Continue a saved recorder: take its rows and count steps from there.

        Args:
            path: file that `save` wrote.
            step: step of the checkpoint that the training resumes from; rows of later steps are left out. None takes
                the last row's.
        """
        rows = load(path)
        last = max((row["step"] for row in rows), default=0)
        self.step = last if step is None else step
        self.rows = [row for row in rows if row["step"] <= self.step]

    def _matrices(self) -> Iterator[tuple[str, Tensor, bool | None]]:
        """Yield name, parameter and `flatten` of every parameter to record."""
        for number, group in enumerate(self._optimizer.param_groups):
            named = group.get("param_names", [])
            for place, p in enumerate(group["params"]):
                name = self._names.get(p) or (named[place] if place < len(named) else f"{number}.{place}")
                if p.ndim < 2 or not p.is_floating_point():
                    continue
                flatten = group.get("flatten")
                if min(split_shape(p.shape, flatten)[1:]) > 1 and any(fnmatchcase(name, at) for at in self._patterns):
                    yield name, p, flatten

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
        for name, p, flatten in self._matrices():
            seen: dict[str, Tensor] = {"weight": p}
            state = self._optimizer.state.get(p, {})
            for key in _MOMENTA:
                momentum = state.get(key)
                # Some optimizers keep codes there.
                if isinstance(momentum, Tensor) and momentum.is_floating_point() and momentum.shape == p.shape:
                    seen["momentum"] = momentum
            if p in before and p.grad is not None:
                seen["update"] = p.double() - before[p].double()
            for tensor in self._tensors:
                if tensor in seen:
                    self.rows += describe(name, seen[tensor], tensor=tensor, step=self.step, flatten=flatten)
