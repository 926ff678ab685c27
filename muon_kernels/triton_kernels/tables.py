"""Addresses and strides of a bucket's matrices, on the device for one launch to read.

A gradient may be elsewhere in every step, and a kernel's arguments hold only a few addresses, so they travel in a
tensor: pinned memory and an asynchronous copy, for which nothing waits. Allocators give the same addresses again and
again, and momenta and parameters stay where they are, so tables are kept by content, and mostly there is nothing to
copy.

A CUDA graph repeats the copy that was captured and not the call: its pinned memory must live as long as the graph,
which nobody can tell, so it is never freed (24 bytes a matrix), and neither side of the copy is shared with calls
outside of the graph.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import Matrices, refs

_captured: list[Tensor] = []


class Table(NamedTuple):
    """A list of matrices (rows ≤ cols).

    Attributes:
        refs: (3 · batch,) int64 on the device: address, row stride and column stride of each.
        tall: whether each is walked along its columns; the others are walked along their rows.
        vectors: whether every line of that walk is contiguous and begins at 16 bytes.
    """

    refs: Tensor
    tall: tuple[bool, ...]
    vectors: bool


VECTOR = 8  # elements: the least that is 16 bytes of every dtype


def on_device(content: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers in `content` as a tensor that is not to be written, without waiting for the device."""
    if device.type != "cuda":
        return torch.frombuffer(bytearray(content), dtype=dtype).to(device)
    stream = torch.cuda.current_stream(device)
    if torch.cuda.is_current_stream_capturing():
        return _copied(content, dtype, device, keep=True)
    return _kept(content, dtype, device, stream.cuda_stream)


def _copied(content: bytes, dtype: torch.dtype, device: torch.device, keep: bool = False) -> Tensor:
    host = torch.frombuffer(bytearray(content), dtype=dtype).pin_memory()
    if keep:
        _captured.append(host)
    return host.to(device, non_blocking=True)


@lru_cache(maxsize=1024)
def _kept(content: bytes, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    # The stream is part of the key: the copy is ordered before this one's launches alone.
    return _copied(content, dtype, device)


@lru_cache(maxsize=1024)
def _walk(content: bytes) -> tuple[tuple[bool, ...], bool]:
    """`Table.tall` and `Table.vectors`."""
    numbers = array("q", content)
    tall, vectors = [], True
    for address, row, col in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        tall.append(row == 1 != col)
        line, along = (col, row) if tall[-1] else (row, col)
        vectors &= along == 1 and line % VECTOR == 0 and address % 16 == 0
    return tuple(tall), vectors


def table(matrices: Sequence[Matrices], device: torch.device) -> Table:
    """The table of these matrices."""
    content = refs(matrices).tobytes()
    return Table(on_device(content, torch.int64, device), *_walk(content))


def vectors(rows: int, cols: int, *tables: Table) -> bool:
    """Whether a walk over matrices of all tables moves 16 bytes at a time: they go the same way, and no line is cut."""
    tall = tables[0].tall
    return (
        all(t.vectors and t.tall == tall for t in tables)
        and cols % VECTOR == 0
        and (rows % VECTOR == 0 or not any(tall))
    )
