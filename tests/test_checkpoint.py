"""Checkpoints: our own, torch.optim.Muon's, and those that do not fit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checks.training import same, snapshot
from torch import Tensor, nn

from muon_kernels import Muon
from muon_kernels.checks.matrices import make

SHAPES = [(24, 40), (40, 24), (16, 16)]
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.8}
BEFORE, AFTER = 3, 3
# What one matrix's update may differ by in bf16, see FLOOR in test_optimizer.py; two results may differ by twice that.
CLOSE = 2 * 0.025


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], start: int, stop: int) -> None:
    for t in range(start, stop):
        for p in params:
            p.grad = make("gaussian", *p.shape, dtype=p.dtype, seed=t)
        optimizer.step()


def saved(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    torch.save(state, path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def buffers(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16])
def test_ours_to_ours(backend: str, tmp_path: Path, dtype: torch.dtype, momentum_dtype: torch.dtype | None) -> None:
    """To the bit, and an fp32 momentum of bf16 parameters stays fp32."""
    options = {**OPTIONS, "momentum_dtype": momentum_dtype, "backend": backend}
    whole = parameters(dtype)
    train(uninterrupted := Muon(whole, **options), whole, 0, BEFORE + AFTER)

    params = parameters(dtype)
    train(first := Muon(params, **options), params, 0, BEFORE)
    state = saved(tmp_path / "state.pt", first.state_dict())
    second = Muon(params, lr=1.0, backend=backend)  # options come with the checkpoint
    train(second, params, 0, 0)
    second.load_state_dict(state)
    for p, buffer in zip(params, buffers(second, params), strict=True):
        assert buffer.dtype == (momentum_dtype or dtype)
        assert buffer.data_ptr() != first.state[p]["momentum_buffer"].data_ptr()
    assert same(second.state_dict(), first.state_dict())
    train(second, params, BEFORE, BEFORE + AFTER)
    assert same(params, whole) and same(buffers(second, params), buffers(uninterrupted, whole))


def test_loading_into_an_optimizer_that_has_stepped(backend: str) -> None:
    """What it kept for its own buffers must not be used for the new ones."""
    params = parameters()
    optimizer = Muon(params, **OPTIONS, backend=backend)
    train(optimizer, params, 0, BEFORE)
    kept, state = snapshot(optimizer, params)
    train(optimizer, params, BEFORE, BEFORE + AFTER)
    expected = [p.detach().clone() for p in params]
    train(optimizer, params, 50, 52)
    optimizer.load_state_dict(state)
    with torch.no_grad():
        for p, k in zip(params, kept, strict=True):
            p.copy_(k)
    train(optimizer, params, BEFORE, BEFORE + AFTER)
    assert same(expected, [p.detach() for p in params])


@pytest.mark.parametrize("direction", ["torch to ours", "ours to torch"])
def test_torch_and_ours(backend: str, tmp_path: Path, direction: str) -> None:
    makers = [
        lambda params: torch.optim.Muon(params, **OPTIONS),
        lambda params: Muon(params, **OPTIONS, backend=backend),
    ]
    if direction == "ours to torch":
        makers.reverse()
    start = parameters()
    whole = parameters()
    train(uninterrupted := makers[1](whole), whole, 0, BEFORE + AFTER)

    params = parameters()
    train(first := makers[0](params), params, 0, BEFORE)
    state = saved(tmp_path / "state.pt", first.state_dict())
    second = makers[1](params)
    second.load_state_dict(state)
    assert same(buffers(first, params), buffers(second, params))
    train(second, params, BEFORE, BEFORE + AFTER)
    assert same(buffers(second, params), buffers(uninterrupted, whole))
    for p, q, s in zip(params, whole, start, strict=True):
        assert float((p - q).detach().norm() / (q - s).detach().norm()) < CLOSE
    # An update of the wrong size or from an empty buffer would be far off.
    assert second.param_groups[0]["momentum"] == OPTIONS["momentum"]


def test_what_a_checkpoint_lacks_is_the_optimizers_own(backend: str) -> None:
    params = parameters()
    theirs = torch.optim.Muon(params, lr=0.25)
    ours = Muon(params, backend=backend, dampened=False, max_workspace_bytes=1 << 20, ns_algorithm="standard")
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert group["lr"] == 0.25
    assert group["backend"] == backend and group["dampened"] is False and group["max_workspace_bytes"] == 1 << 20
    assert group["ns_algorithm"] == "standard" and group["maximize"] is False and group["momentum_dtype"] is None
    assert set(group) == set(Muon(params).param_groups[0])
    train(ours, params, 0, 1)


def test_partial_state(backend: str) -> None:
    """Parameters that never had a gradient have no state, before and after."""
    params = parameters()
    optimizer = Muon(params, backend=backend)
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = Muon(params, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert set(other.state) == set(params[1:])
    train(other, params, 0, 1)


def test_layout_of_the_momentum_survives(backend: str) -> None:
    params = [nn.Parameter(torch.randn(12, 3, 3, 5).permute(0, 3, 1, 2)), nn.Parameter(torch.randn(30, 20).T)]
    optimizer = Muon(params, backend=backend)
    train_grads = [torch.randn(p.shape) for p in params]
    for p, g in zip(params, train_grads, strict=True):
        p.grad = g
    optimizer.step()
    other = Muon(params, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    for p, buffer in zip(params, buffers(other, params), strict=True):
        assert buffer.stride() == p.stride()
        assert torch.equal(buffer, optimizer.state[p]["momentum_buffer"])


def _wrong_shape(state: dict[str, Any]) -> None:
    state["state"][1]["momentum_buffer"] = torch.zeros(24, 40)


def _one_too_few(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def _two_groups(state: dict[str, Any]) -> None:
    group = state["param_groups"][0]
    state["param_groups"].append({**group, "params": [group["params"].pop()]})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            _wrong_shape,
            r"momentum_buffer of parameter 1 should have the parameter's size \(40, 24\) but has: \(24, 40\)",
        ),
        (_one_too_few, "doesn't match the size of optimizer's group"),
        (_two_groups, "different number of parameter groups"),
        (lambda s: s.pop("state"), "should be a dict with 'state' and 'param_groups' but is: \\['param_groups'\\]"),
        (lambda s: s.pop("param_groups"), "should be a dict with 'state' and 'param_groups' but is: \\['state'\\]"),
        (lambda s: s["param_groups"][0].pop("ns_coefficients"), "checkpoint of Muon should have ns_coefficients"),
        (lambda s: s["state"].update({1: {"exp_avg": 1}}), "but has: exp_avg"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "Learning rate should be >= 0 but is: -1.0"),
        (lambda s: s["param_groups"][0].update(ns_coefficients="no"), "ns_coefficients should be one of 'keller'"),
        (lambda s: s["param_groups"][0].update(backend="no"), "backend should be 'auto' or one of"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(backend: str, spoil: Any, sentence: str) -> None:
    params = parameters()
    optimizer = Muon(params, **OPTIONS, backend=backend)
    train(optimizer, params, 0, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.5
    for buffer in state["state"].values():
        buffer["momentum_buffer"].zero_()
    spoil(state)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(state)
    assert same(before, snapshot(optimizer, params))
    train(optimizer, params, 2, 3)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Its momentum has our name and another meaning."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("other", [adamw, sgd])
def test_a_checkpoint_of_another_optimizer_is_refused(other: Any, steps: int) -> None:
    params = parameters()
    train(theirs := other(params), params, 0, steps)
    optimizer = Muon(params)
    train(optimizer, params, 0, 1)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="a checkpoint of Muon should have ns_coefficients in every group but has: "):
        optimizer.load_state_dict(theirs.state_dict())
    assert same(before, snapshot(optimizer, params))


@pytest.mark.parametrize("state", [None, [], 3])
def test_what_is_no_checkpoint(state: Any) -> None:
    with pytest.raises(ValueError, match="a checkpoint should be a dict with 'state' and 'param_groups' but is: "):
        Muon(parameters()).load_state_dict(state)


def test_a_checkpoint_may_hold_more_than_we_know(tmp_path: Path) -> None:
    """Schedulers and users put keys of their own into groups and state."""
    params = parameters()
    optimizer = Muon(params, lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=9)
    optimizer.param_groups[0].update(name="hidden", swa_lr=0.05)
    train(optimizer, params, 0, 1)
    optimizer.state[params[0]]["seen"] = 1
    state = saved(tmp_path / "state.pt", optimizer.state_dict())
    other = Muon(params)
    other.load_state_dict(state)
    extras = {"name", "swa_lr", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
    assert extras <= set(other.param_groups[0])
    assert same(other.state_dict(), optimizer.state_dict())
    train(other, params, 1, 2)
