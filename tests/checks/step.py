"""Steps from end to end, whatever backend runs them on a GPU or on what executes its kernels in the place of one.

A module that imports these tests has a fixture `gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from muon_kernels import Muon, SpectralMomentum, backends, options, orthogonalize
from muon_kernels.checks.matrices import make
from muon_kernels.checks.steps import SHAPES, captured_steps_replay, make_grad, make_params, replays_after_growth
from muon_kernels.checks.yardsticks import newton_schulz
from muon_kernels.cli.ledger import ledger
from muon_kernels.coefficients import resolve
from muon_kernels.layout import Matrices, layout
from muon_kernels.split import blocks, equal, heads, qkv
from muon_kernels.verbs import ApplyUpdate, MomentumUpdate


class Gpu(NamedTuple):
    """Where a backend runs.

    Attributes:
        backend: its name.
        device: of tensors.
        capture: what a step is captured in.
        replay: what was captured.
        launches: how many there were so far; None if that is not known.
    """

    backend: str
    device: str
    capture: Callable[[], AbstractContextManager[Any]]
    replay: Callable[[], None]
    launches: Callable[[], int] | None = None

    @classmethod
    def real(cls, backend: str) -> Gpu:
        """A GPU, if there is one that the backend can use; otherwise the test is skipped."""
        if reason := backends.unavailable(backend):
            pytest.skip(reason)
        graph = torch.cuda.CUDAGraph()
        return cls(backend, "cuda", lambda: torch.cuda.graph(graph), graph.replay)

    def launched(self) -> int:
        """How many launches there were so far; skips the test where that is not known."""
        return pytest.skip("a GPU does not count launches") if self.launches is None else self.launches()


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


def test_steps_are_those_of_the_other_backends(gpu: Gpu) -> None:
    params, momenta, _ = stepped(gpu.backend, device=gpu.device)
    theirs, their_momenta, _ = stepped("eager", device=gpu.device)
    for b, c in zip(momenta, their_momenta, strict=True):
        torch.testing.assert_close(b, c, rtol=1e-6, atol=1e-7)
    for p, q in zip(params, theirs, strict=True):
        # Two updates of norm about 0.1 √m, each within a few percent of the other backend's.
        assert float((p - q).norm()) < 0.06 * 0.2 * min(p.shape[-2:]) ** 0.5 * p[..., 0, 0].numel() ** 0.5


SIZES = [1.0, 1000.0, 1.0, 0.001]  # of gradients, one step after the other


def test_a_scratch_is_used_again(gpu: Gpu) -> None:
    """Of what a call left there, the next one keeps nothing."""
    ops, G = backends.get(gpu.backend), torch.randn(2, 20, 30, device=gpu.device)
    at = layout(G.shape, G.stride(), None, ())
    assert at is not None
    X = torch.empty_like(G, dtype=torch.bfloat16)
    scratch = torch.empty(2 * ops.scratch_bytes(20, 30), dtype=torch.uint8, device=gpu.device)
    for size in SIZES:
        grads = G * size
        scale = ops.momentum_update(
            MomentumUpdate([Matrices(grads, at)], None, X, 0.0, False, True, 1.0, 1e-7, 1.0, scratch)
        )
        torch.testing.assert_close(scale.double(), 1 / grads.double().norm(dim=(1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["keller", "deepseek_v4"], ids=["fused_step", "products"])
def test_a_step_knows_nothing_of_the_gradients_before(gpu: Gpu, name: str) -> None:
    """However large those were."""
    p = nn.Parameter(torch.zeros(24, 40, device=gpu.device))
    muon = Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, ns_coefficients=name, backend=gpu.backend)
    for t, size in enumerate(SIZES):
        before, grad = p.detach().double(), make_grad(p, t)
        p.grad = grad * size
        muon.step()
        exact = newton_schulz(grad, resolve(name))
        assert (before - p.detach() - exact).norm() / exact.norm() < 0.03, f"step {t}"


def test_two_threads_step_two_optimizers(gpu: Gpu) -> None:
    """The same bits as one after the other."""

    def step(seed: int) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros(24, 40, device=gpu.device)) for _ in range(2)]
        groups = [
            {"params": [p], "ns_coefficients": name} for p, name in zip(params, ("keller", "deepseek_v4"), strict=True)
        ]
        muon = Muon(groups, lr=1.0, backend=gpu.backend)
        for t in range(2):
            for p in params:
                p.grad = make_grad(p, 10 * seed + t)
            muon.step()
        return [p.detach() for p in params]

    expected = [step(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(step, range(2)))
    for one, other in zip(expected, results, strict=True):
        assert all(map(torch.equal, one, other))


def test_variants_are_those_of_the_other_backends(gpu: Gpu) -> None:
    """The same random bits among them. Stochastic rounding and second moments take steps apart that else are fused."""
    results = []
    for backend in (gpu.backend, "eager"):
        params = [nn.Parameter(p.detach().bfloat16()) for p in make_params(gpu.device)]
        options = {"cautious": True, "stochastic_rounding": True, "second_moment": "neuron"}
        muon = Muon(params, lr=0.1, backend=backend, weight_decay_form="independent", **options)
        for t in range(2):
            for i, p in enumerate(params):
                p.grad = make_grad(p, 10 * t + i).bfloat16()
            muon.step()
        assert {(b.backend, b.fused) for b in muon.plan().buckets} == {(backend, False)}
        moments = [muon.state[p]["second_momentum_buffer"] for p in params]
        results.append(([p.detach().float() for p in params], moments))
    for p, V, q, W in zip(*results[0], *results[1], strict=True):
        assert float((p - q).norm()) < 0.06 * 0.2 * min(p.shape[-2:]) ** 0.5 * p[..., 0, 0].numel() ** 0.5
        assert float((V - W).norm() / W.norm()) < 0.06


def test_packed_state_is_that_of_the_other_backends(gpu: Gpu) -> None:
    """8-bit momentum and fp32 masters, made fp32 in the workspace; codes may be rounded to the next one."""
    results = []
    for backend in (gpu.backend, "eager"):
        params = [nn.Parameter(make_params(gpu.device)[i].detach().bfloat16()) for i in (0, 1, 4)]
        muon = Muon(params, lr=0.1, backend=backend, momentum_dtype=torch.int8, master_weights=True)
        for t in range(2):
            for i, p in enumerate(params):
                p.grad = make_grad(p, 10 * t + i).bfloat16()
            muon.step()
        assert {(b.backend, b.fused, b.packed) for b in muon.plan().buckets} == {(backend, False, 2)}
        results.append((params, [muon.state[p] for p in params]))
    for p, ours, q, theirs in zip(*results[0], *results[1], strict=True):
        assert (ours["momentum_buffer"].int() - theirs["momentum_buffer"].int()).abs().max() <= 1
        torch.testing.assert_close(ours["momentum_scale"], theirs["momentum_scale"], rtol=1e-6, atol=0)
        assert ours["mantissa"].any() and ours["mantissa"].dtype == torch.int16
        assert float((p.float() - q.float()).norm()) < 0.06 * 0.2 * min(p.shape) ** 0.5


def test_a_step_with_a_split_is_that_of_the_parts(gpu: Gpu) -> None:
    """Parts as they lie in rows, in columns and in every second one, and copies where heads are interleaved."""
    cases: dict[str, Callable[[Tensor], list[Tensor]]] = {
        heads(3): lambda t: list(t.chunk(3)),
        equal(3, dim=1): lambda t: list(t.chunk(3, -1)),
        blocks(1, 1, interleaved=True, dim=1): lambda t: [t[:, ::2], t[:, 1::2]],
        qkv(2, interleaved=True): lambda t: [t.view(2, 3, -1, t.shape[1])[:, i].flatten(0, 1) for i in range(3)],
    }
    shapes = [(72, 40), (24, 120), (24, 80), (72, 40)]
    params = [nn.Parameter(make("power -1/2", *shape, seed=i).to(gpu.device)) for i, shape in enumerate(shapes)]
    cuts = list(zip(params, cases.items(), strict=True))
    parts = [nn.Parameter(x.detach().contiguous()) for p, (_, cut) in cuts for x in cut(p)]
    whole = Muon([{"params": [p], "split": split} for p, (split, _) in cuts], lr=0.1, backend=gpu.backend)
    apart = Muon(parts, lr=0.1, backend=gpu.backend)
    for t in range(2):
        for i, p in enumerate(params):
            p.grad = make_grad(p, 10 * t + i)
        grads = [x.contiguous() for p, (_, cut) in cuts if p.grad is not None for x in cut(p.grad)]
        for p, g in zip(parts, grads, strict=True):
            p.grad = g
        whole.step()
        apart.step()
    for x, y in zip([x for p, (_, cut) in cuts for x in cut(p)], parts, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("power", [0.25, 0.5])
def test_a_power_of_the_spectrum(gpu: Gpu, algorithm: str, power: float) -> None:
    """Of the first step's gradients, tall, wide and stacked, of any size, against the singular value decomposition."""
    params = [nn.Parameter(torch.zeros(*shape, device=gpu.device)) for shape in ((24, 40), (2, 40, 24), (130, 150))]
    optimizer = SpectralMomentum(params, lr=0.5, power=power, backend=gpu.backend, ns_algorithm=algorithm)
    for p, factor in zip(params, (1e-12, 1.0, 1e6), strict=True):
        p.grad = make_grad(p, 3) * factor
    optimizer.step()
    for p in params:
        assert p.grad is not None
        U, S, Vh = torch.linalg.svd(p.grad.double(), full_matrices=False)
        exact = (U * S[..., None, :] ** power) @ Vh
        assert ((p.detach() / -0.5 - exact).norm() / exact.norm()) < 0.06


