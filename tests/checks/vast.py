"""Tensors larger than any machine's memory, of which only the pages that are written exist."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_MAP_NORESERVE = 0x4000  # which Python has no name for


def vast(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros."""
    memory = mmap.mmap(-1, numel * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype)


def far_apart(values: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values, with these strides."""
    span = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) + 1
    return vast(span, values.dtype).as_strided(values.shape, strides).copy_(values)
