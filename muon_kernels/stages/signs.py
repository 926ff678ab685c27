"""Signs of directions in place of the directions."""

from __future__ import annotations

import torch
from torch import Tensor

from .stage import Stage
from .sums import floats_of_block, in_cache, padded, sums_of_squares


class Signs(Stage):
    """Stage of `sign_momentum`: the iteration begins with the signs of the directions."""

    option = "sign_momentum"
    note = "sign_momentum=True goes over a direction twice more, and no step with it is fused"
    launches = 2
    visits = 3

    def floats(self, m: int, n: int, device: torch.device) -> int:
        """Return the fp32 scratch for a matrix; see `Stage.floats`."""
        return padded(3 + in_cache(device) * floats_of_block(m, n, device))

    def before(
        self, X: Tensor, scale: Tensor | None, margin: float, norms: Tensor | None, scratch: Tensor
    ) -> Tensor | None:
        """Replace the directions in X by their signs; see `Stage.before`."""
        return take_signs(X, scale, margin, norms, scratch)


def take_signs(X: Tensor, scale: Tensor | None, margin: float, norms: Tensor | None, scratch: Tensor) -> Tensor:
    """Replace a stack by its signs; the sign of zero is zero.

    Args:
        X: (batch, m, n), the directions; written.
        scale: (batch,) fp32, as `Backend.momentum_update` returned it: NaN for a matrix that is not finite. Written.
            None for a backend that returned none, where such a matrix is itself not finite.
        margin: of the coefficient set.
        norms: (batch,) fp32, written: the Frobenius norms of the signs, at least 1; None if nobody asks.
        scratch: see `normalize`.

    Returns:
        (batch,) fp32: the factors that bring the norms to 1/margin, NaN where the matrix was not finite.
    """
    block, *own = torch.split(scratch, [scratch.numel() - 3 * len(X)] + [len(X)] * 3)
    sums, partial, found = (x.view(-1, 1, 1) for x in own)
    if scale is None:
        sums_of_squares(X, (-2, -1), found, partial, block)
        scale = found.view(-1)
    X.sign_()
    sums_of_squares(X, (-2, -1), sums, partial, block)
    norm = sums.view(-1).sqrt_().clamp_(min=1.0)
    if norms is not None:
        norms.copy_(norm)
    return scale.mul_(0.0).add_(1 / margin).div_(norm)