def test_launches_are_the_plan_s(gpu: Gpu) -> None:
    *_, muon = stepped(gpu.backend, steps=1, device=gpu.device)
    plan = muon.plan()
    assert {b.backend for b in plan.buckets} == {gpu.backend}
    assert [b.fused for b in plan.buckets] == [True, True, False, False]
    assert gpu.launched() == plan.launches


def test_the_ledger_counts_what_is_launched(gpu: Gpu) -> None:
    shapes = [(s[-2], s[-1], 3 if len(s) == 3 else 1) for s in SHAPES]
    stepped(gpu.backend, steps=1, device=gpu.device)
    assert ledger(shapes)[f"muon_kernels, {gpu.backend}"].launches == gpu.launched()


def test_a_learning_rate_on_the_device(gpu: Gpu) -> None:
    """Read by the kernel, so that a captured graph follows it."""
    G = torch.randn(2, 20, 30).to(gpu.device)
    X = orthogonalize(G, backend=gpu.backend).bfloat16()
    results = []
    for lr, decay in ((0.5, 0.25), (torch.tensor(0.5, device=G.device), torch.tensor(0.25, device=G.device))):
        p = G.clone()
        at = layout(p.shape, p.stride(), None, ())
        assert at is not None
        backends.get(gpu.backend).apply_update(ApplyUpdate([Matrices(p, at)], X, lr, decay, [1.0, 2.0]))
        results.append(p)
    assert torch.equal(*results)


