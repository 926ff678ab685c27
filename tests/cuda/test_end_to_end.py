"""`Muon(backend="cuda")` from end to end: through the host's real launch code to nvcc's PTX, executed on the CPU; where
there is a GPU, on that as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import Place
from matrices import make
from ptx import standin
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muon_kernels import Muon, options, orthogonalize
from muon_kernels.backends import cuda
from muon_kernels.cli.ledger import ledger

needs_nvcc = pytest.mark.skipif(standin.nvcc() is None, reason="no nvcc: kernels cannot be compiled")
ROOT = Path(__file__).resolve().parents[2]


# Two buckets that are stepped in one launch, two whose products are launched one by one.
SHAPES = [(24, 40), (40, 24), (3, 24, 40), (64, 64), (130, 150), (150, 130), (136, 136)]


def make_params(device: str) -> list[nn.Parameter]:
    return [nn.Parameter(make("power -1/2", *s[-2:], batch=s[:-2]).to(device)) for s in SHAPES]


def make_grad(p: Tensor, seed: int) -> Tensor:
    return make("power -1", *p.shape[-2:], batch=tuple(p.shape[:-2]), seed=seed).to(p.device)


def stepped(
    backend: str, steps: int = 2, device: str = "cpu", **options: Any
) -> tuple[list[Tensor], list[Tensor], Muon]:
    params = make_params(device)
    muon = Muon(params, lr=0.1, backend=backend, **options)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = make_grad(p, 10 * t + i)
        muon.step()
    return [p.detach() for p in params], [muon.state[p]["momentum_buffer"] for p in params], muon


def test_steps_are_those_of_the_other_backends(place: Place) -> None:
    params, momenta, _ = stepped("cuda", device=place.device)
    theirs, their_momenta, _ = stepped("eager", device=place.device)
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


def test_a_learning_rate_on_the_device(place: Place) -> None:
    """Read by the kernel, so that a captured graph follows it."""
    G = torch.randn(2, 20, 30).to(place.device)
    X = orthogonalize(G, backend="cuda").bfloat16()
    from muon_kernels.layout import Matrices, layout

    results = []
    for lr, decay in ((0.5, 0.25), (torch.tensor(0.5, device=G.device), torch.tensor(0.25, device=G.device))):
        p = G.clone()
        at = layout(p.shape, p.stride(), None, ())
        assert at is not None
        cuda.apply_update([Matrices(p, at)], X, lr=lr, weight_decay=decay, ratios=[1.0, 2.0])
        results.append(p)
    assert torch.equal(*results)


class NothingWaits(TorchDispatchMode):
    """Fails where the host would wait for the device; keeps what is allocated, as a graph's own memory pool does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        return out


