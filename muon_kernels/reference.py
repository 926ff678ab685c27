"""Muon in plain PyTorch, written to be read: the oracle that every backend is judged against.

The maths keeps its letters and the tensors keep their dtype, so the same lines that run in bfloat16
give the truth in float64. Nothing here is fast, and nothing here writes to its arguments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def newton_schulz(
    G: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    margin: float = 1.0,
    eps: float = 1e-7,
) -> Tensor:
    r"""Approximate the polar factor U Vᵀ of every matrix G = U diag(s) Vᵀ.

    With X = G / (margin · ‖G‖_F), for each (a, b, c) in turn::

        A = X Xᵀ,   B = b A + c A²,   X ← a X + B X

    so that each singular value goes through the polynomials p(x) = a x + b x³ + c x⁵ and U, V stay.
    The result is not exactly U Vᵀ but U S' Vᵀ, with S' as near 1 as the coefficients make it.

    Args:
        G: (..., m, n), any floating dtype; not written. Taller than wide is worked on transposed, which gives the same
            result for fewer products.
        coefficients: one (a, b, c) for each step.
        margin: keeps the largest singular value of X at 1 / margin or below.
        eps: stands in for the norm of a zero matrix, which so gives zero. It touches nothing else: the result does not
            depend on the scale of G.

    Returns:
        (..., m, n) in the dtype of G. NaN or Inf spoils the matrix that has it and no other.

    Source: https://kellerjordan.github.io/posts/muon/
    """
    # In float64 and before any rounding: squares cannot leave the range of a float32 or bfloat16 G,
    # and X is rounded once.
    norm = torch.linalg.vector_norm(G.double(), dim=(-2, -1), keepdim=True)
    X: Tensor = (G.double() / (norm.where(norm != 0, eps) * margin)).to(G.dtype)
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT
    for a, b, c in coefficients:
        A = X @ X.mT
        B = b * A + c * A @ A
        X = a * X + B @ X
    if tall:
        X = X.mT
    return X


def muon_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    coefficients: Sequence[tuple[float, float, float]],
    margin: float,
    eps: float,
    lr_ratio: float,
    dampened: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Return one Muon update of param W by grad g with momentum_buffer M, where μ = momentum::

        dampened:      M ← M + (1 - μ)(g - M)     D = g + μ (M - g)  if nesterov else  M
        not dampened:  M ← μ M + g                D = g + μ M        if nesterov else  M
        W ← (1 - lr · weight_decay) W - lr · lr_ratio · newton_schulz(D)

    Started from M = 0, both forms give the same W: their D differ by the factor 1 - μ only.

    Args:
        param, grad, momentum_buffer: (..., m, n) of one dtype; none is written.
        lr_ratio: the adjustment of lr to the shape. Weight decay uses lr without it.

    Returns:
        The new W and the new M.

    Source: dampened is torch.optim.Muon; not dampened is Moonlight, https://arxiv.org/abs/2502.16982
    """
    if dampened:
        buffer = momentum_buffer.lerp(grad, 1 - momentum)
        direction = grad.lerp(buffer, momentum) if nesterov else buffer
    else:
        buffer = momentum * momentum_buffer + grad
        direction = grad + momentum * buffer if nesterov else buffer
    update = newton_schulz(direction, coefficients, margin, eps)
    return param * (1 - lr * weight_decay) - lr * lr_ratio * update, buffer
