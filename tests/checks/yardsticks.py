"""torch.optim.Muon at fp32's speed."""

import pytest
from torch import Tensor

from muon_kernels.checks.yardsticks import bf16_loop
from muon_kernels.coefficients import Schedule


@pytest.fixture
def torchs_muon_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon runs `bf16_loop` in the place of its own."""
    from torch.optim import _muon

    def loop(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
        return bf16_loop(grad, Schedule((coefficients,) * steps, 1.0, "torch's"))

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", loop)
