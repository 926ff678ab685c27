"""The random bits of stochastic rounding, of whole matrices, in numpy's integers: what csrc/muon_kernels.h says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from muon_kernels.layout import Window


def mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, of numbers modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(seed: int, number: int, rows: int, cols: int) -> Tensor:
    """Return sixteen for every element of the matrix of that number, (rows, cols) int64."""
    across = (cols + 1) // 2
    block = np.arange((rows + 1) // 2 * across, dtype=np.uint64) + np.uint64(1)
    start = mixed(np.array([(seed + number) % 2**64], dtype=np.uint64))
    drawn = mixed(start + block * np.uint64(0x9E3779B97F4A7C15)).reshape(-1, across)
    bits = np.empty((2 * len(drawn), 2 * across), dtype=np.int64)
    for i in range(2):
        for j in range(2):
            bits[i::2, j::2] = (drawn >> np.uint64(32 * i + 16 * j) & np.uint64(0xFFFF)).astype(np.int64)
    return torch.from_numpy(bits[:rows, :cols].copy())


def rounded_by(value: Tensor, random: Tensor) -> Tensor:
    """Return fp32 values, which are finite, with these bits added and truncated to bf16."""
    bits = (value.view(torch.int32).long() & 0xFFFFFFFF) + random
    return ((bits >> 16) & 0xFFFF).to(torch.uint16).view(torch.bfloat16)


def windows(m: int, n: int) -> Iterator[tuple[Window, tuple[int, int], tuple[slice, slice]]]:
    """Yield windows of m x n matrices, each with the size of the whole, and its rows and columns there."""
    for top, left, below, right in ((0, 0, 0, 0), (0, 0, 3, 5), (2, 4, 1, 1), (1, 0, 0, 2), (0, 7, 2, 0), (5, 3, 0, 0)):
        for turned in (False, True):
            height, width = (n, m) if turned else (m, n)
            whole = top + height + below, left + width + right
            here = slice(top, top + height), slice(left, left + width)
            yield Window(top, left, whole[1], turned), whole, here
