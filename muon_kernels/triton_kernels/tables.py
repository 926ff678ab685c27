"""Addresses and strides of a bucket's matrices, on the device for one launch to read.

A gradient may be elsewhere in every step, and a kernel's arguments hold only a few addresses, so they travel in a
tensor: pinned memory and an asynchronous copy, for which nothing waits. Allocators give the same addresses again and
again, and momenta and parameters stay where they are, so tables are kept by content, and mostly there is nothing to
copy.

A CUDA graph repeats the copy that was captured and not the call: the memory that it reads must live as long as the
graph, which nobody can tell, so it is never freed (24 bytes a matrix), and neither side of the copy is shared with
calls outside of the graph.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import Bundle, Matrices, refs

_captured: list[Tensor] = []


class Table(NamedTuple):
    """A list of matrices (rows ≤ cols).

    Attributes:
        refs: (3 · batch,) int64 on the device: address, row stride and column stride of each.
        tall: whether each is walked along its columns; the others are walked along their rows.
        apart: what every line of that walk begins at a multiple of, in elements from an address that is one of 16
            bytes; 1 if the lines are not contiguous.
    """

    refs: Tensor
    tall: tuple[bool, ...]
    apart: int


def _stream(device: torch.device) -> int | None:
    """The address of the current stream; None if it is being captured."""
    if device.type != "cuda":  # AMD's is
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def on_device(content: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers in `content` as a tensor that is not to be written, without waiting for the device."""
    stream = _stream(device)
    if stream is not None:
        return _kept(content, dtype, device, stream)
    # Not pinned: that asks for events, which older versions of torch must not do during a capture.
    host = torch.frombuffer(bytearray(content), dtype=dtype)
    _captured.append(host)
    return host.to(device, non_blocking=True)


@lru_cache(maxsize=1024)
def _kept(content: bytes, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    # The stream is part of the key: the copy is ordered before this one's launches alone.
    host = torch.frombuffer(bytearray(content), dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    # The pinned memory is given back before it was read. That is safe: torch has noted the stream of the copy, and
    # hands the memory out again only after an event behind it.
    return host.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=1024)
def _walk(content: bytes) -> tuple[tuple[bool, ...], int]:
    """`Table.tall` and `Table.apart`."""
    numbers = array("q", content)
    tall, apart = [], 0
    for address, row, col in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        tall.append(row == 1 != col)
        line, along = (col, row) if tall[-1] else (row, col)
        apart = math.gcd(apart, line) if along == 1 and address % 16 == 0 else 1
    return tuple(tall), apart


def table(matrices: Sequence[Matrices], device: torch.device) -> Table:
    """The table of these matrices."""
    stream = _stream(device)
    kept: dict[int | None, Table] = matrices.derived.setdefault("tables", {}) if isinstance(matrices, Bundle) else {}
    if found := kept.get(stream):
        return found
    content = refs(matrices).tobytes()
    made = Table(on_device(content, torch.int64, device), *_walk(content))
    if stream is not None:
        kept[stream] = made
    return made


def width(rows: int, cols: int, itemsize: int, X: Tensor | None, *tables: Table) -> int:
    """How many elements a walk over matrices of all tables, and over X, may move at once.

    16 bytes of the largest element: of the others less, since a thread then has the same elements of all. 1 unless the
    tables are walked the same way and nothing cuts through a vector.
    """
    tall = tables[0].tall
    n = 16 // itemsize
    starts = [t.apart for t in tables]
    if X is not None:
        starts += [X.stride(0), X.stride(1)]
    whole = not any(start % n for start in starts) and cols % n == 0 and (rows % n == 0 or not any(tall))
    same_way = all(t.tall == tall for t in tables)
    return n if whole and same_way and (X is None or X.data_ptr() % 16 == 0) else 1
