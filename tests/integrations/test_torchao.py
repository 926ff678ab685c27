"""torchao's eight-bit AdamW beside Muon, and layers that torchao changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import MUON, assert_same, parameters, through_disk
from torch import nn
from torch.optim import Optimizer

from muon_kernels import Muon, param_groups

torchao = pytest.importorskip("torchao")
optim = pytest.importorskip("torchao.optim")


@pytest.fixture(autouse=True)
def _as_written() -> Iterator[None]:
    """torchao compiles its step for a minute; uncompiled it is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def build(eight_bits: bool, seed: int = 0) -> tuple[nn.Module, list[Optimizer]]:
    """An embedding large enough for torchao to keep its moments in eight bits, and two matrices."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(256, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    hidden, rest = param_groups(model)
    adamw = optim.AdamW8bit if eight_bits else torch.optim.AdamW
    return model, [Muon(hidden["params"], **MUON), adamw(rest["params"], lr=3e-3)]


def advance(model: nn.Module, optimizers: list[Optimizer], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens, targets = torch.randint(256, (64,), generator=generator), torch.randn(64, 32, generator=generator)
        nn.functional.mse_loss(model(tokens), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_beside_adamw_in_eight_bits() -> None:
    """Resumed to the bit, and close to torch's AdamW in its place."""
    whole, optimizers = build(True)
    plain, theirs = build(False)
    start = parameters(whole)
    advance(whole, optimizers, range(2))
    advance(plain, theirs, range(2))
    for name, p in parameters(plain).items():
        assert (parameters(whole)[name] - p).norm() <= 0.1 * (p - start[name]).norm(), name
    moment = optimizers[1].state_dict()["state"][0]["exp_avg"]
    assert type(moment).__name__ == "OptimState8bit"

    model, again = build(True, seed=1)
    model.load_state_dict(whole.state_dict())
    for own, optimizer in zip(again, optimizers, strict=True):
        own.load_state_dict(through_disk(optimizer.state_dict()))
    advance(whole, optimizers, range(2, 4))
    advance(model, again, range(2, 4))
    assert_same(parameters(model), parameters(whole))


def test_layers_trained_for_quantization() -> None:
    """Fake-quantized linear layers have plain weights: Muon steps them."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model, _ = build(False)
    weight = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    quantize_(model, QATConfig(weight_config=weight, step="prepare"))
    hidden, rest = param_groups(model)
    assert {"1.weight", "3.weight"} <= set(hidden["param_names"])
    before = parameters(model)
    advance(model, [Muon(hidden["params"], **MUON), torch.optim.AdamW(rest["params"])], range(2))
    for name, p in parameters(model).items():
        assert torch.isfinite(p).all() and not torch.equal(p, before[name])
