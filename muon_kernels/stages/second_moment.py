"""The second moments of NorMuon and AdaMuon, by which orthogonalized updates are divided.

The update is divided by the root of a running mean of its squares. For every matrix U = NS(D), with the parameter's own
rows and columns or those of a part that `split` makes of it, V the state and β₂ the option `beta2`:

    V ← V + (1 - β₂)(S - V)
    U' = U / (√V + ε)
    U ← U' ‖U‖_F / ‖U'‖_F

S is the mean square of each row for "neuron" (NorMuon, arXiv 2510.05491, ε = 1e-10), and U² for "element" (AdaMuon,
arXiv 2507.11005, ε = 1e-8). The norm is kept, so that the rules of the learning rate hold as they do for Muon.
AdaMuon's U is NS(sign(D)).

Computed by torch operations on the stacks, after the last product, for any backend. Their memory is `scratch`, which
the workspace sets aside, so that none can be missing in the midst of a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import groupby
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Piece, column_order, flattens, split_shape
from ..split import pieces
from ..tensors import check_dense, local
from .stage import Stage
from .sums import add_sum, floats_of_block, in_blocks, in_cache, in_fp32, multiply, norm_kept, padded, sums_of_squares


class Form(NamedTuple):
    """Costs of a form of second moment, beside a step's.

    Attributes:
        eps: ε.
        launches: in a pass through the workspace, counted as one for each time that it is gone over.
        visits: how often an element of the workspace is read or written; less for "element" on a processor, see
            `normalize`.
        state_bytes: read and written for every element.
    """

    eps: float
    launches: int
    visits: int
    state_bytes: int


FORMS = {"neuron": Form(1e-10, 2, 3, 0), "element": Form(1e-8, 2, 4, 8)}


def _splits_columns(shape: Sequence[int], flatten: bool | None, piece: Piece | None) -> bool:
    return piece is not None and piece.dim != (0 if flattens(shape, flatten) else len(shape) - 2)


def shape_of(form: str, shape: Sequence[int], flatten: bool | None, split: str | None) -> tuple[int, ...]:
    """Return the size of V for a parameter of this shape.

    That is the parameter's own size for "element", and (..., rows, number of parts that `split` makes of a row) for
    "neuron".
    """
    if form == "element":
        return tuple(shape)
    split_rows = [
        piece for piece in pieces(tuple(shape), flatten, split) if piece and _splits_columns(shape, flatten, piece)
    ]
    parts = sum(piece.parts for piece in split_rows) if split_rows else 1
    return (shape[0], parts) if flattens(shape, flatten) else (*shape[:-1], parts)


def create(form: str, p: Tensor, flatten: bool | None, split: str | None) -> Tensor:
    """Return V of a parameter that has not been stepped: zeros in fp32.

    V of "element" lies in memory as a stack does, in which tall matrices are transposed: torch's operations on two
    tensors that are walked in different directions are ten times slower.
    """
    if form == "neuron":
        return torch.zeros(shape_of(form, p.shape, flatten, split), device=p.device, dtype=torch.float32)
    if flattens(p.shape, flatten):
        batch, rows, cols = [], [0], list(column_order(p.shape, p.stride()))
    else:
        batch, rows, cols = list(range(p.ndim - 2)), [p.ndim - 2], [p.ndim - 1]
    _, height, width = split_shape(p.shape, flatten, pieces(p.shape, flatten, split)[0])
    order = batch + (cols + rows if height > width else rows + cols)
    V = torch.zeros([p.shape[d] for d in order], device=p.device, dtype=torch.float32)
    return V.permute([order.index(d) for d in range(p.ndim)])


def piece_of_rows(V: Tensor, shape: Sequence[int], flatten: bool | None, piece: Piece | None, before: int) -> Piece:
    """Return the piece of V, for "neuron", that belongs to a piece of the parameter: matrices of one column.

    Args:
        V: of the size `shape_of`.
        shape, flatten: of the parameter.
        piece: of the parameter; None for all of it.
        before: number of parts in the pieces before.
    """
    if piece is None:
        return Piece(V.ndim - 1, 0, 1, 1, 1, 1)
    if _splits_columns(shape, flatten, piece):
        return Piece(V.ndim - 1, before, piece.parts, 1, 1, 1)
    return piece._replace(dim=V.ndim - 2)


class SecondMoment(Stage):
    """Stage of `second_moment`: results are divided by the root of a running mean of their squares."""

    option = "second_moment"
    choices = (None, *FORMS)

    @classmethod
    def of(cls, value: Any) -> SecondMoment | None:
        """Implement `Stage.of`."""
        return None if value is None else cls(value)

    def __init__(self, form: str) -> None:
        """Take the form, a name in FORMS."""
        self.form = form
        self.note = f"second_moment={form!r} goes over an update twice more, and no step with it is fused"
        _, self.launches, self.visits, self.state_bytes = FORMS[form]

    def floats(self, m: int, n: int, device: torch.device) -> int:
        """Return the fp32 scratch for a matrix; see `Stage.floats`."""
        block = floats_of_block(m, n, device)
        return padded({"neuron": 2 * n + 2 + in_cache(device) * block, "element": 3 + 2 * block}[self.form])

    def after(
        self, X: Tensor, moments: Sequence[Tensor], scalars: Any, ratios: array[float], scratch: Tensor
    ) -> array[float]:
        """Divide the results in X by second moments; see `Stage.after`."""
        kept = normalize(self.form, X, moments, scalars.beta2, scratch)
        return ratios if kept is None else array("d", map(mul, ratios, kept))


class Whole:
    """Sums over matrices that are here as wholes. Of parts, `distributed.second_moment.Parts` asks other ranks."""

    def columns(self, here: int) -> int:
        """Return the length of a row, of which `here` elements are here."""
        return here

    def complete(self, squares: Tensor) -> None:
        """Bring the sums of squares of rows, (batch, rows, 1) or (batch, 1, rows), to those of whole rows."""

    def kept_by_rows(self, squares: Tensor, factor: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return what keeps the norms of matrices whose rows are multiplied by `factor`; see `norm_kept`.

        Args:
            squares: sums of squares of whole rows; overwritten.
            factor: of each row, of the same size.
            before, after: (batch, 1, 1), overwritten.
        """
        torch.sum(squares, (1, 2), keepdim=True, out=before)
        torch.sum(squares.mul_(factor).mul_(factor), (1, 2), keepdim=True, out=after)
        return norm_kept(before, after)

    def add_up(self, before: Tensor, after: Tensor) -> None:
        """Bring sums of squares, (batch, 1, 1) each, to those of whole matrices."""


