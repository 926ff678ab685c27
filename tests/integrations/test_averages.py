"""Averages of weights beside these optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    CASES,
    assert_near,
    assert_same,
    assert_same_training,
    build,
    loss_of,
    matrices,
    parameters,
    through_disk,
    train,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from muon_kernels import Muon


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["SWA", "EMA"])
@pytest.mark.parametrize("case", CASES)
def test_averaged_model(case: str, average: Any) -> None:
    """Training is the same beside an average, and that is of the weights that each step left."""
    model, optimizer = build(case)
    averaged = AveragedModel(model, multi_avg_fn=average)
    expected = {}
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        averaged.update_parameters(model)
        now = parameters(model)
        rate = 0.5 if average else 1 / (step + 1)
        expected = {n: p.lerp(now[n], rate) for n, p in expected.items()} if expected else now
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])

    alone, own = build(case)
    train(alone, own, range(4))
    assert_same_training(model, optimizer, alone, own)


@pytest.mark.parametrize("case", CASES)
def test_a_whole_swa_run(case: str) -> None:
    model, optimizer = build(case)
    averaged, scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        averaged.update_parameters(model)
        scheduler.step()
    update_bn([torch.zeros(1)], averaged)
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)
    assert torch.isfinite(loss_of(averaged, 0))


def test_model_ema_of_timm() -> None:
    ModelEmaV3 = pytest.importorskip("timm.utils").ModelEmaV3
    (model, optimizer), (theirs, their_optimizer) = matrices(Muon), matrices(torch.optim.Muon)
    emas = ModelEmaV3(model, decay=0.5), ModelEmaV3(theirs, decay=0.5)
    for step in range(4):
        for ema, m, o in zip(emas, (model, theirs), (optimizer, their_optimizer), strict=True):
            train(m, o, range(step, step + 1))
            ema.update(m)
    assert_near(emas[0].module, emas[1].module, matrices(Muon)[0])


@pytest.mark.parametrize("case", CASES)
def test_lookahead_of_timm(case: str) -> None:
    """It writes its keys into our groups and its slow weights into our state, and resumes from them to the bit."""
    Lookahead = pytest.importorskip("timm.optim").Lookahead
    whole, inner = build(case)
    optimizer = Lookahead(inner, k=2)
    train(whole, optimizer, range(3))
    weights, saved = parameters(whole), through_disk(optimizer.state_dict())
    model, inner2 = build(case, seed=1)
    again = Lookahead(inner2, k=2)
    model.load_state_dict(weights)
    again.load_state_dict(saved)
    train(whole, optimizer, range(3, 6))
    train(model, again, range(3, 6))
    assert_same(parameters(model), parameters(whole))
    assert again.param_groups[0]["lookahead_step"] == 6


def test_lookahead_is_that_over_torchs_muon() -> None:
    Lookahead = pytest.importorskip("timm.optim").Lookahead
    (model, ours), (theirs, their_optimizer) = matrices(Muon), matrices(torch.optim.Muon)
    train(model, Lookahead(ours, k=2), range(4))
    train(theirs, Lookahead(their_optimizer, k=2), range(4))
    assert_near(model, theirs, matrices(Muon)[0])
