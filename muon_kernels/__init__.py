"""Muon, fused: `Muon` is a drop-in for torch.optim.Muon, `orthogonalize` its Newton-Schulz iteration.

>>> import torch, muon_kernels
>>> Q = muon_kernels.orthogonalize(torch.eye(2, 4))
>>> Q.shape
torch.Size([2, 4])
"""

from . import spectra
from ._version import __version__
from .coefficients import COEFFICIENTS
from .optimizers.muon import Muon
from .optimizers.muon_adamw import MuonAdamW
from .optimizers.param_groups import param_groups
from .optimizers.spectral import SpectralAdam, SpectralMomentum, paper_optimizer
from .qk_clip import max_logits, qk_clip_
from .step.orthogonalize import orthogonalize, spectral_power
from .step.plan import Plan

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
