"""Implementations of the products that are checked and timed: backends, with every instruction set and every tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...backends import cpu, cuda
from ...checks.products import Run, of_backend
from .stage import Place


class Implementation(NamedTuple):
    """An implementation of products.

    Attributes:
        name: with what is special about it.
        run: one product.
        precise: whether diagonals of squares are kept in fp32, and results are the exact sums, rounded once.
        fixed: whether it is one tile of several, that a backend chooses among.
        square: whether it makes symmetric products in its own way; if not, another implementation has them already.
    """

    name: str
    run: Run
    precise: bool = True
    fixed: bool = False
    square: bool = True


def implementations(place: Place, dtype: torch.dtype) -> Iterator[Implementation]:
    """Yield all of the place's backends that take operands of this dtype."""
    for name in place.backends:
        ops = backends.get(name)
        if ops.refuses(torch.device(place.device), [torch.float32], dtype) is not None:
            continue
        precise = bool(ops.precise_squares)
        if name == "cpu":
            for isa in cpu.instruction_sets():
                yield Implementation(f"cpu, {isa}", _forced(isa))
            continue
        if name == "cuda" and len(own := cuda.own_kinds(torch.device(place.device))) > 1:
            for kind in own:
                yield Implementation(f"cuda, {kind}", _multiplied_by(kind), precise)
            continue
        yield Implementation(name, of_backend(ops), precise)
        if name == "triton":
            yield from _tiles()


def _forced(isa: str) -> Run:
    inner = of_backend(backends.get("cpu"))

    def run(*operands: Tensor, **options: Any) -> None:
        with cpu.forced(isa):
            inner(*operands, **options)

    return run


def _multiplied_by(kind: str) -> Run:
    inner = of_backend(backends.get("cuda"))

    def run(*operands: Tensor, **options: Any) -> None:
        with cuda.multiplying_by(kind, operands[0].device):
            inner(*operands, **options)

    return run


def _tiles() -> Iterator[Implementation]:
    """Yield Triton's products, with each of the tiles that it may take on this GPU."""
    from ...triton_kernels import measured, products

    for config in measured.table().configs:
        square = config.block_m == config.block_n

        def run(*operands: Tensor, config: Any = config, square: bool = square, **options: Any) -> None:
            of_triangle = options.get("symmetric", False)
            products.product(*operands, config=config if square or not of_triangle else None, **options)

        name = f"triton, {config.block_m}x{config.block_n}x{config.block_k}, {config.num_warps} warps"
        yield Implementation(name, run, fixed=True, square=square)
