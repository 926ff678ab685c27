"""Every scheduler of torch, with its defaults where it has them, drives these optimizers as it drives torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ADAMW, CASES, MUON, assert_same, assert_same_training, build, loss_of, parameters, through_disk
from torch.optim import Optimizer, lr_scheduler

from muon_kernels import Muon

STEPS, HALF = 8, 4
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, STEPS - 2)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=STEPS + 1),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def test_no_scheduler_is_forgotten() -> None:
    abstract = {"LRScheduler"}
    assert set(lr_scheduler.__all__) - abstract <= SCHEDULERS.keys()


def advance(scheduler: Any, step: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(float(step % 3))  # better, and then worse
    else:
        scheduler.step()


def train(model: torch.nn.Module, optimizer: Optimizer, scheduler: Any, steps: range) -> list[list[dict[str, Any]]]:
    """What a scheduler wrote into the groups for every step."""
    written = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        written.append([{k: g[k] for k in ("lr", "momentum", "betas") if k in g} for g in optimizer.param_groups])
        optimizer.step()
        advance(scheduler, step)
    return written


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_resumed_to_the_bit(name: str, case: str) -> None:
    whole, optimizer = build(case)
    scheduler = SCHEDULERS[name](optimizer)
    train(whole, optimizer, scheduler, range(HALF))
    saved = through_disk({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    schedule = copy.deepcopy(scheduler.state_dict())
    expected = train(whole, optimizer, scheduler, range(HALF, STEPS))

    model, again = build(case, seed=1)
    scheduler = SCHEDULERS[name](again)
    model.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(schedule)
    assert train(model, again, scheduler, range(HALF, STEPS)) == expected
    assert_same_training(model, again, whole, optimizer)


def momentum(group: dict[str, Any]) -> float:
    """Momentum, or AdamW's first beta, which a `momentum` that a scheduler wrote into its group stands for."""
    return group["momentum"] if "momentum" in group else group["betas"][0]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_writes_what_it_writes_for_torch(name: str) -> None:
    """lr and momentum of every group, in every step, are those of torch.optim.Muon and AdamW with the same options."""
    model, optimizer = build("MuonAdamW")
    found = train(model, optimizer, SCHEDULERS[name](optimizer), range(STEPS))
    hidden, rest = (group["params"] for group in optimizer.param_groups)
    for i, theirs in enumerate((torch.optim.Muon(hidden, **MUON), torch.optim.AdamW(rest, **ADAMW))):
        expected = train(model, theirs, SCHEDULERS[name](theirs), range(STEPS))
        assert [step[i]["lr"] for step in found] == [step[0]["lr"] for step in expected]
        assert [momentum(step[i]) for step in found] == [momentum(step[0]) for step in expected]


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_momentum_that_a_scheduler_wrote_is_used(name: str) -> None:
    """Weights are those of Muon and AdamW apart, each with the rates and the momentum written by hand."""
    model, optimizer = build("MuonAdamW")
    written = train(model, optimizer, SCHEDULERS[name](optimizer), range(STEPS))
    assert len({step[0]["momentum"] for step in written}) > 2

    by_hand, own = build("MuonAdamW")
    hidden, rest = (group["params"] for group in own.param_groups)
    muon, adamw = Muon(hidden, **MUON), torch.optim.AdamW(rest, fused=True, **ADAMW)
    for step, (ours, others) in enumerate(written):
        muon.param_groups[0].update(lr=ours["lr"], momentum=ours["momentum"])
        adamw.param_groups[0].update(lr=others["lr"], betas=(momentum(others), 0.999))
        by_hand.zero_grad()
        loss_of(by_hand, step).backward()
        muon.step()
        adamw.step()
    assert_same(parameters(model), parameters(by_hand))
