"""Which tiles a product is cut into, by architecture and shape: data, so that nothing is tuned where a step runs."""

from __future__ import annotations

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
    """Tiles of block_m x block_n, in steps of block_k, by num_warps warps with num_stages stages on their way.

    Attributes:
        cost: of an element of the result, relative to the largest tile that keeps the tensor cores busy.
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


# By the least compute capability (10 times major plus minor), or by the name of an AMD architecture.
_LARGE = Config(128, 128, 32, 4, 3, 1.0)
_MEDIUM = Config(128, 64, 32, 4, 4, 1.2)
_SMALL = Config(64, 64, 64, 4, 3, 1.5)
TABLE: dict[int | str, tuple[Config, ...]] = {
    80: (_LARGE, _MEDIUM, _SMALL),
    90: (Config(128, 256, 64, 8, 3, 1.0), Config(128, 128, 64, 4, 3, 1.0), Config(64, 64, 64, 4, 4, 1.5)),
}


def table(target: int | str) -> tuple[Config, ...]:
    """The candidates for an architecture."""
    if isinstance(target, int):
        return TABLE[max(a for a in TABLE if isinstance(a, int) and a <= target)]
    return TABLE.get(target, TABLE[80])


@lru_cache(maxsize=1024)
def choose(shape: Shape, target: int | str, multiprocessors: int) -> Config:
    """The config with which the multiprocessor that has most tiles has least to do."""

    def work(config: Config) -> float:
        most = -(-shape.batch * config.tiles(shape.m, shape.n, shape.symmetric) // multiprocessors)
        return most * config.block_m * config.block_n * config.cost

    return min((c for c in table(target) if not shape.symmetric or c.block_m == c.block_n), key=work)
