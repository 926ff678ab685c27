"""Measurements beside the trainings: how large updates are, and how exact powers of the spectrum are."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from configs import Config, Result
from torch import Tensor
from training import Training, digest

import muon_kernels
from muon_kernels import spectra

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from papers_power import papers_power


@dataclass(frozen=True)
class UpdateRms:
    """RMS of an update of lr 1 by `Muon` with "match_rms_adamw", for a matrix of independent normal numbers.

    Args:
        coefficients: name of the set.
        exact: the option exact_rms.
        shape: rows and columns.
        seed: seed of the numbers.
    """

    coefficients: str
    exact: bool
    shape: tuple[int, int]
    seed: int
    cost = 1.0

    def run(self, device: str) -> Result:
        """Step once; return the config and `rms`."""
        generator = torch.Generator().manual_seed(self.seed)
        p = torch.nn.Parameter(torch.zeros(self.shape, device=device))
        p.grad = torch.randn(self.shape, generator=generator).to(device)
        options: dict[str, Any] = {"ns_coefficients": self.coefficients, "exact_rms": self.exact}
        muon_kernels.Muon([p], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **options).step()
        return {"config": asdict(self), "rms": spectra.rms(p).item()}

    def __str__(self) -> str:
        """Name the measurement in a line."""
        return f"update RMS of {self.coefficients}{', exact' if self.exact else ''}, {self.shape}, seed {self.seed}"


@dataclass(frozen=True)
class Accuracy:
    """Errors of ours and of the authors' powers of what an optimizer transforms, beside float64 SVD.

    Args:
        start: training that the matrices are of: of "msgd" their momenta; of "adam" its updates, m̂ / (√v̂ + eps).
        step: number of steps before they are looked at.
        power: 0.5 or 0.25.
    """

    start: Config
    step: int
    power: float

    @property
    def cost(self) -> float:
        """That of the part of the training; see `Config.cost`."""
        return self.start.cost * self.step / self.start.steps

    def run(self, device: str) -> Result:
        """Train and compare.

        Returns:
            config; `texts` as `training.train`; `errors`, a list of name, error of ours, error of the authors', each
            relative in the Frobenius norm, and `share_below`, the share of singular values below a thousandth of the
            largest.
        """
        going = Training(self.start, device)
        for step in going.steps():
            if step == self.step:
                break
        else:
            raise ValueError(f"step should be at most {self.start.steps}, and the training finite, but is: {self.step}")
        errors = []
        for name, parameter in going.model.named_parameters():
            if parameter.ndim < 2 or not name.startswith("layers."):
                continue
            parts = 3 if "qkv" in name else 1
            for number, G in enumerate(transformed(going, parameter, self.step).chunk(parts)):
                exact = muon_kernels.spectral_power(G.double(), self.power, exact="svd")
                found = (muon_kernels.spectral_power(G, self.power), papers_power(G, self.power))
                relative = [((x.double() - exact).norm() / exact.norm()).item() for x in found]
                sigma = torch.linalg.svdvals(G.double())
                below = (sigma < 1e-3 * sigma[0]).double().mean().item()
                errors.append([f"{name}{f' {number}' if parts > 1 else ''}", *relative, below])
        return {"config": asdict(self), "texts": {self.start.text: digest(self.start.text)}, "errors": errors}

    def __str__(self) -> str:
        """Name the measurement in a line."""
        return f"accuracy of p = {self.power:g}, {self.start.optimizer}, step {self.step}, seed {self.start.seed}"


def transformed(going: Training, parameter: Tensor, steps: int) -> Tensor:
    """Return what the optimizer takes the power of, after so many steps."""
    state = going.optimizers[0].state[parameter]
    if "exp_avg" not in state:
        momentum: Tensor = state["momentum_buffer"]
        return momentum.float()
    first, second = going.optimizers[0].param_groups[0]["betas"]
    mean, square = state["exp_avg"] / (1 - first**steps), state["exp_avg_sq"] / (1 - second**steps)
    return (mean / (square.sqrt() + going.optimizers[0].param_groups[0]["eps"])).float()
