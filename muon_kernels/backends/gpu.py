"""Facts that the backends for GPUs have in common."""

from __future__ import annotations

# Facts, see `Backend`.
symmetric_products = True
precise_squares = True
default_workspace_bytes = 1 << 30


def leading_dimension(cols: int) -> int:
    """Let rows begin at 16 bytes, which is what a thread copies at a time and what descriptors ask for."""
    return -(-cols // 8) * 8


# Predicted, not measured: a fused step walks 128x4096 in 0.35 ms on H100, whatever the other multiprocessors do; steps
# in launches move 40 bytes an element, at 3 TB/s, and take some 20 launches of 6 µs where they have little to do.
_MULTIPROCESSORS = 108  # of an A100; others have 80 to 170
_FUSED_SECONDS = 0.35e-3 / (128 * 4096)
_APART_SECONDS = 40 / 3e12
_LAUNCHES_SECONDS = 20 * 6e-6


def fusing_pays(rows: int, cols: int, count: int) -> bool:
    """Whether one block a matrix takes no longer than launches in which all multiprocessors share the matrices.

    It does for many matrices and for short ones; a few wide ones would keep a few multiprocessors busy for long.
    """
    return fused_seconds(rows, cols, count) <= _LAUNCHES_SECONDS + count * rows * cols * _APART_SECONDS


def fused_seconds(rows: int, cols: int, count: int) -> float:
    """Predict the time of a fused step."""
    return -(-count // _MULTIPROCESSORS) * rows * cols * _FUSED_SECONDS
