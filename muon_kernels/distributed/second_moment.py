"""The second moments of NorMuon and AdaMuon where ranks hold shards of a matrix; see stages/second_moment.py.

Every rank keeps those of its own shard. Beside it, they need sums over the whole matrix: of squares before and after
the division, two numbers a matrix; and, where columns are sharded, of the squares of each row, a number a row. These
are added in another order than in one process, so results are the same to fp32's rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout import flattens
from ..stages.second_moment import FORMS, shape_of
from .placement import dim_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def create(form: str, p: DTensor, flatten: bool | None) -> DTensor:
    """Return V of a DTensor that has not been stepped: zeros in fp32, sharded along rows as the parameter is."""
    if form == "element":
        return cast("DTensor", torch.zeros_like(p, dtype=torch.float32))
    module = sys.modules["torch.distributed.tensor"]  # p is from it
    last, shape = p.ndim - 1, shape_of(form, p.shape, flatten, None)
    rows_cut = [
        module.Replicate() if placement.is_replicate() or dim_of(placement, p.shape) == last else placement
        for placement in p.placements
    ]
    own = torch.zeros(shape_of(form, p._local_tensor.shape, flatten, None), device=p.device, dtype=torch.float32)
    stride = torch.empty(shape, device="meta").stride()
    made: DTensor = module.DTensor.from_local(own, p.device_mesh, rows_cut, run_check=False, shape=shape, stride=stride)
    return made


def views(form: str, V: Tensor, flatten: bool | None) -> list[Tensor | None]:
    """Return V of every matrix of this rank's shard, (rows, cols) for "element" or (rows, 1) for "neuron"."""
    if form == "element" and flattens(V.shape, flatten):
        V = V.view(1, V.shape[0], -1)
    return list(V.view(-1, *V.shape[-2:]).unbind())


_TINY = torch.finfo(torch.float32).tiny


def normalize(
    form: str,
    X: Tensor,
    moments: Sequence[Tensor],
    beta2: float,
    *,
    rows: int,
    at: tuple[int, int],
    width: int,
    whole_rows: bool,
    group: dist.ProcessGroup | None,
) -> list[float]:
    """Update V and divide by it, in place; every rank of the group has to, one that has no part as well.

    Args:
        form: of `FORMS`.
        X: (batch, m, n), this rank's parts of updates, as the parameters have them, not transposed; written.
        moments: fp32, of every matrix, (m, n) for "element" and (m, 1) for "neuron"; written. None where this rank has
            no part.
        beta2: β₂.
        rows: of the whole matrix.
        at: (first, last + 1) of the rows of X in it.
        width: columns of the whole matrix.
        whole_rows: whether ranks that have any of a row have all of it.
        group: the ranks that have the other parts; None if nobody has.

    Returns:
        One number a matrix, by which X is still to be multiplied.
    """
    batch, eps = len(X), FORMS[form].eps
    sums = torch.zeros(2, batch, dtype=torch.float32, device=X.device)
    if form == "neuron":
        squares = X.float().square_().sum(-1)
        complete = squares
        if not whole_rows and group is not None:
            of_all = squares.new_zeros(batch, rows)
            of_all[:, at[0] : at[1]] = squares
            dist.all_reduce(of_all, group=group)
            complete = of_all[:, at[0] : at[1]]
        factors = torch.empty_like(squares)
        for V, square, factor in zip(moments, complete, factors, strict=bool(moments)):
            V[:, 0].lerp_(square / width, 1 - beta2)
            torch.sqrt(V[:, 0], out=factor).add_(eps).reciprocal_()
        sums[0], sums[1] = squares.sum(1), (squares * factors * factors).sum(1)
        X.copy_(X.float().mul_(factors[:, :, None]))
    else:
        for i, V in enumerate(moments):
            U = X[i].float()
            square = U * U
            sums[0, i] = square.sum()
            V.lerp_(square, 1 - beta2)
            U.div_(torch.sqrt(V, out=square).add_(eps))
            sums[1, i] = U.square().sum()
            X[i].copy_(U)
    if group is not None:
        dist.all_reduce(sums, group=group)
    before, after = sums
    kept: list[float] = before.div_(after.clamp_(min=_TINY)).sqrt_().tolist()
    return kept
