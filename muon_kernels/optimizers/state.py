"""State that `Muon` keeps of a parameter: made where it is missing, converted where an option has changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ..distributed import consensus
from ..distributed.ranks import Consolidated, Ranks
from ..distributed.second_moment import create as create_shard
from ..distributed.shards import pieces_held
from ..layout import PieceShape
from ..options import dtype_of
from ..stages.packed import check_momentum_scale, dequantized, quantized, scale_size
from ..stages.second_moment import create
from ..step.options import splits
from ..tensors import any_dtensor, check_momentum, is_dtensor, local

# Writes into the state: (parameter, key, tensor), or None to delete the key.
Writes = list[tuple[Tensor, str, Tensor | None]]


# State that every rank keeps of a parameter that has an owner, as every rank writes the parameter.
_EVERYWHERE = ("mantissa",)


def forget_others(state: MutableMapping[Tensor, Any], ranks: Ranks) -> None:
    """Delete what other ranks keep from a state that a checkpoint has brought whole."""
    for p in filter(ranks.elsewhere, ranks.owned):
        state[p] = {key: t for key, t in state.pop(p, {}).items() if key in _EVERYWHERE}
        if not state[p]:
            del state[p]


def _of_others(state: Mapping[Tensor, Any], ranks: Ranks, to: int | None = None) -> dict[Tensor, dict[str, Tensor]]:
    """Return the state that other ranks keep, on the rank `to` of the process group or on all. All have to call this.

    Counts of steps, which torch keeps on the processor, travel on the parameter's device as all else does.
    """
    sent = {
        p: {key: t.to(p.device) for key, t in state.get(p, {}).items() if key not in _EVERYWHERE} for p in ranks.owned
    }
    return {
        p: {key: t.cpu() if key == "step" else t for key, t in found.items()}
        for p, found in consensus.gathered(ranks.owned, sent, to).items()
        if ranks.elsewhere(p)
    }


def consolidate(state: Mapping[Tensor, Any], ranks: Ranks, to: int) -> None:
    """Bring the state that other ranks keep to one of them, where `whole` has it until the next step.

    Raises:
        ValueError: there is no such rank.
        RuntimeError: some rank does not call this.
    """
    for team in {at.team for at in ranks.owned.values()}:
        if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < team.ranks:
            raise ValueError(f"to should be a rank of the process group, 0 to {team.ranks - 1}, but is: {to!r}")
    ranks.consolidated = Consolidated(to, _of_others(state, ranks, to))


# Key under which a checkpoint has the numbers of a DTensor's int8 momentum: with another cut, codes mean nothing.
VALUES = "momentum_values"


def _like(p: Tensor, shard: Tensor) -> Tensor:
    """Return a DTensor placed as `p` of which `shard` is this rank's; where `p` is none, `shard` itself."""
    if not is_dtensor(p):
        return shard
    module = sys.modules["torch.distributed.tensor"]  # p is from it
    at = {"run_check": False, "shape": p.shape, "stride": p.stride()}
    made: Tensor = module.DTensor.from_local(shard, p.device_mesh, p.placements, **at)
    return made


