"""Scratch memory of operations, reserved before a step writes anything.

A step that runs out of memory half-way would leave some matrices stepped and others not. So what runs within a step
takes its memory from here, and is rehearsed before the step: a rehearsal takes as much memory, so that it is there,
and computes nothing. On the processor each thread keeps a block as large as the most that was taken at a time. On a
GPU torch's own allocator keeps what was freed, separately for every stream and graph.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Elements to compute at a time, where that can be chosen. On a processor they stay in its cache.
_PIECE, _PIECE_ON_CPU = 1 << 22, 1 << 18


class Mark:
    """Token of a thread and of the block that it keeps: what was rehearsed under it finds its memory.

    A thread's id would not do, as it is given again when the thread has ended.
    """


class _Kept(threading.local):
    def __init__(self) -> None:
        self.block: Tensor | None = None
        self.mark = Mark()
        self.rehearsing = False


_kept = _Kept()


def piece(device: torch.device) -> int:
    """Return the number of elements to compute at a time."""
    return _PIECE_ON_CPU if device.type == "cpu" else _PIECE


@contextmanager
def rehearsal() -> Iterator[None]:
    """Have verbs inside this context take their memory and compute nothing."""
    before, _kept.rehearsing = _kept.rehearsing, True
    try:
        yield
    finally:
        _kept.rehearsing = before


def rehearsing() -> bool:
    """Whether a `rehearsal` is under way in this thread."""
    return _kept.rehearsing


def mark() -> Mark:
    """Return the mark of this thread."""
    return _kept.mark


def take(device: torch.device, *wanted: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
    """Return contiguous tensors of the wanted sizes and dtypes, of any content; the caller's until the next call."""
    sizes = [-(-math.prod(shape) * dtype.itemsize // 64) * 64 for shape, dtype in wanted]
    block = _kept.block
    if device.type != "cpu":
        block = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    elif block is None or block.numel() < sum(sizes):
        block = _kept.block = None
        _kept.mark = Mark()  # if there is no memory for the larger block, rehearsals so far have lost theirs
        with torch.inference_mode(False):  # the block must be usable outside of inference mode, too
            block = _kept.block = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    found, start = [], 0
    for (shape, dtype), size in zip(wanted, sizes, strict=True):
        found.append(block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape))
        start += size
    return found
