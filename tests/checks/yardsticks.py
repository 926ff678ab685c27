"""torch's own loop, which tests measure errors by, at fp32's speed.

torch rounds to bf16 what it multiplies in bf16, with sums in fp32. Products in fp32 of the same operands, rounded
afterwards, are these numbers up to the order of the sums, and take a hundredth of the time where a processor has no
instructions for bf16.
"""

import pytest
import torch
from torch import Tensor

from muon_kernels.coefficients import Schedule


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def bf16_loop(G: Tensor, schedule: Schedule, norm_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """torch.optim.Muon's loop on (..., m, n), with coefficients that may differ by step."""
    X = G.bfloat16()
    X = X.mT if G.shape[-2] > G.shape[-1] else X
    norm = X.to(norm_dtype).norm(dim=(-2, -1), keepdim=True)
    X = _rounded(X / (norm * schedule.margin).clamp(min=1e-7))
    for a, b, c in schedule.triples:
        A = _rounded(X @ X.mT)
        B = _rounded(b * A + c * (A @ A))
        X = _rounded(a * X + B @ X)
    return (X.mT if G.shape[-2] > G.shape[-1] else X).bfloat16()


@pytest.fixture
def torchs_muon_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon runs `bf16_loop` in the place of its own."""
    from torch.optim import _muon

    def loop(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
        return bf16_loop(grad, Schedule((coefficients,) * steps, 1.0, "torch's"))

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", loop)
