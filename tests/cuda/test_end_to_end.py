"""`Muon(backend="cuda")` on CPU tensors, through the host's real launch code, with nvcc's PTX executed on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matrices import make
from ptx import standin
from test_newton_schulz import misses
from torch import Tensor, nn

from muon_kernels import Muon, backends, orthogonalize
from muon_kernels.backends import cuda
from muon_kernels.cli.ledger import ledger
from muon_kernels.plan import plan_for_shapes

needs_nvcc = pytest.mark.skipif(standin.nvcc() is None, reason="no nvcc: kernels cannot be compiled")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def emulated(built: tuple[ModuleType, standin.Runtime], monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.Runtime]:
    """The backend takes CPU tensors, and launches go to the executor. Nothing outside the tests can switch this on."""
    module, runtime = built

    class Emulated:
        type = "cpu"

        def module(self) -> ModuleType:
            return module

        def unavailable(self) -> None:
            return None

        def capability(self, device: torch.device) -> tuple[int, int]:
            return 8, 0

        def stream(self, device: torch.device) -> int:
            return 0

        def guard(self, device: torch.device) -> AbstractContextManager[Any]:
            return nullcontext()

    monkeypatch.setattr(cuda, "_device", Emulated())
    runtime.log.clear()
    with runtime.options(any_memory=True):
        yield runtime


# Two buckets that are stepped in one launch, two whose products are launched one by one.
SHAPES = [(24, 40), (40, 24), (3, 24, 40), (64, 64), (130, 150), (150, 130), (136, 136)]


def stepped(backend: str, steps: int = 2, **options: Any) -> tuple[list[Tensor], list[Tensor], Muon]:
    params = [nn.Parameter(make("power -1/2", *s[-2:], batch=s[:-2])) for s in SHAPES]
    muon = Muon(params, lr=0.1, backend=backend, **options)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = make("power -1", *p.shape[-2:], batch=tuple(p.shape[:-2]), seed=10 * t + i)
        muon.step()
    return [p.detach() for p in params], [muon.state[p]["momentum_buffer"] for p in params], muon


@needs_nvcc
def test_steps_are_those_of_the_other_backends(emulated: standin.Runtime) -> None:
    params, momenta, _ = stepped("cuda")
    theirs, their_momenta, _ = stepped("eager")
    for b, c in zip(momenta, their_momenta, strict=True):
        torch.testing.assert_close(b, c, rtol=1e-6, atol=1e-7)
    for p, q in zip(params, theirs, strict=True):
        # Two updates of norm about 0.1 √m, each within a few percent of the other backend's.
        assert float((p - q).norm()) < 0.06 * 0.2 * min(p.shape[-2:]) ** 0.5 * p[..., 0, 0].numel() ** 0.5


@needs_nvcc
def test_launches_are_the_plan_s(emulated: standin.Runtime) -> None:
    *_, muon = stepped("cuda", steps=1)
    plan = muon.plan()
    assert {b.backend for b in plan.buckets} == {"cuda"}
    assert [b.fused for b in plan.buckets] == [True, True, False, False]
    assert len(emulated.log) == plan.launches
    assert not emulated.failures


@needs_nvcc
def test_the_ledger_counts_what_is_launched(emulated: standin.Runtime) -> None:
    shapes = [(s[-2], s[-1], 3 if len(s) == 3 else 1) for s in SHAPES]
    stepped("cuda", steps=1)
    assert ledger(shapes)["muon_kernels, cuda"].launches == len(emulated.log)


def test_the_ledger_keeps_its_promises() -> None:
    """The figures of README and CHANGELOG, on a machine without anything."""
    gpt2 = ledger([(2304, 768, 12), (768, 768, 12), (3072, 768, 12), (768, 3072, 12)])
    ours, torchs = gpt2["muon_kernels, cuda"], gpt2["torch.optim.Muon"]
    assert torchs.launches > 1000 and ours.launches <= 60
    assert ours.flops <= 0.55 * torchs.flops
    assert ledger([(64, 768, 108)])["muon_kernels, cuda"].launches <= 3


@needs_nvcc
@pytest.mark.parametrize("name", ["keller", "polar_express"])
def test_accuracy(emulated: standin.Runtime, name: str) -> None:
    assert not misses(name, (136, 160), (1,), backend="cuda")


@needs_nvcc
def test_a_learning_rate_on_the_device(emulated: standin.Runtime) -> None:
    """Read by the kernel, so that a captured graph follows it."""
    G = torch.randn(2, 20, 30)
    X = orthogonalize(G, backend="cuda").bfloat16()
    from muon_kernels.layout import Matrices, layout

    results = []
    for lr, decay in ((0.5, 0.25), (torch.tensor(0.5), torch.tensor(0.25))):
        p = G.clone()
        at = layout(p.shape, p.stride(), None, ())
        assert at is not None
        cuda.apply_update([Matrices(p, at)], X, lr=lr, weight_decay=decay, ratios=[1.0, 2.0])
        results.append(p)
    assert torch.equal(*results)


def test_without_a_device() -> None:
    if cuda.unavailable() is None:
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run here: .*(install|check|put nvcc)"):
        Muon([nn.Parameter(torch.zeros(3, 4))], backend="cuda").plan()
    assert backends.choose("auto", torch.device("cpu"), [torch.float32]) != "cuda"


@needs_nvcc
def test_the_module_knows_how_many_rows_fuse(built: tuple[ModuleType, standin.Runtime]) -> None:
    assert built[0].cuda.fused_rows() == cuda.FUSED_ROWS
    assert plan_for_shapes([(cuda.FUSED_ROWS + 1, 300, 9)], backend="cuda", device="cuda", available=False).launches > 9


@needs_nvcc
def test_a_failed_launch_is_an_exception(emulated: standin.Runtime) -> None:
    emulated.device.major = 7
    try:
        with pytest.raises((RuntimeError, ValueError), match=r"momentum_update|fused_step"):
            stepped("cuda", steps=1)
    finally:
        emulated.device.major = 8
