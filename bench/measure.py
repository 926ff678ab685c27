"""Parameters with gradients, and this processor's bf16 rate."""

from __future__ import annotations

import time
from functools import cache

import torch
from shapes import Shapes
from torch import nn


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Parameters of these shapes with gradients, in fp32."""
    params = []
    for rows, cols, count in shapes:
        for _ in range(count):
            p = nn.Parameter(torch.randn(rows, cols) * 0.02)
            p.grad = torch.randn(rows, cols)
            params.append(p)
    return params


@cache
def measured_peak() -> float:
    """FLOP/s of torch.matmul in bf16 at 2048³, the median of seven."""
    A = torch.randn(2048, 2048).bfloat16()
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.matmul(A, A)
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / sorted(times[1:])[3]
