"""Facts that the backends for GPUs have in common."""

from __future__ import annotations

# Facts, see `Backend`.
symmetric_products = True
precise_squares = True
default_workspace_bytes = 1 << 30


def leading_dimension(cols: int) -> int:
    """Let rows begin at 16 bytes, which is what a thread copies at a time and what descriptors ask for."""
    return -(-cols // 8) * 8


# Predicted, not measured: a fused step takes 0.35 ms for 128x4096 on H100, whatever the other multiprocessors do; steps
# in launches move 40 bytes an element, at 3 TB/s, and take some 20 launches of 6 µs where they have little to do.
_MULTIPROCESSORS = 108  # of an A100; others have 80 to 170
_ITERATION_COLUMNS = 8.5  # that have as many FLOPs, for each row: 17 products of squares, and 2 with each column
_FUSED_SECONDS = 0.35e-3 / (128 * (4096 + _ITERATION_COLUMNS * 128))
_SQUARE_SECONDS = 4 / 50e9  # an element of a part's Gram matrix, which every part of the matrix reads from the L2 cache
_APART_SECONDS = 40 / 3e12
_LAUNCH_SECONDS = 6e-6
_LAUNCHES = 20

FUSED_TILE = 32  # columns that a fused step walks at a time


def fused_parts(rows: int, cols: int, count: int, most: int | None = None) -> int:
    """Choose how many blocks share the columns of a matrix in a fused step, by the time that is predicted.

    Of several each walks fewer columns, on a multiprocessor that has nothing else to do, but adds up the Gram matrices
    of all. One, in a single launch, unless several save a quarter: a prediction is no more exact. All parts have
    columns, in whole tiles, since of numbers of parts that walk as far the least has least to add.

    `most`: that there is memory for; None for any number.
    """
    tiles = -(-cols // FUSED_TILE)
    idle = _MULTIPROCESSORS // max(1, count)
    most = max(1, min(tiles, idle, idle if most is None else most))
    best = min(range(1, most + 1), key=lambda parts: fused_seconds(rows, cols, count, parts))
    saves = fused_seconds(rows, cols, count, best) <= 0.75 * fused_seconds(rows, cols, count)
    return best if saves else 1


def fusing_pays(rows: int, cols: int, count: int, parts: int = 1) -> bool:
    """Whether a fused step takes no longer than launches in which all multiprocessors share the matrices.

    It does for many matrices and for short ones; with one part, a few wide ones would keep a few multiprocessors busy
    for long.
    """
    apart = _LAUNCHES * _LAUNCH_SECONDS + count * rows * cols * _APART_SECONDS
    return fused_seconds(rows, cols, count, parts) <= apart


def fused_seconds(rows: int, cols: int, count: int, parts: int = 1) -> float:
    """Predict the time of a fused step whose matrices are divided among so many blocks each."""
    side = max(16, 1 << (rows - 1).bit_length())  # what a block multiplies has this many rows
    tiles = -(-cols // FUSED_TILE)
    walked = -(-tiles // parts) * FUSED_TILE
    block = side * (walked + _ITERATION_COLUMNS * side) * _FUSED_SECONDS
    if parts > 1:
        block += parts * side * side * _SQUARE_SECONDS + _LAUNCH_SECONDS
    return -(-count * parts // _MULTIPROCESSORS) * block
