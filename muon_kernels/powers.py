"""Powers of the spectrum: U Σ^p Vᵀ of a matrix G = U Σ Vᵀ, for any p in [0, 1].

p = 0 is Muon's polar factor, p = 1 the matrix itself. p = 1/2 and 1/4 are the partial powers of "Delving into Muon and
Beyond" (arXiv 2602.04669), which computes them by coupled fp32 iterations of 92 and 184 small products.

Here a power is a fixed sum of Newton-Schulz iterates. Each iterate X_i = U f_i(Σ) Vᵀ is near 1 above some singular
value and falls with slope 1 below it, an octave or two lower with every step. So on a logarithmic scale the f_i are
like the steps of a staircase, and Σ w_i f_i(σ) can follow any σ^p as far down as the last one reaches. One list of
triples serves every p: `fit` made it for p = 1/4 and 1/2 together, and `fit_weights` finds the weights for a p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .coefficients import Schedule, Triple

# The smallest σ that weights are fitted for, the largest being 1. Smaller ones come out too small, in proportion to
# themselves. `newton_schulz._measure` leaves the largest at m^-⅛ or above: 1e-3 of it is within reach up to m = 15,000.
LOWEST = 3e-4

# Found by `fit`, to five digits; other starts came to 3.5 % and more. Slopes are gentler than those of sets that only
# want the last iterate, and every iterate may come out 7 % too large: without room for that, where one singular value
# is a few times as large as the others, rounding explodes.
TRIPLES: tuple[Triple, ...] = (
    (3.68935, -8.17291, 4.76897),
    (2.28406, -2.17115, 0.86522),
    (3.50266, -7.62293, 4.64233),
    (3.74160, -8.62836, 5.32795),
    (3.71045, -8.38761, 4.97643),
    (3.41394, -6.73694, 3.86974),
    (2.82630, -4.43959, 2.40989),
)

# The iterates that are summed. In Gram form the second one is never computed.
ITERATES = (0, *range(2, len(TRIPLES) + 1))

# Device and dtype of fits, whatever torch's defaults are.
_ON_HOST: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def check_power(power: Any, name: str = "power") -> float:
    """Return `power` as a float; raise ValueError or TypeError unless it is a number in [0, 1]."""
    if isinstance(power, bool) or not isinstance(power, (int, float)):
        raise TypeError(f"{name} should be a number from 0 (orthogonal) to 1 (as it is) but is: {power!r}")
    if not 0 <= power <= 1:
        raise ValueError(f"{name} should be from 0 (orthogonal) to 1 (as it is) but is: {power!r}")
    return float(power)


def schedule_of(power: float) -> Schedule:
    """Return the schedule for a power strictly between 0 and 1."""
    return Schedule(TRIPLES, 1.0, "spectral", fit_weights(power), power)


def _iterates(triples: Tensor, sigma: Tensor) -> Tensor:
    """Return f_0 … f_k, columns, at every sigma, rows."""
    columns = [sigma]
    for a, b, c in triples:
        x = columns[-1]
        columns.append(x * (a + b * x**2 + c * x**4))
    return torch.stack(columns, 1)


def _grid(lowest: float, points: int = 400) -> Tensor:
    return torch.logspace(math.log10(lowest), 0, points, **_ON_HOST)


def _smallest_error(basis: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Return the weights that minimise the largest |basis @ weights - 1|, and basis @ weights - 1.

    Lawson's algorithm: least squares, repeated, each time with more regard for where the difference is large.
    """
    regard = torch.full_like(basis[:, 0], 1 / len(basis))
    best = worst = None
    for _ in range(rounds):
        root = regard.sqrt()
        weights = torch.linalg.lstsq(root[:, None] * basis, root[:, None]).solution[:, 0]
        error = basis @ weights - 1
        if worst is None or error.abs().max() < worst:
            best, worst = (weights, error), error.abs().max()
        regard = regard * error.abs()
        regard /= regard.sum()
    assert best is not None
    return best


