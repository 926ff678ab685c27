"""An optimizer for each parameter, stepped inside backward: the same bits as one optimizer after it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tiny import ADAMW, MUON, assert_same, build, loss_of, parameters, train
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers
from torch.optim import AdamW, Optimizer

from muon_kernels import Muon, MuonAdamW, param_groups


def step_in_backward(optimizers: Mapping[nn.Parameter, Optimizer]) -> None:
    """Step each parameter's optimizer when its gradient is there, and drop the gradient."""

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)


def test_hooks_after_accumulation() -> None:
    (model, _), (plain, own) = build("MuonAdamW"), build("MuonAdamW")
    hidden, rest = param_groups(model)
    optimizers: dict[nn.Parameter, Optimizer] = {
        **{p: Muon([p], **MUON) for p in hidden["params"]},
        **{p: AdamW([p], fused=True, **ADAMW) for p in rest["params"]},
    }

    step_in_backward(optimizers)
    for i in range(3):
        loss_of(model, i).backward()
        assert all(p.grad is None for p in model.parameters())
    train(plain, own, range(3))
    assert_same(parameters(model), parameters(plain))


def test_one_class_for_every_parameter() -> None:
    """MuonAdamW as the class: a group of one parameter that says itself which half steps it."""
    (model, _), (plain, own) = build("MuonAdamW"), build("MuonAdamW")
    groups = param_groups(model, muon_options=MUON, adamw_options=ADAMW)
    optimizers = {
        p: MuonAdamW([{k: v for k, v in group.items() if k != "param_names"} | {"params": [p]}])
        for group in groups
        for p in group["params"]
    }

    step_in_backward(optimizers)
    for i in range(3):
        loss_of(model, i).backward()
    train(plain, own, range(3))
    assert_same(parameters(model), parameters(plain))


def test_torchs_own_helper() -> None:
    (model, _), (plain, own) = build("Muon"), build("Muon")
    _apply_optimizer_in_backward(Muon, model.parameters(), MUON)
    for i in range(3):
        loss_of(model, i).backward()
    train(plain, own, range(3))
    assert_same(parameters(model), parameters(plain))
    optimizers = _get_in_backward_optimizers(model)
    assert len(optimizers) == len(list(model.parameters()))
    assert all(torch.is_tensor(o.state_dict()["state"][0]["momentum_buffer"]) for o in optimizers)
