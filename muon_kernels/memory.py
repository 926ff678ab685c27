"""Memory for what operations have in between, had before a step writes anything.

A step that finds no memory half-way would leave some matrices stepped and others not. So what runs within a step takes
what it needs from here, and is rehearsed before: then it takes as much, so that it is there, and does nothing. For the
processor a thread keeps a block as large as the most that was taken at a time; for a GPU torch's own allocator keeps
what was freed, apart for every stream and graph.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Elements that are worked at at a time, where that can be chosen. On a processor they stay in its cache.
_PIECE, _PIECE_ON_CPU = 1 << 22, 1 << 18


class Mark:
    """Of a thread and the block that it keeps: what was rehearsed with it finds its memory.

    A thread's number would not do, which is given again when it has ended.
    """


class _Kept(threading.local):
    def __init__(self) -> None:
        self.block: Tensor | None = None
        self.mark = Mark()
        self.rehearsing = False


_kept = _Kept()


def piece(device: torch.device) -> int:
    """How many elements to work at at a time."""
    return _PIECE_ON_CPU if device.type == "cpu" else _PIECE


@contextmanager
def rehearsal() -> Iterator[None]:
    """Verbs inside take their memory and do nothing."""
    before, _kept.rehearsing = _kept.rehearsing, True
    try:
        yield
    finally:
        _kept.rehearsing = before


def rehearsing() -> bool:
    """Whether inside a `rehearsal`."""
    return _kept.rehearsing


def mark() -> Mark:
    """That of this thread."""
    return _kept.mark


def take(device: torch.device, *wanted: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
    """Contiguous tensors of these sizes and dtypes, of any content, which are the caller's until the next call."""
    sizes = [-(-math.prod(shape) * dtype.itemsize // 64) * 64 for shape, dtype in wanted]
    block = _kept.block
    if device.type != "cpu":
        block = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    elif block is None or block.numel() < sum(sizes):
        block = _kept.block = None
        _kept.mark = Mark()  # if there is no memory for the larger block, what was rehearsed has lost its own
        with torch.inference_mode(False):  # what is kept must be of use outside inference mode too
            block = _kept.block = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    found, start = [], 0
    for (shape, dtype), size in zip(wanted, sizes, strict=True):
        found.append(block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape))
        start += size
    return found