def by_row(X: Tensor, moments: Sequence[Tensor], beta2: float, dim: int, scratch: Tensor, whole: Whole) -> None:
    """Divide X by the roots of `moments`, one a row; see `normalize`.

    Args:
        X, moments, beta2, scratch: see `normalize`; of parts of matrices, what is here.
        dim: along which X holds rows of the parameter, -1 or -2.
        whole: sums over the whole matrices.
    """
    batch, rows, eps = len(X), X.shape[-3 - dim], FORMS["neuron"].eps
    sizes = batch * rows, batch * rows, batch, batch
    block, *own = torch.split(scratch, [scratch.numel() - sum(sizes), *sizes])
    shape = (batch, rows, 1) if dim == -1 else (batch, 1, rows)
    squares, V, before, after = own[0].view(shape), own[1].view(shape), own[2].view(-1, 1, 1), own[3].view(-1, 1, 1)
    sums_of_squares(X, dim, squares, V, block)
    whole.complete(squares)
    torch.cat(list(moments), out=V)
    V.mul_(beta2).add_(squares, alpha=(1 - beta2) / whole.columns(X.shape[dim]))
    for moment, new in zip(moments, torch.split(V, [len(v) for v in moments]), strict=True):
        moment.copy_(new)
    factor = V.sqrt_().add_(eps).reciprocal_()
    multiply(X, factor.mul_(whole.kept_by_rows(squares, factor, before, after)), block)


