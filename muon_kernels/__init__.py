"""Muon, fused: `Muon` is a drop-in for torch.optim.Muon, `orthogonalize` its Newton-Schulz iteration.

>>> import torch, muon_kernels
>>> Q = muon_kernels.orthogonalize(torch.eye(2, 4))
>>> Q.shape
torch.Size([2, 4])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .coefficients import COEFFICIENTS
from .optimizers.muon import Muon
from .step.orthogonalize import orthogonalize, spectral_power
from .step.plan import Plan

if TYPE_CHECKING:
    from . import spectra
    from .optimizers.muon_adamw import MuonAdamW
    from .optimizers.paper import paper_optimizer
    from .optimizers.param_groups import param_groups
    from .optimizers.spectral import SpectralAdam, SpectralMomentum
    from .qk_clip import max_logits, qk_clip_

__all__ = [
    "COEFFICIENTS",
    "Muon",
    "MuonAdamW",
    "Plan",
    "SpectralAdam",
    "SpectralMomentum",
    "__version__",
    "max_logits",
    "orthogonalize",
    "paper_optimizer",
    "param_groups",
    "qk_clip_",
    "spectra",
    "spectral_power",
]

_MODULES = {
    "MuonAdamW": "optimizers.muon_adamw",
    "SpectralAdam": "optimizers.spectral",
    "SpectralMomentum": "optimizers.spectral",
    "max_logits": "qk_clip",
    "paper_optimizer": "optimizers.paper",
    "param_groups": "optimizers.param_groups",
    "qk_clip_": "qk_clip",
    "spectra": "spectra",
}


def __getattr__(name: str) -> Any:
    """Import what most programs do not use when they ask for it, so that `import muon_kernels` stays quick."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_MODULES[name]}", __name__)
    value = module if name == "spectra" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
