"""Checks of tensors: dense, of a size, disjoint from others; and the shard of a DTensor that this rank holds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from .layout import overlapping, overlaps_itself

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLAIN = {Tensor, nn.Parameter}
_IS_DTENSOR: dict[type, bool] = dict.fromkeys(_PLAIN, False)


def is_dtensor(t: Any) -> TypeGuard[DTensor]:
    """Whether `t` is a DTensor.

    Does not import torch.distributed.tensor, which takes a second: without that module there are no DTensors.
    """
    found = _IS_DTENSOR.get(type(t))  # asked several times of every tensor in every step
    if found is None and (module := sys.modules.get("torch.distributed.tensor")) is not None:
        found = _IS_DTENSOR[type(t)] = issubclass(type(t), module.DTensor)
    return bool(found)


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether any of `tensors` is a DTensor. Takes little time where all are plain."""
    return not _PLAIN.issuperset(map(type, tensors)) and any(map(is_dtensor, tensors))


def local(t: Tensor) -> Tensor:
    """Return the shard of a DTensor that this rank holds; any other tensor as it is."""
    return t._local_tensor if is_dtensor(t) else t


FLATTENED = (
    "a part of a flat vector is no matrix; shard the model with torch.distributed.fsdp.fully_shard (FSDP2), which "
    "leaves parameters their size"
)


def check_whole(name: str, p: Tensor) -> None:
    """Raise ValueError if FSDP1 has flattened a parameter to a vector, or ZeRO-3 has emptied it."""
    whole = getattr(p, "ds_shape", None)
    if whole is not None and tuple(whole) != tuple(p.shape):
        raise ValueError(f"{name} should be of size {tuple(whole)} but ZeRO-3 leaves {tuple(p.shape)}: {FLATTENED}")
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(f"{name} should be whole but FSDP1 has flattened it to size {tuple(p.shape)}: {FLATTENED}")


# Dtypes of parameters, gradients and momentum. torch computes nothing in the 8-bit floating-point ones.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Dtypes that momentum may be kept in.
MOMENTUM_DTYPES = (*DTYPES, torch.int8)


def has_memory(t: Tensor) -> bool:
    """Whether the elements of `t` can be reached by address. Those of torch's wrappers cannot."""
    try:
        return t.data_ptr() != 0
    except RuntimeError:
        return False


def check_dense(name: str, t: Any, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise TypeError unless `t` is a tensor of a layout and a dtype that can be computed with."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} should be a Tensor but is: {type(t).__name__}")
    if t.layout != torch.strided:
        raise TypeError(f"{name} should be dense, not sparse, but has layout: {t.layout}")
    if t.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        kind = "a floating-point dtype among " if dtypes == DTYPES else "a dtype among " if len(dtypes) > 1 else ""
        raise TypeError(f"{name} should be of {kind}{names} but is of: {t.dtype}")
    if type(t).__name__ == "FakeTensor":
        raise TypeError(
            f"{name} should have memory but is a FakeTensor; to see what state an optimizer makes, build the model "
            'under torch.device("meta"), where steps make it; plan() tells of what else they need'
        )
    if t.numel() and t.device.type != "meta" and not has_memory(t):
        raise TypeError(
            f"{name} should be a tensor with memory of its own but is a {type(t).__name__} without, like DTensors and "
            "what torch.vmap and torch.func.grad pass; give matrices as (..., m, n), and of a DTensor its to_local()"
        )


def check_matrices(name: str, t: Any, hint: str = "") -> None:
    """Raise ValueError or TypeError unless `t` can be read as matrices."""
    check_dense(name, t)
    check_whole(name, t)
    if t.ndim < 2:
        raise ValueError(f"{name} should have at least 2 dimensions but has size: {tuple(t.shape)}{hint}")


def check_like(name: str, t: Tensor, p: Tensor) -> None:
    """Raise ValueError unless `t` has the parameter's size."""
    if t.shape != p.shape:
        raise ValueError(f"{name} should have the parameter's size {tuple(p.shape)} but has: {tuple(t.shape)}")


def check_disjoint(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if two elements of the named tensors share memory, which a step would write twice."""
    tensors = [(name, local(t)) for name, t in tensors]
    for name, t in tensors:
        if overlaps_itself(t.shape, t.stride()):
            raise ValueError(
                f"{name} of size {tuple(t.shape)} should have memory for every element but its strides "
                f"{t.stride()} give several elements the same; clone it"
            )
    if (shared := overlapping(t for _, t in tensors)) is not None:
        name = next(name for name, t in tensors if t is shared)
        raise ValueError(
            f"{name} of size {tuple(shared.shape)} should have memory of its own but shares elements with another "
            f"parameter or momentum buffer; give only one of the two, or clone it"
        )


def check_momentum(buffer: Tensor, p: Tensor) -> None:
    """Raise ValueError or TypeError unless `buffer` can be a momentum of `p`."""
    check_dense("momentum_buffer", buffer, MOMENTUM_DTYPES)
    check_like("momentum_buffer", buffer, p)
    check_device("momentum_buffer", buffer, p)


def check_device(name: str, t: Tensor, p: Tensor) -> None:
    """Raise ValueError unless `t` is on the parameter's device."""
    if t.device != p.device:
        raise ValueError(f"{name} should be on the parameter's device {p.device} but is on: {t.device}")
