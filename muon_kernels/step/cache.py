"""What `prepare` decided, as long as nothing that it looks at has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from operator import attrgetter, eq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed.placement import Placement
from .prepare import prepare
from .work import Prepared


def signature(
    params: Sequence[Tensor], grads: Sequence[Tensor], own: Sequence[Sequence[Tensor | None]]
) -> list[Iterator[object]]:
    """All that `prepare` looks at: where a parameter's tensors lie and what they are; not the gradient's address.

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


class _Settled(NamedTuple):
    """What was prepared for a group, and for what."""

    options: dict[str, Any]
    threads: int
    parameters: int
    signature: list[list[object]]
    prepared: Prepared


class Preparations:
    """What `prepare` decided for groups, as long as they ask for the same."""

    def __init__(self) -> None:
        self._settled: dict[tuple[int, bool], _Settled] = {}

    def get(
        self,
        key: int,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momentum_bufs: Sequence[Tensor | None] | None,
        options: dict[str, Any],
        named: Callable[[], tuple[Sequence[str | None], Sequence[bool]]],
        moments: Sequence[Tensor | None] = (),
        scales: Sequence[Tensor | None] = (),
        mantissas: Sequence[Tensor] = (),
        placements: Sequence[Placement | None] | None = None,
        apart: bool = False,
    ) -> Prepared:
        """`prepare` for the group `key`, with its options in SETTLED, or what it said before.

        Args:
            named: for the parameters, what follows from the options `split` and `transposed`, which may go by name.
            moments, scales, mantissas, placements: see `prepare`; where a parameter is does not change.
            apart: see `prepare`; either kind of step is remembered.
        """
        settled = self._settled.get((key, apart))
        own = [kept for kept in (momentum_bufs, moments, scales, mantissas) if kept]
        now = signature(params, grads, own)
        if (
            settled is None
            or settled.options != options
            or settled.threads != torch.get_num_threads()
            or len(settled.signature) != len(now)
            or settled.parameters != len(params)
            or not all(all(map(eq, before, after)) for before, after in zip(settled.signature, now, strict=True))
        ):
            # Copies: lists and a dict of splits may be changed in place.
            kept = {**options, **{key: deepcopy(options[key]) for key in ("ns_coefficients", "split", "transposed")}}
            splits, transposed = named()
            taken = {**options, "transposed": transposed}
            del taken["split"]
            taken |= {"moments": moments, "scales": scales, "mantissas": mantissas, "placements": placements}
            prepared = prepare(params, grads, momentum_bufs, splits=splits, apart=apart, **taken)
            found = list(map(list, signature(params, grads, own)))
            settled = self._settled[key, apart] = _Settled(kept, torch.get_num_threads(), len(params), found, prepared)
        return settled.prepared

    def clear(self) -> None:
        """Forget all."""
        self._settled.clear()