def test_a_captured_step_replays(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA graph: new gradients and a new learning rate, written where the old ones were, take effect."""
    monkeypatch.setattr(options, "on_host", lambda value: not isinstance(value, Tensor))
    captured_steps_replay(gpu)


def test_a_captured_step_replays_when_the_workspace_has_grown(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's own is not given back: others write there, and a replay would write to what is theirs."""
    monkeypatch.setattr(options, "on_host", lambda value: not isinstance(value, Tensor))
    replays_after_growth(gpu, [(130, 132)], (136, 160), 1 << 23)


def test_autograd_sees_that_tensors_were_written(gpu: Gpu) -> None:
    """A graph that saved a parameter before the step must not run backward on what the step made of it."""
    params = [
        nn.Parameter(torch.randn(*s, device=gpu.device)) for s in ((24, 40), (130, 150))
    ]  # in one launch, and in several
    muon = Muon(params, backend=gpu.backend)
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


def test_orthogonalize_in_a_compiled_function(gpu: Gpu) -> None:
    G = torch.randn(2, 20, 30, device=gpu.device)
    f = lambda G: orthogonalize(2 * G, backend=gpu.backend).sin()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(f, backend="aot_eager", fullgraph=True)(G), f(G))


def test_a_step_without_memory_changes_nothing(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step allocates it allocates before it writes."""
    params = make_params(gpu.device)
    muon = Muon(params, backend=gpu.backend)
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
