"""Checkpoints with anything in them: a load and the step after it happen, or raise and change nothing."""

import copy
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from garbling import snapshot
from torch import Tensor, nn

from muon_kernels import Muon, MuonAdamW, SpectralAdam, SpectralMomentum, backends, interrupts

GARBLING = Path(__file__).with_name("garbling.py")
CASES = 70


def test_garbled_checkpoints() -> None:
    """In a process of its own, which a step that reads where nothing is would end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(GARBLING), "0", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    tried = re.findall(rf": {CASES} tried, 0 wrong", done.stdout)
    assert (done.returncode, len(tried)) == (0, 6), f"{done.stdout}\n{done.stderr[-2000:]}"


def made(
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> tuple[list[nn.Parameter], MuonAdamW, dict[str, Any]]:
    """A matrix for either optimizer, stepped once, and a checkpoint in which AdamW's moments lie as `layout` says."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(5, 7, generator=generator)) for _ in range(2)]
    optimizer = MuonAdamW(
        [{"params": [p], "use_muon": use_muon} for p, use_muon in zip(params, (True, False), strict=True)]
    )
    for p in params:
        p.grad = torch.randn(5, 7, generator=generator)
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for key in ("exp_avg", "exp_avg_sq"):
        checkpoint["state"][1][key] = layout(checkpoint["state"][1][key])
    return params, optimizer, checkpoint


def test_snapshots_see_all_that_a_step_writes() -> None:
    """Else nothing here would prove that it has not been written."""
    params, optimizer, _ = made()
    state = [t for p in params for t in optimizer.state[p].values()]
    assert len(state) == 4
    for t in (*(p.detach() for p in params), *state):
        before = snapshot(optimizer)
        t.add_(1)
        assert snapshot(optimizer) != before


@pytest.mark.parametrize(
    "junk", [None, 1.0, object(), [torch.ones(4, 4)], torch.ones(4, 4, device="meta")], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("key", ["momentum_buffer", "momentum_scale", "mantissa", "second_momentum_buffer"])
def test_state_of_muon_that_is_no_tensor(key: str, junk: Any) -> None:
    optimizer = Muon([nn.Parameter(torch.ones(4, 4))], second_moment="neuron")
    optimizer.param_groups[0]["params"][0].grad = torch.eye(4)
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0]["lr"] = 7.0
    checkpoint["state"][0][key] = junk
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=f"{key} of parameter 0 should "):
        optimizer.load_state_dict(checkpoint)
    assert snapshot(optimizer) == before


def test_moments_of_another_layout() -> None:
    """The fused step, which pairs elements by their place, would take the wrong ones."""
    params, optimizer, checkpoint = made(lambda t: t.mT.contiguous().mT)
    p, grad = nn.Parameter(params[1].detach().clone()), params[1].grad
    theirs = torch.optim.AdamW([p], fused=False)
    p.grad = grad
    theirs.load_state_dict({"state": {0: checkpoint["state"][1]}, "param_groups": theirs.state_dict()["param_groups"]})
    optimizer.load_state_dict(checkpoint)
    assert optimizer.param_groups[1]["fused"]
    optimizer.step()
    theirs.step()
    assert torch.equal(params[1], p)