def _with_values(
    state: Mapping[Tensor, Any], ranks: Ranks, groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """Return the state of the DTensors whose momentum is of int8, with numbers in place of it."""
    found: dict[Tensor, dict[str, Any]] = {}
    for group in groups:
        for p, split in splits(group) if any_dtensor(group["params"]) else ():
            codes = state.get(p, {}).get("momentum_buffer")
            if is_dtensor(codes) and codes.dtype == torch.int8:
                kept = dict(state[p])
                del kept["momentum_buffer"]
                pieces = pieces_held(local(p), ranks.placement(p), group["flatten"], split)
                numbers = dequantized(local(codes), kept.pop("momentum_scale"), group["flatten"], pieces)
                found[p] = {**kept, VALUES: _like(p, numbers)}
            elif is_dtensor(codes) and group.get("momentum_dtype") == "int8":  # loaded, and not stepped since
                found[p] = {VALUES if key == "momentum_buffer" else key: t for key, t in state[p].items()}
    return found


@contextmanager
def whole(state: MutableMapping[Tensor, Any], ranks: Ranks, groups: Sequence[Mapping[str, Any]] = ()) -> Iterator[None]:
    """Hold in `state` that of other ranks, too, while this context lasts. All ranks have to enter it.

    Int8 momenta of DTensors in `groups` are there as numbers, which fit any cut. Where they are cut as before, or to
    whole blocks, the same codes come of them again. After `consolidate` one rank enters it alone.

    Raises:
        RuntimeError: some rank does not enter it; or the state is consolidated on another rank.
    """
    ready = ranks.consolidated
    if ready is not None and ranks.owned and all(at.team.rank != ready.to for at in ranks.owned.values()):
        raise RuntimeError(
            f"state_dict() should be called on rank {ready.to} of the process group, to which consolidate_state_dict() "
            "brought the state; give it another rank, or leave it out and call state_dict() on all ranks"
        )
    values = _with_values(state, ranks, groups)
    own = {p: state.get(p) for p in (*ranks.owned, *values)}
    others = _of_others(state, ranks) if ready is None else ready.state
    for p, found in others.items():
        state[p] = {**(own[p] or {}), **found}
    state.update(values)
    try:
        yield
    finally:
        for p, kept in own.items():
            if kept is not None:
                state[p] = kept
            else:
                state.pop(p, None)


def check_copied(ranks: Ranks) -> None:
    """Raise TypeError where an optimizer has a process_group, which belongs to this process and shares the state."""
    if ranks.owned:
        raise TypeError(
            "an optimizer with a process_group should not be copied or pickled, as ranks share its state; make "
            "another one and load the state_dict() that all ranks have asked for"
        )


class StateOfGroups:
    """The state that groups ask for which are stepped as one.

    Attributes:
        int8: whether momentum is kept in eight bits.
        writes: what is made or converted. A step writes it into the optimizer's state when nothing can fail any more.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], ranks: Ranks) -> None:
        """Take the groups, and the ranks that keep their state."""
        group = groups[0]
        self._groups, self._ranks, self._flatten = groups, ranks, group["flatten"]
        self._dtype = dtype_of(group["momentum_dtype"]) if group["momentum_dtype"] else None
        self.int8 = self._dtype == torch.int8
        self._form = group["second_moment"]
        self._others = ["mantissa"] * group["master_weights"] + ["second_momentum_buffer"] * (self._form is not None)
        self.writes: Writes = []

    def complete(self, state: Mapping[str, Any]) -> bool:
        """Whether `state` has all that the groups ask for, in the precision that they ask for."""
        momentum = state.get("momentum_buffer")
        return (
            momentum is not None
            and (momentum.dtype == torch.int8) == self.int8
            and not (self._others and any(state.get(key) is None for key in self._others))
        )

    def momentum_dtype(self, grad: Tensor) -> torch.dtype:
        """Return what a momentum that is made for this gradient is of."""
        return self._dtype or grad.dtype

    def completed(self, p: Tensor, grad: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor | None]:
        """Return the state of `p` with what is missing, which goes to `writes`; None for what another rank keeps."""
        elsewhere = self._ranks.elsewhere(p)
        found = {key: state.get(key) for key in ("momentum_buffer", "momentum_scale", *self._others)}
        if elsewhere:
            found["momentum_buffer"] = None
        elif found["momentum_buffer"] is None:
            self._make_momentum(p, grad, found)
        elif (found["momentum_buffer"].dtype == torch.int8) != self.int8:
            self._convert(p, grad, found)
        if "mantissa" in self._others and found["mantissa"] is None:
            self._write(p, found, mantissa=torch.zeros_like(p, dtype=torch.int16, memory_format=torch.preserve_format))
        if self._form is not None and found["second_momentum_buffer"] is None and not elsewhere:
            if is_dtensor(p):
                moment: Tensor = create_shard(self._form, p, self._flatten, self._split_of[p])
            else:
                moment = create(self._form, p, self._flatten, self._split_of[p])
            self._write(p, found, second_momentum_buffer=moment)
        return found

    def _make_momentum(self, p: Tensor, grad: Tensor, found: dict[str, Tensor | None]) -> None:
        # Contiguous, as blocks are: so packing is fastest.
        format_ = torch.contiguous_format if self.int8 else torch.preserve_format
        momentum = torch.zeros_like(p, dtype=self.momentum_dtype(grad), memory_format=format_)
        self._write(p, found, momentum_buffer=momentum)
        if self.int8:
            blocks = scale_size(self._pieces(p))
            self._write(p, found, momentum_scale=torch.zeros(blocks, dtype=torch.float32, device=p.device))

    def _convert(self, p: Tensor, grad: Tensor, found: dict[str, Tensor | None]) -> None:
        momentum, scale = cast(Tensor, found["momentum_buffer"]), found["momentum_scale"]
        pieces = self._pieces(p)
        check_momentum(local(momentum), local(p))
        if self.int8:
            codes, scale = quantized(local(momentum), self._flatten, pieces)
            momentum = _like(p, codes)
        else:
            check_momentum_scale("momentum_scale", scale, pieces)
            numbers = dequantized(local(momentum), cast(Tensor, scale), self._flatten, pieces)
            momentum = torch.empty_like(p, dtype=self.momentum_dtype(grad), memory_format=torch.preserve_format)
            local(momentum).copy_(numbers)
            scale = None
        self._write(p, found, momentum_buffer=momentum, momentum_scale=scale)

    def _pieces(self, p: Tensor) -> list[PieceShape]:
        return pieces_held(local(p), self._ranks.placement(p), self._flatten, self._split_of[p])

    def _write(self, p: Tensor, found: dict[str, Tensor | None], **made: Tensor | None) -> None:
        found.update(made)
        self.writes += [(p, key, tensor) for key, tensor in made.items()]

    @cached_property
    def _split_of(self) -> dict[Tensor, str | None]:
        return {p: split for group in self._groups for p, split in splits(group)}
