"""Muon, fused: `Muon` is a drop-in for torch.optim.Muon, `orthogonalize` its Newton-Schulz iteration.

>>> import torch, muon_kernels
>>> Q = muon_kernels.orthogonalize(torch.eye(2, 4))
>>> Q.shape
torch.Size([2, 4])
"""

from . import spectra
from ._version import __version__
from .coefficients import COEFFICIENTS
from .functional import orthogonalize, spectral_power
from .muon_adamw import MuonAdamW
from .optimizer import Muon
from .param_groups import param_groups
from .plan import Plan
from .qk_clip import max_logits, qk_clip_
from .spectral_optimizers import SpectralAdam, SpectralMomentum, paper_optimizer

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