def test_moments_that_have_not_every_element() -> None:
    """A checkpoint may hold an expanded tensor, and so may state; fused AdamW writes beyond its memory."""
    params, optimizer, checkpoint = made(lambda t: t[:1, :1].expand(5, 7))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="exp_avg of parameter 1 should have memory for every element"):
        optimizer.load_state_dict(checkpoint)
    assert snapshot(optimizer) == before
    optimizer.state[params[1]]["exp_avg_sq"] = torch.ones(1, 1).expand(5, 7)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="exp_avg_sq should have memory for every element"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_gradient_of_another_size() -> None:
    params, optimizer, _ = made()
    params[1].grad.data = torch.ones(3)  # type: ignore[union-attr]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"gradient should have the parameter's size \(5, 7\) but has: \(3,\)"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_options_that_an_adamw_group_lacks() -> None:
    """They are as in the optimizer, as those of a Muon group."""
    _, optimizer, checkpoint = made()
    optimizer.param_groups[1].update(lr=0.25, eps=1e-5)
    for key in ("lr", "eps", "weight_decay"):
        del checkpoint["param_groups"][1][key]
    optimizer.load_state_dict(checkpoint)
    assert [optimizer.param_groups[1][key] for key in ("lr", "eps", "weight_decay")] == [0.25, 1e-5, 0.01]
    del checkpoint["state"][1]["step"]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="state of parameter 1 should have step, a tensor, but has: None"):
        optimizer.load_state_dict(checkpoint)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("amsgrad", 1, "amsgrad should be True or False but is: 1"),
        ("foreach", "x", "foreach should be True, False or None but is: 'x'"),
        ("differentiable", True, "differentiable should be False"),
        ("foreach", True, "fused and foreach should not both be True"),
        ("eps", torch.tensor(1e-8), "eps should be a number but is a tensor"),
        ("betas", (0.9, torch.tensor(0.99)), "betas should be both numbers or both tensors"),
    ],
)
def test_options_that_adamw_would_fail_on(option: str, value: Any, sentence: str) -> None:
    _, optimizer, checkpoint = made()
    checkpoint["param_groups"][1][option] = value
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=sentence):
        optimizer.load_state_dict(checkpoint)
    assert snapshot(optimizer) == before
    optimizer.param_groups[1][option] = value
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=sentence):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_learning_rate_beyond_the_parameters_dtype(dtype: torch.dtype) -> None:
    """torch refuses such a factor when the momentum has been updated."""
    p = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    optimizer = Muon([p], backend="eager")
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 4 * torch.finfo(dtype).max
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"should be at most .*{dtype}, but lr is: "):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Python's own answer to Ctrl-C, which workers of pytest-xdist have turned off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=str)
def test_ctrl_c_that_no_function_answers(handler: signal.Handlers) -> None:
    """It is ignored, as in the background of a shell, or ends the process: nobody could be called at the end."""
    signal.signal(signal.SIGINT, handler)
    with interrupts.held():
        assert signal.getsignal(signal.SIGINT) is handler
        if handler is signal.SIG_IGN:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_waits_for_the_outermost_context() -> None:
    for _ in range(2):  # and the next one waits as well
        done = False
        with pytest.raises(KeyboardInterrupt), interrupts.held():
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGINT)
            done = True
        assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_waits_for_the_end_of_a_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(interrupted: bool) -> Any:
        first, *others = [nn.Parameter(torch.ones(4, n)) for n in (4, 5, 5)]
        groups = [{"params": [first]}, {"params": others, "lr": 0.2}]  # stepped one after the other
        optimizer = Muon(groups, backend=backend, power=0.5)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.eye(*p.shape)
        optimizer.step()
        verbs, update = backends.get(backend), backends.get(backend).apply_update
        if interrupted:
            monkeypatch.setattr(
                verbs, "apply_update", lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), update(*a, **k))
            )
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        else:
            optimizer.step()
        return snapshot(optimizer)

    assert run(interrupted=False) == run(interrupted=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("kind", [Muon, SpectralMomentum, SpectralAdam])
def test_ctrl_c_between_groups_waits_for_all(kind: type[Muon | SpectralAdam], after: int) -> None:
    """Also where no task runs: between two groups, or moments and the matrix that they are for."""

    def run(interrupted: bool) -> Any:
        shapes = [(4, 4), (5, 3), (3, 7)]
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = kind([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)])
        for p in params:
            p.grad = torch.eye(*p.shape)
        optimizer.step()
        before = [p.detach().clone() for p in params]
        # Both are called within the step of a group, before its matrices are: of the first, the second, the third.
        name = "_adamw" if kind is SpectralAdam else "_keep"
        own, calls = getattr(optimizer, name), []

        def called(*args: Any) -> None:
            own(*args)
            calls.append(args)
            # SpectralAdam's has a call for vectors, of which there are none, and one for matrices.
            if interrupted and len(calls) == (2 * after + 2 if kind is SpectralAdam else after + 1):
                os.kill(os.getpid(), signal.SIGINT)

        setattr(optimizer, name, called)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        else:
            optimizer.step()
        delattr(optimizer, name)
        assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))
        return snapshot(optimizer)

    assert run(interrupted=False) == run(interrupted=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("kind", [Muon, SpectralMomentum])
def test_ctrl_c_where_no_step_waits_leaves_no_matrix_half_done(
    kind: type[Muon], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where ranks wait for each other: what has been begun is stepped, parameter and momentum, and no other is."""
    monkeypatch.setattr("muon_kernels.optimizers.muon.interrupts", SimpleNamespace(held=nullcontext))

    def run(steps: int, interrupted: bool = False) -> list[list[Tensor]]:
        params = [nn.Parameter(torch.ones(4, n)) for n in (4, 5)]
        groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
        optimizer = kind(groups, power=0.5, backend=backend)
        for p in params:
            p.grad = torch.eye(*p.shape)
        for _ in range(steps):
            optimizer.step()
        if interrupted:
            verbs, update = backends.get(backend), backends.get(backend).apply_update
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(
                    verbs, "apply_update", lambda *a, **k: (os.kill(os.getpid(), signal.SIGINT), update(*a, **k))
                )
                optimizer.step()
        return [[p.detach(), optimizer.state[p]["momentum_buffer"]] for p in params]

    (begun, other), (stepped, _), (_, untouched) = run(1, interrupted=True), run(2), run(1)
    assert all(map(torch.equal, begun, stepped)) and all(map(torch.equal, other, untouched))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