@lru_cache
def fit_weights(
    power: float,
    triples: tuple[Triple, ...] = TRIPLES,
    iterates: tuple[int, ...] = ITERATES,
    lowest: float = LOWEST,
    rounds: int = 200,
) -> tuple[float, ...]:
    """Return the weights of the iterates that minimise the largest relative error of Σ w_i f_i(σ) against σ^power.

    Args:
        power: in [0, 1].
        triples: of the steps.
        iterates: indices of the iterates that may have a weight.
        lowest: the smallest σ; the largest is 1.
        rounds: number of least-squares fits.

    Returns:
        One weight for the normalised matrix and one for each step.
    """
    sigma = _grid(lowest)
    basis = _iterates(torch.tensor(triples, **_ON_HOST), sigma) / sigma[:, None] ** power
    weights = basis.new_zeros(basis.shape[1])
    weights[list(iterates)] = _smallest_error(basis[:, iterates], rounds)[0]
    return tuple(weights.tolist())


class Error(NamedTuple):
    """Relative errors of singular values, on a logarithmic scale."""

    worst: float
    rms: float


def error(of: Schedule, lowest: float = 1e-3, largest: float = 1.0, points: int = 4000) -> Error:
    """Return the errors of a schedule's sum against σ^p for σ in [lowest, 1]·largest, in exact arithmetic."""
    sigma = _grid(lowest, points) * largest
    values = _iterates(torch.tensor(of.triples, **_ON_HOST), sigma)
    off = values @ torch.tensor(of.weights, **_ON_HOST) / sigma**of.power - 1
    return Error(off.abs().max().item(), off.square().mean().sqrt().item())


def _svd_power(G: Tensor, power: float) -> Tensor:
    if G.numel() == 0:
        return G.clone()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    # A tolerance tells singular values that are zero from rounding errors, since 0^0 would be 1.
    there = S > S[..., :1] * max(G.shape[-2:]) * torch.finfo(G.dtype).eps
    result: Tensor = (U * S.pow(power).where(there, 0.0)[..., None, :]) @ Vh
    return result


def _coupled_power(G: Tensor, power: float) -> Tensor:
    if power == 0.25:
        return _coupled_power(_coupled_power(G, 0.5), 0.5)
    if power != 0.5:
        raise ValueError(f'exact="coupled" is for p = 1/2 and 1/4 but p is: {power}; exact="svd" is for any')
    if G.shape[-2] > G.shape[-1]:
        return _coupled_power(G.mT, power).mT
    # (G Gᵀ)^-¼ is the square root of (G Gᵀ)^-½. The other halves of both coupled iterations are not needed.
    norm = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
    X = G / norm.masked_fill(norm == 0, 1.0)
    inverse_root = _coupled(X @ X.mT, inverse=True)
    size = torch.linalg.vector_norm(inverse_root, dim=(-2, -1), keepdim=True)
    size = size.masked_fill(size == 0, 1.0)
    root: Tensor = _coupled(inverse_root / size, inverse=False) * (size * norm).sqrt()
    result: Tensor = root @ X
    return result


def _coupled(A: Tensor, inverse: bool, steps: int = 40) -> Tensor:
    """Return A^½, or A^-½, of symmetric positive definite matrices of norm at most 1, by coupled Newton-Schulz.

    T = (3 I - Z Y) / 2, Y ← Y T, Z ← T Z from Y = A and Z = I, where Y → A^½ and Z → A^-½. Left out are the first Z Y
    and T Z, which are trivial, and the last product of the half that is not returned.
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    # A rounding error must not become an eigenvalue of its own.
    Y = A + eye * torch.finfo(A.dtype).eps * 4
    T = (3 * eye - Y) / 2
    Y, Z = Y @ T, T
    for step in range(1, steps):
        T = (3 * eye - Z @ Y) / 2
        last = step + 1 == steps
        if not (last and inverse):
            Y = Y @ T
            Y = (Y + Y.mT) / 2
        if not last or inverse:
            Z = T @ Z
            Z = (Z + Z.mT) / 2
    return Z if inverse else Y


# References, slow, in the dtype of the matrices: (G, p) -> U Σ^p Vᵀ.
EXACT: dict[str, Callable[[Tensor, float], Tensor]] = {"svd": _svd_power, "coupled": _coupled_power}


def fit(
    powers: Sequence[float] = (0.25, 0.5),
    steps: int = 7,
    iterates: Sequence[int] = ITERATES,
    lowest: float = LOWEST,
    *,
    starts: int = 100,
    seed: int = 1,
) -> tuple[tuple[Triple, ...], float]:
    """Return triples whose iterates, with the best weights for each power, come nearest to all of `powers`.

    Levenberg-Marquardt on triples and weights together, from several starts, with growing regard for where the error is
    large. Each step maps everything up to 1.08 to 1 or less, so that it forgives what rounding has made larger.

    Args:
        powers: in (0, 1).
        steps: number of triples.
        iterates: indices of the iterates that are summed, from 0 to `steps`.
        lowest: the smallest σ.
        starts: number of starts.
        seed: of the starts' noise.

    Returns:
        The triples, and the largest relative error of any power.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    begin = torch.tensor([_FIRST, *[_NEXT] * (steps - 2), _LAST], **_ON_HOST)
    best, worst = begin, math.inf
    for start in range(starts):
        spread, around = ((0.02, best) if start % 2 else (0.1, begin)) if start else (0.0, begin)
        noise = torch.randn(steps, 3, generator=generator, **_ON_HOST)
        try:
            triples, largest = _improved(around * (1 + spread * noise), powers, list(iterates), lowest)
        except OverflowError:
            continue
        if largest < worst:
            best, worst = triples, largest
    return tuple((a, b, c) for a, b, c in best.tolist()), worst


