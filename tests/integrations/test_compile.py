"""torch.compile of the model, of the step and of both leaves every bit where it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import CASES, assert_same_training, build, loss_of, train


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", CASES)
def test_model(case: str) -> None:
    (model, optimizer), (plain, own) = build(case), build(case)
    train(torch.compile(model, backend="aot_eager"), optimizer, range(3))
    train(plain, own, range(3))
    assert_same_training(model, optimizer, plain, own)


@pytest.mark.parametrize("case", CASES)
def test_step(case: str) -> None:
    """Dynamo leaves the step alone: nothing is compiled, and torch's default compiler is not even loaded."""
    (model, optimizer), (plain, own) = build(case), build(case)
    step = torch.compile(optimizer.step)
    for i in range(3):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        step()
    train(plain, own, range(3))
    assert_same_training(model, optimizer, plain, own)


@pytest.mark.parametrize("case", CASES)
def test_whole_training_step(case: str) -> None:
    (model, optimizer), (plain, own) = build(case), build(case)

    @torch.compile(backend="aot_eager")
    def advance(step: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        return loss

    for step in range(3):
        advance(step)
    train(plain, own, range(3))
    assert_same_training(model, optimizer, plain, own)


@pytest.mark.parametrize("case", CASES)
def test_learning_rate_in_a_tensor(case: str) -> None:
    """What torch advises for compiled steps under a scheduler."""
    (model, optimizer), (plain, own) = build(case), build(case)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    step = torch.compile(optimizer.step)
    for i in range(3):
        for group, other in zip(optimizer.param_groups, own.param_groups, strict=True):
            group["lr"].mul_(0.5)
            other["lr"] *= 0.5
        optimizer.zero_grad()
        loss_of(model, i).backward()
        step()
        train(plain, own, [i])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
