"""Arguments of the verbs: csrc/muon_kernels.h's structs, with tensors in place of addresses.

A field has the name that it has in csrc, whose comments give the formulas; `backends.Backend` says what a verb writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .layout import Matrices, Window


class MomentumUpdate(NamedTuple):
    """The gradients of a bucket on their way to directions.

    Attributes:
        grad: matrices in the order of x's batch; only read.
        momentum: the momentum buffers in that order, updated in place; None: the direction is the gradient.
        x: (batch, m, n), a stack; the directions are written to it.
        mu: decay of the momentum.
        nesterov: whether the direction looks one step ahead.
        dampened: whether the gradient enters with 1 - mu (torch) or whole (Moonlight).
        grad_scale: factor of every gradient, negative to maximize.
        eps: smallest norm that is divided by, relative to the power of two below the norm.
        margin: of the coefficient set.
        scratch: `Backend.scratch_bytes` of memory for every matrix, in which the result may lie; None to allocate.
        norm: (batch,) fp64, written: Frobenius norms of the directions before rounding; None if nobody asks.
    """

    grad: Sequence[Matrices]
    momentum: Sequence[Matrices] | None
    x: Tensor
    mu: float
    nesterov: bool
    dampened: bool
    grad_scale: float
    eps: float
    margin: float
    scratch: Tensor | None = None
    norm: Tensor | None = None


class ApplyUpdate(NamedTuple):
    """The updates of a bucket on their way to parameters.

    Attributes:
        param: matrices in the order of x's batch, updated in place.
        x: (batch, m, n), a stack; only read.
        lr, weight_decay: numbers, or one-element tensors, which csrc takes in ApplyOptions if they are on a GPU.
        ratio: factor of lr, one a matrix.
    """

    param: Sequence[Matrices]
    x: Tensor
    lr: float | Tensor
    weight_decay: float | Tensor
    ratio: Sequence[float]


class ApplyOptions(NamedTuple):
    """Options of `apply_update` beyond its formula.

    Attributes:
        cautious: decay only where update and parameter have the same sign.
        stochastic_rounding: of bf16 parameters; others are rounded to nearest. The random bits depend on the seed, the
            matrix's number and the place in the whole matrix alone, and are the same on every backend; csrc says which.
        seed: of these, 64 bits.
        number: of every matrix, from 0 to 2^30 - 1; None for 0, 1, 2 and so on.
        window: where the matrices are in the whole ones.
    """

    cautious: bool = False
    stochastic_rounding: bool = False
    seed: int = 0
    number: Sequence[int] | None = None
    window: Window = Window()


class Step(NamedTuple):
    """A whole step of a bucket.

    Attributes:
        momentum: its x is the workspace, (slots, m, n), with one slot or more for all matrices; it has no scratch.
        iterate: from the scale to the result, for the matrices in the slots.
        triples: coefficients that `iterate` uses, for a backend that iterates by itself.
        apply: its x is not used: the result is what `iterate` returns.
        options: of `apply`.
        parts: of the columns of a matrix, as planned; see `Fused`.
        partials: memory that the parts need, written; None to allocate.
    """

    momentum: MomentumUpdate
    iterate: Callable[[Tensor], Tensor]
    triples: Sequence[tuple[float, float, float]]
    apply: ApplyUpdate
    options: ApplyOptions
    parts: int = 1
    partials: Tensor | None = None