def test_a_captured_step_replays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA graph: new gradients and a new learning rate, written where the old ones were, take effect."""
    monkeypatch.setattr(options, "on_host", lambda value: not isinstance(value, Tensor))

    def make_muon() -> tuple[list[nn.Parameter], Tensor, Muon]:
        params = make_params(place.device)
        for p in params:
            p.grad = torch.empty_like(p)
        lr, weight_decay = torch.tensor(0.1, device=place.device), torch.tensor(0.5, device=place.device)
        return params, lr, Muon(params, lr=lr, weight_decay=weight_decay, backend="cuda")

    def feed(params: list[nn.Parameter], lr: Tensor, t: int) -> None:
        lr.fill_(0.1 / (t + 1))
        for i, p in enumerate(params):
            assert p.grad is not None
            p.grad.copy_(make_grad(p, 10 * t + i))

    ours, our_lr, captured = make_muon()
    theirs, their_lr, plain = make_muon()
    for t in range(4):
        feed(ours, our_lr, t)
        feed(theirs, their_lr, t)
        plain.step()
        if t == 0:
            captured.step()
        elif t == 1:
            before = [p.detach().clone() for p in ours]
            with place.capture(), NothingWaits() as memory:
                captured.step()
            assert memory.kept and all(map(torch.equal, ours, before)), "a capture runs nothing"
        if t:
            place.replay()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q), f"step {t}"


def test_autograd_sees_that_tensors_were_written(place: Place) -> None:
    """A graph that saved a parameter before the step must not run backward on what the step made of it."""
    params = [
        nn.Parameter(torch.randn(*s, device=place.device)) for s in ((24, 40), (130, 150))
    ]  # in one launch, and in several
    muon = Muon(params, backend="cuda")
    for p in params:
        p.grad = torch.randn_like(p)
    muon.step()
    before = [[t._version for t in (p, p.grad, muon.state[p]["momentum_buffer"])] for p in params]
    losses = [(p * p).sum() for p in params]
    muon.step()
    for loss, p, (param, grad, momentum) in zip(losses, params, before, strict=True):
        assert p._version > param and muon.state[p]["momentum_buffer"]._version > momentum
        assert p.grad is not None and p.grad._version == grad
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_orthogonalize_in_a_compiled_function(place: Place) -> None:
    G = torch.randn(2, 20, 30, device=place.device)
    f = lambda G: orthogonalize(2 * G, backend="cuda").sin()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(G), f(G))


@needs_nvcc
def test_many_matrices_take_more_launches(emulated: standin.Runtime) -> None:
    """Their lists are arguments, which are limited, and no two neighbours of these have equal strides."""
    module = cuda._device.module()
    capacities = module.cuda.momentum_capacity(), module.cuda.apply_capacity(), module.cuda.fused_capacity()
    assert capacities == (cuda.MOMENTUM_CAPACITY, cuda.APPLY_CAPACITY, cuda.FUSED_CAPACITY)
    for count, columns in ((cuda.FUSED_CAPACITY + 1, 3), (cuda.MOMENTUM_CAPACITY + 1, 2)):
        memory = torch.ones(10 * count)
        params = [nn.Parameter(memory.as_strided((2, columns), (columns + i % 2, 1), 10 * i)) for i in range(count)]
        muon = Muon(params, backend="cuda", ns_coefficients="keller" if columns == 3 else "deepseek_v4")
        for i, p in enumerate(params):
            p.grad = torch.ones(columns, 2).T * (i + 1) if i % 2 else torch.ones(2, columns) * (i + 1)
        before = len(emulated.log)
        muon.step()
        assert len(emulated.log) - before == muon.plan().launches
        assert muon.plan().buckets[0].fused == (columns == 3)


@needs_nvcc
def test_a_step_without_memory_changes_nothing(emulated: standin.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step allocates it allocates before it writes."""
    params = make_params("cpu")
    muon = Muon(params, backend="cuda")
    for i, p in enumerate(params):
        p.grad = make_grad(p, i)
    before = [p.detach().clone() for p in params]
    allowed = 0

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise torch.OutOfMemoryError("planted")
        return made(*args, **kwargs)

    made = torch.empty
    for n in range(50):
        allowed = n
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            try:
                muon.step()
                break
            except torch.OutOfMemoryError:
                assert all(map(torch.equal, params, before)) and not muon.state
    assert n and not any(map(torch.equal, params, before))


@needs_nvcc
@pytest.mark.parametrize("name", ["keller", "you6", "deepseek_v4"])
def test_what_is_not_fused_is_stepped_all_the_same(emulated: standin.Runtime, name: str) -> None:
    """The plan knows which schedules and sizes the fused kernel does not take."""
    *_, muon = stepped("cuda", steps=1, ns_coefficients=name)
    assert [b.fused for b in muon.plan().buckets[:2]] == [name != "deepseek_v4"] * 2
    assert len(emulated.log) == muon.plan().launches


@needs_nvcc
@pytest.mark.parametrize("shape", [(24, 40), (130, 150)], ids=["fused_step", "momentum_update"])
def test_old_devices(emulated: standin.Runtime, shape: tuple[int, int]) -> None:
    """By the plan, and by the kernels if nobody has asked."""
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    emulated.device.major = 7
    try:
        with pytest.raises(ValueError, match=r"compute capability is below 8.0, for 1 of \d+x\d+ on cpu; "):
            Muon([p], backend="cuda").step()
        cuda._device.capability = lambda device: (7, 5)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"compute capability 8.0 or more, cpu has 7.5; use backend='auto'"):
            Muon([p], backend="cuda")
    finally:
        emulated.pretend(8, 0)
    assert torch.equal(p, torch.ones(shape))


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "mend"), [(209, "MUON_KERNELS_CUDA_ARCHS=80"), (35, "driver is older"), (700, "CUDA_LAUNCH_BLOCKING=1")]
)
@pytest.mark.parametrize(("shape", "verb"), [((24, 40), "fused_step"), ((130, 150), "momentum_update")])
def test_an_error_of_a_launch(
    emulated: standin.Runtime, code: int, mend: str, shape: tuple[int, int], verb: str
) -> None:
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    muon = Muon([p], backend="cuda")
    emulated.fail_next(code)
    sentence = rf"{verb}: .*\(CUDA error {code}\), for 1 of {shape[0]}x{shape[1]} on cpu; .*{mend}"
    with pytest.raises(RuntimeError, match=sentence):
        muon.step()
    assert torch.equal(p, torch.ones(shape)), "the first launch of a step fails before anything is written"
    muon.step()
    assert not torch.equal(p, torch.ones(shape))
