"""The products alone, counted on the FLOPs of a symmetric result's triangle, beside torch.matmul at 2048³ in bf16.

python bench/bench_products.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from measure import measured_peak

from muon_kernels import backends
from muon_kernels.newton_schulz import Square

# (batch, m, n): GPT-2's MLP and attention, a Llama-style MLP, MoE experts, heads
SHAPES = [(4, 768, 3072), (4, 768, 768), (1, 2048, 5632), (16, 384, 1024), (128, 64, 768)]


def seconds(f: Callable[[], None]) -> float:
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        f()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def rates(batch: int, m: int, n: int) -> dict[str, float]:
    """FLOP/s of X Xᵀ, of b A + c A² and of a X + B X, squares with their fp32 diagonals."""
    ops = backends.get("cpu")
    pad = ops.leading_dimension
    X, Y = (torch.randn(batch, m, pad(n)).bfloat16()[..., :n] for _ in range(2))
    A, B = (Square(torch.randn(batch, m, pad(m)).bfloat16()[..., :m], torch.randn(batch, m) * 1e-3) for _ in range(2))
    triangle = batch * m * (m + 1)
    return {
        "syrk": triangle * n / seconds(lambda: ops.syrk(X, out=A)),
        "syrk + C": triangle * m / seconds(lambda: ops.syrk(A, C=A, alpha=0.5, beta=0.5, out=B)),
        "gemm + C": 2 * batch * m * m * n / seconds(lambda: ops.gemm(B, X, C=X, beta=0.5, out=Y)),
    }


if __name__ == "__main__":
    peak = measured_peak()
    print(f"torch.matmul, bf16, 2048³: {peak / 1e9:.0f} GFLOP/s; ours in percent of it\n")
    for shape in SHAPES:
        found = {name: 100 * rate / peak for name, rate in rates(*shape).items()}
        print(f"{shape!s:16}", "  ".join(f"{name} {percent:4.0f}" for name, percent in found.items()))
