"""timm: its groups with a rate for each layer, its schedulers and its scaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ADAMW, MUON, assert_near, assert_same, parameters, through_disk
from torch import nn
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, param_groups

timm = pytest.importorskip("timm")
optim, scheduler = pytest.importorskip("timm.optim"), pytest.importorskip("timm.scheduler")


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)


def advance(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images, classes = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), classes).backward()
        optimizer.step()


def layerwise(model: nn.Module) -> MuonAdamW:
    """timm's groups, each cut in two: what Muon takes of it, and what AdamW takes."""
    hidden = set(param_groups(model)[0]["params"])
    groups = []
    for group in optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5):
        for use_muon in (True, False):
            params = [p for p in group["params"] if (p in hidden) is use_muon]
            if params:
                groups.append({**group, "params": params, "use_muon": use_muon})
    return MuonAdamW(groups, muon_options={"lr": MUON["lr"]}, adamw_options={"lr": ADAMW["lr"]})


def test_layer_decay_under_a_schedule() -> None:
    """timm's schedulers multiply each rate by `lr_scale`; resumed to the bit."""

    def begin(seed: int) -> tuple[nn.Module, MuonAdamW, Any]:
        model = vit(seed)
        optimizer = layerwise(model)
        return model, optimizer, scheduler.CosineLRScheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-5)

    model, optimizer, schedule = begin(0)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 4  # embedding, two blocks, head
    for step in range(3):
        advance(model, optimizer, range(step, step + 1))
        schedule.step(step + 1)
        for group in optimizer.param_groups:
            peak = MUON["lr"] if group["use_muon"] else ADAMW["lr"]
            plain = schedule._get_lr(step + 1)[optimizer.param_groups.index(group)]
            assert group["lr"] == plain * group["lr_scale"] and plain <= peak
    weights, saved = parameters(model), through_disk(optimizer.state_dict())
    advance(model, optimizer, range(3, 5))

    again, own, _ = begin(1)
    again.load_state_dict(weights)
    own.load_state_dict(saved)
    advance(again, own, range(3, 5))
    assert_same(parameters(again), parameters(model))
    assert_same(own.state_dict(), optimizer.state_dict())


def test_groups_of_layers_are_those_of_torchs_muon() -> None:
    """The matrices of the blocks alone: the same rates, and with them a step that is torch's Muon's."""
    models, rates = [], []
    for optimizer_class in (Muon, torch.optim.Muon):
        model = vit()
        for p in model.parameters():
            p.requires_grad_(p.ndim == 2)
        groups = optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
        optimizer = optimizer_class(groups, lr=0.02)
        schedule = scheduler.StepLRScheduler(optimizer, decay_t=1, decay_rate=0.5)
        schedule.step(1)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():  # a classifier's gradients have a rank so low that rounding shows
            p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        optimizer.step()
        models.append(model)
        rates.append([(group["lr"], group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups])
    assert rates[0] == rates[1] and len(set(rates[0])) > 2
    assert_near(*models, vit(), most=0.05)


def test_create_optimizer_v2() -> None:
    """timm makes ours, from its registry and with groups of its own, as it makes torch's."""
    from timm.optim._optim_factory import OptimInfo, default_registry

    model = vit()
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    default_registry.register(OptimInfo(name="ours", opt_class=Muon, has_betas=False, has_momentum=True))
    optimizer = optim.create_optimizer_v2(model, "ours", lr=0.02, weight_decay=0.05, momentum=0.9, layer_decay=0.5)
    assert type(optimizer) is Muon
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert {group["lr_scale"] for group in optimizer.param_groups} >= {0.5, 1.0}
    advance(model, optimizer, range(2))


@pytest.mark.parametrize("clip", [None, 0.05])
def test_native_scaler(clip: float | None) -> None:
    """NativeScaler on a CPU scales by 1: clipped steps are those by hand."""
    from timm.utils import NativeScaler

    model, plain = vit(), vit()
    optimizer, own = layerwise(model), layerwise(plain)
    scaler = NativeScaler(device="cpu")
    for step in range(2):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        classes = torch.arange(8) % 4
        optimizer.zero_grad()
        scaler(nn.functional.cross_entropy(model(images), classes), optimizer, clip, parameters=model.parameters())
        own.zero_grad()
        nn.functional.cross_entropy(plain(images), classes).backward()
        if clip:
            nn.utils.clip_grad_norm_(plain.parameters(), clip)
        own.step()
    for name, p in parameters(plain).items():
        torch.testing.assert_close(parameters(model)[name], p, rtol=1e-4, atol=1e-5)
