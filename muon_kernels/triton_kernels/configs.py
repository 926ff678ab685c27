"""Which tiles a product is cut into, by architecture and shape: data, so that nothing is tuned where a step runs."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple


class Shape(NamedTuple):
    """Of a product: `batch` times m x k by k x n."""

    batch: int
    m: int
    n: int
    k: int
    symmetric: bool


class Config(NamedTuple):
    """Tiles of block_m x block_n, in steps of block_k, by num_warps warps; num_stages as Triton counts them.

    Attributes:
        cost: of an element of the result, relative to the best tile of the architecture. A count, not a time: what
            tensor cores need for a step, or what shared memory needs to take its operands and to give them, at 128
            bytes a clock, if that is more.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    cost: float

    def tiles(self, m: int, n: int, symmetric: bool) -> int:
        """Of a matrix."""
        tiles_m, tiles_n = -(-m // self.block_m), -(-n // self.block_n)
        return tiles_m * (tiles_m + 1) // 2 if symmetric else tiles_m * tiles_n


# Every entry, with every kind of addend, compiles without spills, and none has a bank conflict where tests/ptx can
# count them. The share behind an entry: of the clocks that tensor cores need for the loop, how many a scheduler issues
# other instructions in, copies and their addresses mostly. Counted in SASS; no GPU was timed.
#
# mma.sync takes a k of 16 for 16 x 8 elements in two clocks; a warp reads its operands from shared memory. Eight warps
# share the large tiles: with four, the addends do not fit into registers beside the sums. All fit into 100 KiB.
_MMA = (
    Config(128, 256, 32, 8, 4, 1.0),  # 24 %
    Config(128, 128, 32, 8, 4, 1.0),  # 35 %
    Config(128, 64, 32, 4, 4, 1.125),  # 36 %
    Config(64, 64, 64, 4, 4, 1.5),  # 42 %
)
# By compute capability (10 times major plus minor), or AMD's name of an architecture.
TABLE: dict[int | str, tuple[Config, ...]] = {
    80: _MMA,
    # wgmma reads both operands from shared memory: 64 x 256 elements in 128 clocks for a k of 16.
    90: (
        Config(128, 256, 64, 8, 4, 1.0),  # 24 %
        Config(128, 128, 64, 8, 4, 1.25),  # 42 %
        Config(128, 64, 64, 4, 4, 1.75),  # 49 %
        Config(64, 64, 64, 4, 4, 2.0),  # 84 %
    ),
    # tcgen05 takes 128 x 128 elements in 64 clocks, and 64 rows take as long as 128. 128 x 256 would spill. Copies by
    # threads are at their limit here: what TMA could take from them counts more than another tile.
    100: (
        Config(128, 128, 64, 8, 4, 1.0),  # 95 %
        Config(128, 64, 64, 4, 4, 1.5),  # 105 %
        Config(64, 64, 64, 4, 4, 2.0),  # 93 %
    ),
    120: _MMA,  # has no wgmma and no tcgen05
    # mfma takes 128 x 128 elements in 256 clocks. A block may have 64 KiB.
    "gfx942": (
        Config(128, 128, 32, 4, 2, 1.0),
        Config(64, 64, 64, 4, 2, 1.5),
    ),
}


def table(target: int | str) -> tuple[Config, ...]:
    """The candidates for an architecture."""
    if isinstance(target, int):
        return TABLE[max(a for a in TABLE if isinstance(a, int) and a <= target)]
    return TABLE.get(target, TABLE["gfx942"])


@lru_cache(maxsize=1024)
def choose(shape: Shape, target: int | str, multiprocessors: int) -> Config:
    """The config with which the multiprocessor that has most tiles has least to do."""

    def work(config: Config) -> float:
        most = -(-shape.batch * config.tiles(shape.m, shape.n, shape.symmetric) // multiprocessors)
        return most * config.block_m * config.block_n * config.cost

    return min((c for c in table(target) if not shape.symmetric or c.block_m == c.block_n), key=work)


# ---- elementwise.py ----

BLOCK = 64  # rows and columns of a tile


def scratch_bytes(rows: int, cols: int) -> int:
    """Of a matrix in `momentum_update`: a double for each tile and as much for the scale, in whole sectors."""
    return -(-8 * (-(-rows // BLOCK) * -(-cols // BLOCK) + 1) // 32) * 32


# ---- fused_step.py ----

FUSED_ROWS = 64  # R, Q and S of more would leave the registers
# Largest relative error of the number that a sum of three bf16 numbers stands for.
_UNIT_ROUNDOFF = 2.0**-22
# The sum over the steps of S's relative error where S should be a, as csrc's fused_step judges it.
_ALLOWED_CHANGE = 4.0


def block_of(rows: int) -> int:
    """The side of fused_step's tiles; two, since each is a compilation."""
    return 32 if rows <= 32 else 64


def needs_restart(triples: tuple[tuple[float, float, float], ...], margin: float) -> bool:
    """Whether `fused_step` would lose too much to rounding with these coefficients.

    An eigenvalue of R that should be 0 is `loss` too small, negative, and so S is too large there: that multiplies the
    loss by S² in every step, while the step's own rounding adds to it. When Q is several times too large the iteration
    is about to explode.
    """
    loss, change = _UNIT_ROUNDOFF / margin**2, 0.0
    for a, b, c in triples:
        s = abs(a) + abs(b) * loss + abs(c) * loss * loss
        change += s / abs(a) - 1 if a else math.inf
        loss = loss * s * s + _UNIT_ROUNDOFF * (1 + abs(a))
    return not change <= _ALLOWED_CHANGE  # NaN, too


def executed_flops(rows: int, cols: int, steps: int) -> int:
    """Of `fused_step` for a matrix: a product is six of bf16, sizes are rounded up to tiles; two visits to X."""
    m = block_of(rows)
    n = -(-cols // m) * m
    return 6 * 2 * m * m * (2 * n + 4 * steps * m)