def by_element(X: Tensor, moments: Sequence[Tensor], beta2: float, scratch: Tensor, whole: Whole) -> list[float] | None:
    """Divide X by the roots of `moments`, one an element; see `normalize`, and `by_row` for `whole`."""
    eps = FORMS["element"].eps
    block, *own = torch.split(scratch, [scratch.numel() - 3 * len(X)] + [len(X)] * 3)
    before, after, partial = (x.view(-1, 1, 1) for x in own)
    before.zero_(), after.zero_()
    numbers, start = block.numel() // 32 * 16, 0
    for V in moments:
        stop = start + len(V)
        x, sums = X[start:stop], [t[start:stop] for t in (before, after, partial)]
        for matrices, rows in in_blocks(x, numbers):
            U, v = in_fp32(x[matrices, rows], block), V[matrices, rows]
            square = block[numbers : numbers + U.numel()].view(U.shape)
            own_before, own_after, own_part = (t[matrices] for t in sums)
            torch.mul(U, U, out=square)
            add_sum(square, (1, 2), own_before, own_part)
            v.lerp_(square, 1 - beta2)
            U.div_(torch.sqrt(v, out=square).add_(eps))
            add_sum(torch.mul(U, U, out=square), (1, 2), own_after, own_part)
            x[matrices, rows].copy_(U)
        start = stop
    whole.add_up(before, after)
    kept = norm_kept(before, after)
    if in_cache(X.device):
        return kept.flatten().tolist()
    X.mul_(kept)
    return None


def normalize(form: str, X: Tensor, moments: Sequence[Tensor], beta2: float, scratch: Tensor) -> list[float] | None:
    """Update V and divide X by it, in place.

    Args:
        form: in FORMS.
        X: (batch, m, n), a stack of orthogonalized updates; written.
        moments: fp32, in the order of X's batch; written. (matrices, m, n) for "element". For "neuron" one number for
            each row of the parameter: (matrices, m, 1), or (matrices, 1, n) where X holds the matrix transposed.
        beta2: β₂.
        scratch: batch times `SecondMoment.floats` of fp32, contiguous; overwritten.

    Returns:
        A factor for each matrix, by which X is still to be multiplied: on a processor that is cheaper where X is used.
            None where X is the result.
    """
    if form == "element":
        return by_element(X, moments, beta2, scratch, Whole())
    start = 0
    for is_row, run in groupby(moments, key=lambda V: V.shape[-1] == 1):  # matrices of one orientation
        same = list(run)
        stop = start + sum(map(len, same))
        by_row(X[start:stop], same, beta2, -1 if is_row else -2, scratch, Whole())
        start = stop
    return None


def shape_of_shard(
    form: str, shape: Sequence[int], whole: Sequence[int], flatten: bool | None, split: str | None
) -> tuple[int, ...]:
    """Return the size of V of a shard of size `shape` of a parameter of size `whole`; see `shape_of`.

    A rank that has any of a row keeps what "neuron" has of all its parts.
    """
    own = shape_of(form, shape, flatten, None)
    return own if form == "element" else (*own[:-1], shape_of(form, whole, flatten, split)[-1])


def check_second_moment(
    name: str,
    V: Any,
    form: str,
    p: Tensor,
    flatten: bool | None,
    split: str | None,
    whole: Sequence[int] | None = None,
) -> None:
    """Raise ValueError or TypeError unless V can be the second moment of `p`, a parameter or a shard of such a size."""
    check_dense(name, local(V))
    expected = shape_of_shard(form, p.shape, whole or p.shape, flatten, split)
    if V.shape != expected or V.dtype != torch.float32:
        raise ValueError(
            f"{name} should be of size {expected} and float32 for second_moment={form!r} but is of size "
            f"{tuple(V.shape)} and {str(V.dtype).removeprefix('torch.')}; delete it from the state to start anew"
        )
