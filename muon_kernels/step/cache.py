"""The tasks of a group, kept as long as nothing that `prepare` looks at has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import deepcopy
from operator import attrgetter, eq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .work import Task


def signature(
    params: Sequence[Tensor], grads: Sequence[Tensor], own: Sequence[Sequence[Tensor | None]]
) -> list[Iterator[object]]:
    """Return all that `prepare` looks at: where a parameter's tensors lie and what they are, but no gradient's address.

    Momentum buffers and what else is the optimizer's `own` may be moved or replaced, but not seen otherwise. One
    property of all tensors comes after another, by C code alone: many small parameters make a step of such questions.
    """
    return [
        *(map(id, kept) for kept in own),
        *(map(Tensor.data_ptr, [t for t in kept if isinstance(t, Tensor)]) for kept in own),
        map(Tensor.data_ptr, params),
        map(_SHAPE, params),
        map(Tensor.stride, params),
        map(_DTYPE, params),
        map(_LAYOUT, grads),  # before the strides, which sparse ones do not have
        map(_SHAPE, grads),
        map(Tensor.stride, grads),
        map(bool, map(Tensor.data_ptr, grads)),
        map(_DTYPE, grads),
        map(_DEVICE, grads),
        map(Tensor.is_neg, grads),
    ]


_SHAPE, _DTYPE, _LAYOUT, _DEVICE = map(attrgetter, ("shape", "dtype", "layout", "device"))


class _Entry(NamedTuple):
    """Tasks that were made for a group, and what they were made from."""

    options: dict[str, Any]
    threads: int
    parameters: int
    signature: list[list[object]]
    tasks: list[Task]


class TaskCache:
    """The tasks of groups, as long as they would be the same."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def get(
        self,
        key: Hashable,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        own: Sequence[Sequence[Tensor | None]],
        options: dict[str, Any],
        make: Callable[[], list[Task]],
    ) -> list[Task]:
        """Return what `make` makes, or made for an earlier step of the same.

        Args:
            key: of the group.
            params, grads, own: see `signature`; empty sequences in `own` do not matter.
            options: of the group, with all that tasks depend on; see `options.settled`.
            make: makes the tasks.
        """
        entry = self._entries.get(key)
        own = [kept for kept in own if kept]
        now = signature(params, grads, own)
        if (
            entry is None
            or entry.options != options
            or entry.threads != torch.get_num_threads()
            or len(entry.signature) != len(now)
            or entry.parameters != len(params)
            or not all(all(map(eq, before, after)) for before, after in zip(entry.signature, now, strict=True))
        ):
            # Copies: lists and a dict of splits may be changed in place.
            kept = {**options, **{key: deepcopy(options[key]) for key in ("ns_coefficients", "split", "transposed")}}
            tasks = make()
            found = list(map(list, signature(params, grads, own)))
            entry = self._entries[key] = _Entry(kept, torch.get_num_threads(), len(params), found, tasks)
        return entry.tasks

    @property
    def kept(self) -> list[Task]:
        """The tasks of all groups that it has."""
        return [task for entry in self._entries.values() for task in entry.tasks]

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
