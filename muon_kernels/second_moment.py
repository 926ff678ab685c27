"""What NorMuon and AdaMuon do to the orthogonalized update: divide it by the root of a running mean of its squares.

For every matrix U = NS(D), of the parameter's own rows and columns, V the state and β₂ the option `beta2`:

    V ← V + (1 - β₂)(S - V)
    U' = U / (√V + ε)
    U ← U' ‖U‖_F / ‖U'‖_F

with S the mean square of each row for "neuron" (NorMuon, arXiv 2510.05491, ε = 1e-10), U² for "element" (AdaMuon, arXiv
2507.11005, ε = 1e-8). The norm is kept, so that the rules of the learning rate hold as they do for Muon.

In torch operations on the stacks, between the last product and the update of the parameters, for any backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import flattens


class Form(NamedTuple):
    """What a kind of second moment costs beside a step.

    Attributes:
        eps: ε.
        launches: of a pass through the workspace, counted as one for each time that it is gone over.
        visits: how often the workspace is read or written.
        state_bytes: read and written for every element.
    """

    eps: float
    launches: int
    visits: int
    state_bytes: int


FORMS = {"neuron": Form(1e-10, 2, 3, 0), "element": Form(1e-8, 2, 4, 8)}

# Elements that are made fp32 at a time. On a processor they stay in its cache, and torch's operations on two dtypes,
# which would need no copy, are ten times slower.
_BLOCK, _BLOCK_ON_CPU = 1 << 20, 1 << 18


def shape_of(form: str, shape: Sequence[int], flatten: bool | None) -> tuple[int, ...]:
    """The size of V for a parameter of such a shape: (..., rows, 1) or its own."""
    if form == "element":
        return tuple(shape)
    return (shape[0], 1) if flattens(shape, flatten) else (*shape[:-1], 1)


def create(form: str, p: Tensor, flatten: bool | None) -> Tensor:
    """V of a parameter that has not been stepped: zeros in fp32."""
    if form == "element":
        return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
    return torch.zeros(shape_of(form, p.shape, flatten), device=p.device, dtype=torch.float32)


def of_rows(V: Tensor, start: int, stop: int, transposed: bool) -> Tensor:
    """V of "neuron" for matrices start..stop of a parameter as they lie in a stack: (batch, m, 1) or (batch, 1, n)."""
    rows = V.view(math.prod(V.shape[:-2]), V.shape[-2])[start:stop]
    return rows[:, None, :] if transposed else rows[:, :, None]


def _in_cache(X: Tensor) -> bool:
    """Whether it is worth while to go over X piece by piece."""
    return X.device.type == "cpu"


def _blocks(X: Tensor) -> Iterator[tuple[slice, slice]]:
    """(matrices, rows) of X, piece by piece."""
    batch, m, n = X.shape
    rows = max(1, (_BLOCK_ON_CPU if _in_cache(X) else _BLOCK) // n)
    matrices = max(1, rows // m)
    for i in range(0, batch, matrices):
        for row in range(0, m, rows):
            yield slice(i, i + matrices), slice(row, row + rows)


def _sums_of_squares(X: Tensor, dim: int) -> Tensor:
    """Over -1 or -2, which stays with size 1, in fp32."""
    if not _in_cache(X):
        norms: Tensor = torch.linalg.vector_norm(X, dim=dim, keepdim=True, dtype=torch.float32)
        return norms.square_()
    sums = X.new_zeros((X.shape[0], X.shape[1], 1) if dim == -1 else (X.shape[0], 1, X.shape[2]), dtype=torch.float32)
    for matrices, rows in _blocks(X):
        block = X[matrices, rows].float()
        sums[matrices, rows if dim == -1 else slice(None)] += block.square_().sum(dim, keepdim=True)
    return sums


def _multiply(X: Tensor, factor: Tensor) -> None:
    """X by an fp32 factor, rounded once."""
    if not _in_cache(X):
        X.mul_(factor)
        return
    factor = factor.expand(*factor.shape[:2], X.shape[2])
    for matrices, rows in _blocks(X):
        own = factor[matrices, rows if factor.shape[1] > 1 else slice(None)]
        X[matrices, rows].copy_(X[matrices, rows].float().mul_(own))


def _norm_kept(before: Tensor, after: Tensor) -> Tensor:
    """From sums of squares: what brings a matrix back to the norm that it had; 0 for zero, and NaN stays."""
    return (before / after).sqrt_().masked_fill_(after == 0, 0.0)


def _by_row(X: Tensor, moments: Sequence[Tensor], beta2: float, eps: float) -> None:
    dim = -1 if moments[0].shape[-1] == 1 else -2
    squares = _sums_of_squares(X, dim)
    V = torch.cat(list(moments)).lerp_(squares / X.shape[dim], 1 - beta2)
    torch._foreach_copy_(list(moments), torch.split(V, [len(v) for v in moments]))
    factor = V.sqrt_().add_(eps).reciprocal_()
    kept = _norm_kept(squares.sum((1, 2), keepdim=True), (squares * factor * factor).sum((1, 2), keepdim=True))
    _multiply(X, factor.mul_(kept))


def _by_element(X: Tensor, V: Tensor, beta2: float, eps: float) -> None:
    before, after = torch.zeros(2, len(X), 1, 1, device=X.device)
    for matrices, rows in _blocks(X):
        U, v = X[matrices, rows].float(), V[matrices, rows]
        square = U * U
        before[matrices] += square.sum((1, 2), keepdim=True)
        v.lerp_(square, 1 - beta2)
        U.div_(torch.sqrt(v, out=square).add_(eps))
        after[matrices] += torch.mul(U, U, out=square).sum((1, 2), keepdim=True)
        X[matrices, rows].copy_(U)
    _multiply(X, _norm_kept(before, after))


def normalize(form: str, X: Tensor, moments: Sequence[Tensor], beta2: float) -> None:
    """Update V and divide by it, in place.

    Args:
        form: of `FORMS`.
        X: (batch, m, n), a stack of orthogonalized updates; written.
        moments: fp32, in the order of X's batch, (matrices, m, 1) or (matrices, 1, n) from `of_rows`, or
            (matrices, m, n); written.
        beta2: β₂.
    """
    start, eps = 0, FORMS[form].eps
    if form == "element":
        for V in moments:
            _by_element(X[start : start + len(V)], V, beta2, eps)
            start += len(V)
        return
    for _, run in groupby(moments, key=lambda V: V.shape[-1] == 1):  # matrices of one orientation
        same = list(run)
        stop = start + sum(map(len, same))
        _by_row(X[start:stop], same, beta2, eps)
        start = stop
