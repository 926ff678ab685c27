"""Models of the trainings: the demo's byte-level GPT, a mixture of experts for it, and what is read off them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from configs import Config, heads
from torch import Tensor, nn
from torch.nn import functional as F

import muon_kernels
from muon_kernels import spectra
from muon_kernels.cli import demo


class Mixture(nn.Module):
    """Mixture of experts: a shared one, and for each byte the two routed ones that the router scores highest.

    For a byte it computes as much as the demo's MLP of the same width, not counting the router and unused results:
    every routed expert sees every byte, which is faster at this size.

    Attributes:
        chosen: how often each expert was chosen while `loads` counts, else None.
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.shared_up = nn.Linear(width, 2 * width, bias=False)
        self.shared_down = nn.Linear(2 * width, width, bias=False)
        self.up = nn.Parameter(torch.empty(experts, width, width).uniform_(-1, 1) / width**0.5)  # (expert, out, in)
        self.down = nn.Parameter(torch.empty(experts, width, width).uniform_(-1, 1) / width**0.5)
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        bytes_ = x.flatten(0, -2)
        chosen = self.router(bytes_).topk(2)
        if self.chosen is not None:
            self.chosen += torch.bincount(chosen.indices.flatten(), minlength=len(self.up))
        gates = torch.zeros(len(bytes_), len(self.up), dtype=x.dtype, device=x.device)
        gates = gates.scatter(1, chosen.indices, chosen.values.softmax(-1))
        routed = F.gelu(bytes_ @ self.up.mT) @ self.down.mT  # (expert, byte, width)
        shared = self.shared_down(F.gelu(self.shared_up(bytes_)))
        return (shared + torch.einsum("be,ebw->bw", gates, routed)).view_as(x)


def model(config: Config) -> demo.GPT:
    """Make a new model, on the CPU, so that it is the same on every device."""
    torch.manual_seed(config.seed)
    mlp = (lambda width: Mixture(width, config.experts)) if config.experts else demo.MLP
    of = demo.GPT(config.width, config.layers, heads(config.width), config.context, mlp)
    return of.to(getattr(torch, config.dtype))


def loads(of: nn.Module, evaluate: Callable[[], object]) -> list[list[float]]:
    """Measure the share of choices that goes to each expert while `evaluate` runs; a list for each layer."""
    mixtures = [module for module in of.modules() if isinstance(module, Mixture)]
    for mixture in mixtures:
        mixture.chosen = torch.zeros(len(mixture.up), dtype=torch.long, device=mixture.up.device)
    evaluate()
    shares = []
    for mixture in mixtures:
        assert mixture.chosen is not None
        shares.append((mixture.chosen / mixture.chosen.sum()).tolist())
        mixture.chosen = None
    return shares


def weight_rms(of: demo.GPT) -> float:
    """Return the mean RMS of the layers' matrices."""
    matrices = [p for p in of.layers.parameters() if p.ndim >= 2]
    return sum(spectra.rms(p).mean().item() for p in matrices) / len(matrices)


class Output:
    """Reader of what the last layer puts out, in the pass that comes after `listen`."""

    def __init__(self, of: demo.GPT) -> None:
        self._listening = False
        self.rms = float("nan")
        of.layers.register_forward_hook(self._hear)

    def listen(self) -> None:
        """Ask for the next pass."""
        self._listening = True

    def _hear(self, _: nn.Module, __: object, x: Tensor) -> None:
        if self._listening:
            self.rms = x.detach().double().square().mean().sqrt().item()
            self._listening = False


class Logits:
    """Recorder of the largest attention logit of each head in the last forward pass, and QK-Clip by them."""

    def __init__(self, of: demo.GPT) -> None:
        self._seen: dict[demo.Block, Tensor] = {}
        for block in of.layers:
            assert isinstance(block, demo.Block)
            block.qkv.register_forward_hook(partial(self._look, block))

    def _look(self, block: demo.Block, _: nn.Module, __: object, qkv: Tensor) -> None:
        q, k, _v = qkv.unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        self._seen[block] = muon_kernels.max_logits(q, k, causal=True)

    def largest(self) -> float:
        """Return the largest logit of all heads and layers."""
        return max(logits.max().item() for logits in self._seen.values())

    def clip(self, tau: float) -> None:
        """Clip the weights of queries and keys. Call it after the step that the forward pass was for."""
        for block, logits in self._seen.items():
            weight, width = block.qkv.weight, block.qkv.in_features
            muon_kernels.qk_clip_(weight[:width], weight[width : 2 * width], logits, tau)
