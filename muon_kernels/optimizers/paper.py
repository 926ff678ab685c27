"""The eight optimizers of "Delving into Muon and Beyond" (arXiv 2602.04669) by their names."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .spectral import SpectralAdam, SpectralMomentum

# (class, power) by the paper's names.
PAPER: dict[str, tuple[type[Optimizer], float]] = {
    "msgd": (SpectralMomentum, 1.0),
    "msgd_s": (SpectralMomentum, 0.5),
    "msgd_q": (SpectralMomentum, 0.25),
    "msgd_z": (SpectralMomentum, 0.0),
    "adam": (SpectralAdam, 1.0),
    "adam_s": (SpectralAdam, 0.5),
    "adam_q": (SpectralAdam, 0.25),
    "adam_z": (SpectralAdam, 0.0),
}


def paper_optimizer(name: str, params: ParamsT, lr: float | Tensor, **options: Any) -> Optimizer:
    """Return one of the eight optimizers of arXiv 2602.04669 by its name, with its settings.

    Args:
        name: "msgd", "msgd_s", "msgd_q", "msgd_z", "adam", "adam_s", "adam_q" or "adam_z".
        params: of `SpectralMomentum` or `SpectralAdam`; the former's should be matrices, and the paper gives others to
            AdamW.
        lr: learning rate.
        options: other keywords of the two classes.

    Returns:
        The optimizer, a `SpectralMomentum` or a `SpectralAdam`.

    Raises:
        ValueError: an unknown name, or what the optimizer raises.
    """
    if name not in PAPER:
        raise ValueError(f"name should be one of {', '.join(map(repr, PAPER))} but is: {name!r}")
    kind, power = PAPER[name]
    return kind(params, lr=lr, power=power, **options)  # type: ignore[call-arg]
