"""Checkpoints of flat slices: whether one fits, and what of it is this rank's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...tensors import check_dense, is_dtensor, local
from .flat import Flat, length


def check_sizes(of: str, saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless groups of a checkpoint have as many parameters as those that are to load it."""
    found, wanted = ([len(group["params"]) for group in groups] for groups in (saved, own))
    if found != wanted:
        raise ValueError(f"a checkpoint of {of} should have groups of {wanted} parameters but has groups of: {found}")


def check_layout(of: str, found: Any, wanted: Sequence[str]) -> None:
    """Raise ValueError unless elements are where a flat buffer has them.

    Args:
        of: names what has the layout, for the error.
        found: its layout.
        wanted: `Flat.layout` of the buffer.
    """
    if found == list(wanted):
        return
    if not isinstance(found, (list, tuple)) or len(found) != len(wanted):
        raise ValueError(f"{of} should have a layout of {len(wanted)} parameters but has: {found!r:.100}")
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), 0)
    raise ValueError(
        f"{of} should have parameter {at} laid out as {wanted[at]!r} but has {found[at]!r}: state is kept matrix by "
        "matrix, so sizes and splits have to be those that it was made with"
    )


def check_keys_of_state(of: str, state: Mapping[str, Any], keys: Collection[str]) -> None:
    """Raise ValueError unless the state of a group has these keys, and master copies only where they are among them."""
    missing = sorted(set(keys) - state.keys())
    if missing:
        raise ValueError(f"{of} should have {', '.join(missing)} but has: {sorted(map(str, state))}")
    if "master_param" in state and "master_param" not in keys:
        raise ValueError(f"{of} should have no master_param, as parameters are of float32, but has one")


def own_slice(key: str, value: Any, flat: Flat, rank: int) -> Tensor:
    """Return this rank's slice of a value of a checkpoint, which is a whole buffer or a DTensor."""
    own = flat.slices[rank]
    expected = f"{key} should be of {flat.elements} elements, of which rank {rank} has {length(own)}"
    if not isinstance(value, Tensor) or tuple(value.shape) != (flat.elements,):
        raise ValueError(f"{expected}, but is: {tuple(value.shape) if isinstance(value, Tensor) else value!r}")
    check_dense(key, local(value))
    if not is_dtensor(value):
        return value[own[0] : own[1]]
    if local(value).numel() != length(own):
        raise ValueError(
            f"{expected}, but it has {local(value).numel()}: saved by another number of ranks; load it by "
            "torch.distributed.checkpoint, which cuts it anew"
        )
    return local(value)