# First guess of `fit`: steps that multiply small singular values by less than four.
_FIRST, _NEXT, _LAST = (3.6, -7.7, 4.4), (3.5, -7.2, 4.1), (2.6, -3.4, 1.7)


def _excess(triples: Tensor, x: Tensor) -> Tensor:
    """Return by how much the image of each x exceeds 1, for every step."""
    a, b, c = triples.mT[:, :, None]
    return torch.relu((x * (a + b * x**2 + c * x**4)).abs() - 1).flatten()


def _improved(
    triples: Tensor, powers: Sequence[float], iterates: list[int], lowest: float, rounds: int = 150
) -> tuple[Tensor, float]:
    """Return the triples after `rounds` of Levenberg-Marquardt, and their largest error."""
    steps = len(triples)
    sigma, beyond = _grid(lowest, 240), torch.linspace(0.02, 1.08, 70, **_ON_HOST)
    wanted = torch.stack([sigma**p for p in powers], 1)

    def residuals(unknown: Tensor, regard: Tensor) -> Tensor:
        triples, weights = unknown[: 3 * steps].view(steps, 3), unknown[3 * steps :].view(len(iterates), -1)
        off = _iterates(triples, sigma)[:, iterates] @ weights / wanted - 1
        return torch.cat([(regard.sqrt() * off).flatten(), 0.3 * _excess(triples, beyond), 2e-4 * weights.flatten()])

    basis = _iterates(triples, sigma)[:, iterates]
    if not basis.isfinite().all():
        raise OverflowError("iterates of these triples explode")
    columns = [_smallest_error(basis / y[:, None], 1)[0] for y in wanted.T]
    unknown = torch.cat([triples.flatten(), torch.stack(columns, 1).flatten()])
    regard = torch.full_like(wanted, 1 / wanted.numel())
    jacobian, damping = torch.func.jacfwd(residuals), 1e-3
    best, worst = unknown, math.inf
    for number in range(rounds):
        at = residuals(unknown, regard)
        off = (at[: wanted.numel()].view_as(wanted) / regard.sqrt()).abs()
        forgives = _excess(unknown[: 3 * steps].view(steps, 3), beyond).max() < 0.008
        if forgives and off.max() < worst:
            best, worst = unknown, off.max().item()
        J = jacobian(unknown, regard)
        H, gradient = J.T @ J, J.T @ at
        for _ in range(8):
            tried = unknown - torch.linalg.solve(H + damping * torch.diag(H.diagonal() + 1e-12), gradient)
            if residuals(tried, regard).square().sum() < at.square().sum():
                unknown, damping = tried, max(damping / 3, 1e-9)
                break
            damping = min(damping * 4, 1e6)
        else:
            damping = 1e-2
        if number >= 40 and number % 5 == 0:
            regard = regard * (off / off.mean() + 0.05)
            regard /= regard.sum()
    return best[: 3 * steps].view(steps, 3), worst
