"""Addresses and strides of a bucket's matrices, on the device for one launch to read.

A gradient may be elsewhere in every step, and a kernel's arguments hold only a few addresses, so they travel in a
tensor: pinned memory and an asynchronous copy, for which nothing waits. Allocators give the same addresses again and
again, and momenta and parameters stay where they are, so tables are kept by content, and mostly there is nothing to
copy.

A CUDA graph would repeat such a copy, from memory of the host that must live as long as the graph, which nobody can
tell; and torch refuses some. So there the numbers are the arguments of small launches, and what these write belongs to
the graph.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..graphs import capturing
from ..layout import Bundle, Matrices, refs
from .launch import launch, rehearsing


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


_WORDS = 32  # that a launch of `_write` writes


@triton.jit(do_not_specialize=["out", *(f"v{i}" for i in range(32))])
def _write(
    out,
    v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64,
    v6: tl.int64, v7: tl.int64, v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64,
    v12: tl.int64, v13: tl.int64, v14: tl.int64, v15: tl.int64, v16: tl.int64, v17: tl.int64,
    v18: tl.int64, v19: tl.int64, v20: tl.int64, v21: tl.int64, v22: tl.int64, v23: tl.int64,
    v24: tl.int64, v25: tl.int64, v26: tl.int64, v27: tl.int64, v28: tl.int64, v29: tl.int64,
    v30: tl.int64, v31: tl.int64,
):  # fmt: skip
    values = (
        v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15,
        v16, v17, v18, v19, v20, v21, v22, v23, v24, v25, v26, v27, v28, v29, v30, v31,
    )  # fmt: skip
    for i in tl.static_range(32):
        tl.store(out + i, values[i])


def _stream(device: torch.device) -> int | None:
    """The address of the current stream; None if it is being captured."""
    if capturing(device):
        return None
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def on_device(content: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers in `content` as a tensor that is not to be written, without waiting for the device."""
    stream = _stream(device)
    if stream is None or rehearsing():
        written = _by_launches(content, device).view(dtype)[: len(content) // dtype.itemsize]
        if stream is None:
            return written
    return _kept(content, dtype, device, stream)


def _by_launches(content: bytes, device: torch.device) -> Tensor:
    """Return an (n,) int64 tensor that begins with `content`."""
    words = array("q", content.ljust(-(-len(content) // (8 * _WORDS)) * 8 * _WORDS, b"\0"))
    out = torch.empty(len(words), dtype=torch.int64, device=device)
    for begin in range(0, len(words), _WORDS):
        launch(_write, 1, out[begin:], *words[begin : begin + _WORDS], num_warps=1, enable_fp_fusion=False)
    return out


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
    """Return how many elements a walk over matrices of all tables, and over X, may move at once.

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
