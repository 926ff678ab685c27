"""Muon's variants: what comes between the orthogonalized update and the parameter, against plain float64.

The updates themselves are taken from plain Muon, which test_optimizer.py judges: a second optimizer without options
steps parameters of zeros by the same gradients.
"""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from checks.random_bits import random_bits, rounded_by, windows
from checks.training import same, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muon_kernels import Muon, MuonAdamW, backends, memory, orthogonalize, reference, spectral_power
from muon_kernels import options as options_of
from muon_kernels.coefficients import DEFAULT, resolve
from muon_kernels.layout import Matrices, layout
from muon_kernels.optimizers.scalars import peak_lr
from muon_kernels.scaling import WEIGHT_DECAY_FORMS, decayed
from muon_kernels.split import equal
from muon_kernels.stages import second_moment, signs, sums
from muon_kernels.stages.second_moment import FORMS, SecondMoment
from muon_kernels.stages.signs import Signs, take_signs
from muon_kernels.stages.stage import floats_for
from muon_kernels.verbs import ApplyOptions, ApplyUpdate

MAKERS: dict[str, Callable[[], Tensor]] = {
    "wide": lambda: torch.randn(24, 40),
    "another": lambda: torch.randn(24, 40),
    "tall": lambda: torch.randn(40, 24),
    "strided": lambda: torch.randn(48, 80)[::2, ::2].T,
    "square": lambda: torch.randn(16, 16),
    "row": lambda: torch.randn(1, 9),
    "batch": lambda: torch.randn(3, 40, 24),
    "strided batch": lambda: torch.randn(24, 2, 40).movedim(1, 0),
    "convolution": lambda: torch.randn(12, 4, 3, 5),
    "channels last": lambda: torch.randn(12, 3, 5, 4).permute(0, 3, 1, 2),
    "no strides": lambda: torch.randn(40, 4, 2, 3)[:, :, :, ::2],
    "column": lambda: torch.randn(11, 1),
}
STEPS = 3
# X is rounded to bf16 once more where it was scaled, and twice by "element".
ROUNDED = {"neuron": 2.0**-8, "element": 2.0**-7, None: 0.0}


def parameters(dtype: torch.dtype = torch.float32, names: Sequence[str] = tuple(MAKERS)) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(MAKERS[name]().to(dtype)) for name in names]


def feed(params: Sequence[nn.Parameter], t: int) -> None:
    """Gradients of step t, large in some rows."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * t + i)
        g = torch.randn(p.shape, generator=generator)
        g.view(g.shape[0], -1)[::3] *= 5
        p.grad = g.to(p.dtype)


def updates(params: Sequence[nn.Parameter], steps: int = STEPS, **options: Any) -> list[list[Tensor]]:
    """NS(D) of every parameter and step, in float64."""
    own = [nn.Parameter(torch.zeros_like(p)) for p in params]
    muon = Muon(own, lr=1.0, weight_decay=0.0, adjust_lr_fn="none", **options)
    taken = []
    for t in range(steps):
        feed(own, t)
        for p in own:
            p.data.zero_()
        muon.step()
        taken.append([-p.detach().double() for p in own])
    return taken


def as_matrices(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1)[None] if t.ndim == 4 else t.reshape(-1, *t.shape[-2:])


def normalized(form: str, U: Tensor, V: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """NorMuon's or AdaMuon's U and V in float64, as their papers write them, for any parameter."""
    u = as_matrices(U)
    square = u.square() if form == "element" else u.square().mean(-1, keepdim=True)
    V = beta2 * V + (1 - beta2) * square
    changed = u / (V.sqrt() + (1e-8 if form == "element" else 1e-10))
    kept = u.norm(dim=(-2, -1), keepdim=True) / changed.norm(dim=(-2, -1), keepdim=True)
    return (changed * kept.nan_to_num(0.0)).reshape(U.shape), V


def train(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], start: int, stop: int) -> None:
    for t in range(start, stop):
        feed(params, t)
        optimizer.step()


# ---- second moments ----


@pytest.mark.parametrize("cap", [None, 20_000])
@pytest.mark.parametrize("form", FORMS)
def test_second_moment(backend: str, form: str, cap: int | None) -> None:
    """State and parameters of every shape, with a bucket of both orientations and cut into chunks."""
    options: dict[str, Any] = {"backend": backend, "max_workspace_bytes": cap}
    params = parameters()
    exact = [p.detach().double() for p in params]
    V: list[Tensor] = [torch.zeros(1, dtype=torch.float64)] * len(params)
    muon = Muon(params, lr=0.5, weight_decay=0.25, second_moment=form, beta2=0.8, **options)
    plan = muon.plan()
    assert cap is None or max(len(b.chunks) for b in plan.buckets) > 1
    assert not any(b.fused for b in plan.buckets) and any(form in note for note in plan.notes)
    for t, U in enumerate(updates(params, **options)):
        train(muon, params, t, t + 1)
        for i, p in enumerate(params):
            changed, V[i] = normalized(form, U[i], V[i], 0.8)
            rows, cols = as_matrices(p).shape[1:]
            moved = 0.5 * math.sqrt(max(1, rows / cols)) * changed
            expected = (1 - 0.5 * 0.25) * exact[i] - moved
            state = muon.state[p]["second_momentum_buffer"]
            assert state.dtype == torch.float32
            if form == "neuron":
                assert state.shape == ((p.shape[0], 1) if p.ndim == 4 else (*p.shape[:-1], 1))
                torch.testing.assert_close(state.double().view(-1, rows, 1), V[i], rtol=2e-5, atol=0)
            else:
                torch.testing.assert_close(as_matrices(state).double(), V[i], rtol=2e-5, atol=1e-12)
            allowed = moved.abs() * ROUNDED[form] * 1.01 + 1e-5
            assert ((p.detach().double() - expected).abs() <= allowed).all(), list(MAKERS)[i]
            exact[i] = p.detach().double()


def test_moments_of_elements_lie_as_their_stack_does(tmp_path: Path) -> None:
    """From a checkpoint too: across the rows, each operation on both takes ten times as long."""
    params = parameters()
    train(first := Muon(params, second_moment="element"), params, 0, 1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Muon(params, second_moment="element")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    train(second, params, 1, 2)
    for muon in (first, second):
        (task,) = muon._tasks.kept
        views = [V for work in task.works for chunk in work.chunks for V in chunk.second_moments]
        assert len(views) == len(params) and {V.stride(-1) for V in views} == {1}
        # Nor are they copied, but for what no strides describe in the parameter either.
        states = {s["second_momentum_buffer"].untyped_storage().data_ptr() for s in muon.state.values()}
        assert all(V.untyped_storage().data_ptr() in states for V in views)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta2", [0.0, 0.95])
def test_what_has_no_second_moment(backend: str, form: str, beta2: float) -> None:
    """A zero matrix, and zero rows of one, do not move; NaN spoils only its own matrix, of a batch too."""
    params = [nn.Parameter(torch.ones(24, 40)), nn.Parameter(torch.ones(24, 40)), nn.Parameter(torch.ones(3, 24, 40))]
    muon = Muon(params, weight_decay=0.0, second_moment=form, beta2=beta2, backend=backend)
    zero, some, batch = params
    for _ in range(STEPS):
        zero.grad, some.grad, batch.grad = torch.zeros(24, 40), torch.randn(24, 40), torch.randn(3, 24, 40)
        some.grad[3:7] = 0
        batch.grad[1, 2, 3] = torch.nan
        muon.step()
    assert torch.equal(zero, torch.ones(24, 40))
    assert torch.equal(some[3:7], torch.ones(4, 40)) and some.isfinite().all()
    assert batch[1].isnan().all() and batch[::2].isfinite().all()
    assert not (some[:3] == 1).any() and not (batch[::2] == 1).all()


def stack_with(form: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """A stack with padded rows, second moments of several parameters and scratch, in which is what nobody may use."""
    torch.manual_seed(0)
    X = torch.randn(5, 6, 11).bfloat16()[..., :8]
    moments = [torch.rand(2, 6, 1), torch.rand(3, 1, 8)] if form == "neuron" else list(torch.rand(2, 2, 6, 8))
    if form == "element":
        moments.append(torch.rand(1, 6, 8))
    return X, moments, torch.full((5 * floats_for([SecondMoment(form), Signs()], 6, 8, X.device),), torch.nan)


def go_by(monkeypatch: pytest.MonkeyPatch, in_cache: bool, block: int | None = sums.BLOCK_ON_CPU) -> None:
    """Have stacks gone over in blocks of so many elements, or at once."""
    monkeypatch.setattr(sums, "BLOCK_ON_CPU", block)
    for module in (sums, second_moment, signs):
        monkeypatch.setattr(module, "in_cache", lambda _: in_cache)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_a_large_stack(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whatever is made fp32 at a time: rows of a matrix, several matrices, or, as on a GPU, nothing."""
    results = []
    for block in (1, 97, 500, 1 << 18, None):
        go_by(monkeypatch, block is not None, block)
        X, moments, scratch = stack_with(form)
        kept = second_moment.normalize(form, X, moments, 0.9, scratch)
        assert (kept is None) == (form == "neuron" or block is None)
        factor = 1.0 if kept is None else torch.tensor(kept).view(-1, 1, 1)
        results.append([X.float() * factor, *moments])
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            torch.testing.assert_close(a, b, rtol=ROUNDED[form], atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_epsilon(form: str) -> None:
    """Where it is what an update is: the papers' own, and outside the root."""
    eps = FORMS[form].eps
    for row in (0.3, 1.0, 30.0):
        X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).mul_(eps)
        X[:, ::2] *= row
        X = X.bfloat16()
        V = torch.zeros(2, 6, 8 if form == "element" else 1)
        expected, v = normalized(form, X.double(), V.double(), 0.5)
        kept = second_moment.normalize(form, X, [V], 0.5, torch.empty(2 * SecondMoment(form).floats(6, 8, X.device)))
        factor = 1.0 if kept is None else torch.tensor(kept).view(-1, 1, 1)
        torch.testing.assert_close((X * factor).double(), expected, rtol=2.0**-7, atol=0)
        torch.testing.assert_close(V.double(), v, rtol=1e-5, atol=0)


class Allocations(TorchDispatchMode):
    """The operations that return memory of their own, with more than a number in it."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.seen.append(str(func))
        return result


@pytest.mark.parametrize("in_cache", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_no_memory_is_asked_for_in_the_midst_of_a_step(
    form: str, in_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which might not be there, with parameters written already; on a processor and as on a GPU."""
    go_by(monkeypatch, in_cache, 16)
    X, moments, scratch = stack_with(form)
    scale, norms = torch.rand(2, 5)
    with Allocations(X, *moments, scratch, scale, norms) as allocations:
        take_signs(X, scale, 1.0, norms, scratch)
        take_signs(X, None, 1.0, norms, scratch)
        second_moment.normalize(form, X, moments, 0.9, scratch)
    assert not allocations.seen
    assert not X.isnan().any() and not any(v.isnan().any() for v in moments)


def test_a_plan_counts_signs_and_second_moments(backend: str) -> None:
    """Their passes, and their memory within the cap that the user sets."""
    params = [nn.Parameter(torch.randn(24, 40)) for _ in range(6)]
    bucket = lambda **options: Muon(params, backend=backend, **options).plan().buckets[0]
    plain = bucket(second_moment="neuron")  # as plain Muon may be fused
    signed = bucket(second_moment="neuron", sign_momentum=True)
    assert signed.bytes - plain.bytes == 6 * 24 * 40 * 3 * 2 and signed.launches - plain.launches == 2
    element = bucket(second_moment="element")
    assert element.bytes - plain.bytes == 6 * 24 * 40 * (2 + 8)
    for form in FORMS:
        numbers = SecondMoment(form).floats(24, 40, torch.device("cpu"))
        alone = bucket(second_moment=form, max_workspace_bytes=20_000)
        each, signs_alone = alone.workspace_bytes // alone.slots, bucket(sign_momentum=True)
        of_signs = Signs().floats(24, 40, torch.device("cpu"))
        assert each - signs_alone.workspace_bytes // signs_alone.slots == 4 * (numbers - of_signs)
        assert alone.workspace_bytes <= 20_000 and len(alone.chunks) > 1
        with pytest.raises(ValueError, match=f"max_workspace_bytes should be at least {each} to hold one matrix"):
            bucket(second_moment=form, max_workspace_bytes=each - 1)


# ---- signs ----


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"dampened": False}], ids=str)
def test_sign_momentum(backend: str, options: dict[str, Any]) -> None:
    """AdaMuon's NS(sign(D)), in float64."""
    params = parameters()
    mu, dampened, nesterov = 0.9, options.get("dampened", True), options.get("nesterov", True)
    options = {**options, "weight_decay": 0.0, "momentum": mu, "adjust_lr_fn": "none", "backend": backend}
    muon = Muon(params, lr=1.0, sign_momentum=True, **options)
    keller = resolve(DEFAULT, None)
    M = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for t in range(STEPS):
        before = [p.detach().double() for p in params]
        train(muon, params, t, t + 1)
        for i, p in enumerate(params):
            assert p.grad is not None
            g = p.grad.double()
            M[i] = M[i] + (1 - mu) * (g - M[i]) if dampened else mu * M[i] + g
            D = M[i] if not nesterov else g + mu * (M[i] - g) if dampened else g + mu * M[i]
            U = reference.newton_schulz(as_matrices(D.sign()), keller.triples, keller.margin).reshape(p.shape)
            off = (before[i] - p.detach().double() - U).norm() / U.norm()
            assert off < 0.03, (list(MAKERS)[i], off)
            assert (orthogonalize(D, backend="eager") - U).norm() > 0.1 * U.norm()  # it would not do without signs


def test_signs_do_not_know_magnitudes(backend: str) -> None:
    """To the bit."""
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.ones(3, 24, 40)) for _ in range(2))
    p.grad = torch.randn(3, 24, 40)
    p.grad[0, :5] = 0
    q.grad = p.grad * torch.rand(3, 24, 40).add(0.1).mul(torch.tensor([1e-12, 1.0, 1e12])[:, None, None])
    for x in (p, q):
        Muon([x], momentum=0.0, sign_momentum=True, backend=backend).step()
    assert torch.equal(p, q) and not torch.equal(p[:, 5:], torch.ones(3, 19, 40))


def test_what_has_no_signs(backend: str) -> None:
    """Zero gives zero; NaN, and infinity, spoil their own matrix only."""
    for power in (0.0, 0.5):
        batch = nn.Parameter(torch.ones(5, 24, 40))
        batch.grad = torch.randn(5, 24, 40)
        batch.grad[0] = 0
        batch.grad[1, 2, 3] = torch.nan
        batch.grad[2, 3, 2] = -torch.inf
        batch.grad[3] = 0
        batch.grad[3, 5, 7] = -1e-20
        Muon([batch], lr=0.5, weight_decay=0.0, sign_momentum=True, power=power, backend=backend).step()
        assert torch.equal(batch[0], torch.ones(24, 40))
        assert batch[1:3].isnan().all() and batch[3:].isfinite().all()
        assert batch[3, 5, 7] > 1.3 and (batch[3] != 1).sum() == 1
        assert (batch[4] != 1).sum() > 900


@pytest.mark.parametrize("margin", [1.0, 1.02])
@pytest.mark.parametrize("in_cache", [True, False])
@pytest.mark.parametrize("scaled", [False, True])
def test_signs_are_scaled_to_their_norm(
    scaled: bool, in_cache: bool, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_by(monkeypatch, in_cache)
    X, _, scratch = stack_with("element")
    X[0], X[1, 2] = 0, 0
    X[2, 1, 1] = torch.nan
    scale = torch.tensor([0.0, 3.0, torch.nan, 2.0, 1e-3]) if scaled else None
    expected, norms = X.sign(), torch.empty(5)
    found = take_signs(X, scale, margin, norms, scratch)
    assert torch.equal(X[3:], expected[3:]) and torch.equal(X[:2], expected[:2])
    assert norms[torch.tensor([0, 1, 3, 4])].tolist() == pytest.approx([1, 40**0.5, 48**0.5, 48**0.5])
    assert found[2].isnan() and found[0].isfinite()
    assert found[[1, 3, 4]].tolist() == pytest.approx([1 / margin / n**0.5 for n in (40, 48, 48)])


@pytest.mark.parametrize("form", [None, *FORMS])
def test_of_a_power(backend: str, form: str | None) -> None:
    """The second moment of U Σ^½ Vᵀ, and of signs."""
    params = parameters(names=["wide", "tall", "batch"])
    exact = [p.detach().double() for p in params]
    options: dict[str, Any] = {"power": 0.5, "backend": backend}
    for sign in (False, True):
        U = updates(params, sign_momentum=sign, **options)
        muon = Muon(params, lr=0.5, weight_decay=0.0, second_moment=form, beta2=0.8, sign_momentum=sign, **options)
        V: list[Tensor] = [torch.zeros(1, dtype=torch.float64)] * len(params)
        exact = [p.detach().double() for p in params]
        for t in range(STEPS):
            train(muon, params, t, t + 1)
            for i, p in enumerate(params):
                changed = U[t][i]
                if form is not None:
                    changed, V[i] = normalized(form, changed, V[i], 0.8)
                rows, cols = as_matrices(p).shape[1:]
                moved = 0.5 * math.sqrt(max(1, rows / cols)) * changed
                allowed = moved.abs() * ROUNDED[form] * 1.01 + 3e-5
                assert ((p.detach().double() - (exact[i] - moved)).abs() <= allowed).all()
                exact[i] = p.detach().double()
    first = params[0].grad
    assert first is not None
    p = nn.Parameter(torch.zeros(24, 40))
    p.grad = first.clone()
    Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, sign_momentum=True, **options).step()
    expected = -spectral_power(first.sign(), 0.5, exact="svd")
    assert (p - expected).norm() < 0.03 * expected.norm()


# ---- weight decay ----


def test_cautious(backend: str) -> None:
    params = parameters()
    exact = [p.detach().double() for p in params]
    muon = Muon(params, lr=0.5, weight_decay=0.25, cautious=True, backend=backend)
    for t, U in enumerate(updates(params, backend=backend)):
        train(muon, params, t, t + 1)
        for i, (p, W) in enumerate(zip(params, exact, strict=True)):
            rows, cols = as_matrices(p).shape[1:]
            decays = U[i] * W >= 0
            assert 0.1 < float(decays.double().mean()) < 0.9
            expected = W * (1 - 0.125 * decays.double()) - 0.5 * math.sqrt(max(1, rows / cols)) * U[i]
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-6)
            exact[i] = p.detach().double()


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("form", WEIGHT_DECAY_FORMS)
def test_forms_of_weight_decay(backend: str, form: str, tensors: bool) -> None:
    """What decays, with a learning rate that changes, and is 0 once."""
    params = parameters(names=["wide", "tall"])
    number = torch.tensor if tensors else float
    muon = Muon(params, lr=number(0.5), weight_decay=number(0.25), weight_decay_form=form, backend=backend)
    decays: dict[str, Callable[[float], float]] = {
        "decoupled": lambda lr: lr * 0.25,
        "independent": lambda lr: 0.25 * (lr > 0),
        "scheduled": lambda lr: lr * 0.25 * lr / 0.5,
    }
    U = updates(params, 4, backend=backend)
    for t, lr in enumerate((0.5, 0.0, 0.1, 0.25)):
        before = [p.detach().double() for p in params]
        if tensors:
            muon.param_groups[0]["lr"].fill_(lr)
        else:
            muon.param_groups[0]["lr"] = lr
        train(muon, params, t, t + 1)
        for p, W, u in zip(params, before, U[t], strict=True):
            moved = lr * math.sqrt(max(1, p.shape[0] / p.shape[1])) * u
            torch.testing.assert_close(p.detach().double(), (1 - decays[form](lr)) * W - moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("lr", "dtype"), [(0.0, torch.float64), (1e-3, torch.float64), (0.5, torch.float64), (0.0, torch.float16)]
)
def test_forms_of_weight_decay_of_tensors(lr: float, dtype: torch.dtype) -> None:
    """As a device's are handed on: the step is lr, and the product what decays, where 1e-30 is 0 too."""
    expected = {"decoupled": lr * 0.25, "independent": 0.25 * (lr > 0), "scheduled": lr * 0.25 * lr / 0.5}
    for form, decay in expected.items():
        step, rate = decayed(form, *torch.tensor([lr, 0.25, 0.5], dtype=dtype))
        assert float(step) == lr and float(step * rate) == pytest.approx(decay)


def test_nothing_waits_for_numbers_on_a_device() -> None:
    """A number of the device "meta" cannot be waited for."""
    on_device = torch.empty((), device="meta")
    for form in WEIGHT_DECAY_FORMS:
        for lr, weight_decay in product((0.5, on_device), repeat=2):
            decayed(form, lr, weight_decay, on_device)


def test_peak_lr_is_what_a_group_begins_with() -> None:
    params = parameters(names=["wide", "tall", "square"])
    groups = [{"params": params[:1]}, {"params": params[1:2], "lr": 0.2}, {"params": params[2:], "peak_lr": 7.0}]
    muon = Muon(groups, lr=0.1, weight_decay_form="scheduled")
    torch.optim.lr_scheduler.LambdaLR(muon, lambda t: t / 10)
    assert [g["lr"] for g in muon.param_groups] == [0, 0, 0]
    assert [g["peak_lr"] for g in muon.param_groups] == [0.1, 0.2, 7.0]
    theirs = torch.optim.Muon(params, lr=0.3)
    torch.optim.lr_scheduler.LambdaLR(theirs, lambda t: t / 10)
    ours = Muon(params, weight_decay_form="scheduled")
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0 and ours.param_groups[0]["peak_lr"] == 0.3


@pytest.mark.parametrize("tensors", [False, True])
def test_peak_lr_of_one_cycle(tensors: bool) -> None:
    """Its largest lr, above the one that groups begin with; and a larger one that was given."""
    number = torch.tensor if tensors else float
    params, peaks = parameters(names=["wide", "tall", "square"]), [0.4, 0.2, 7.0]
    groups = [{"params": [p], "lr": number(lr)} for p, lr in zip(params, (1e-3, 0.2, 1e-3), strict=True)]
    groups[2]["peak_lr"] = 7.0
    options: dict[str, Any] = {"weight_decay": 0.25, "weight_decay_form": "scheduled", "backend": "eager"}
    muon = Muon(groups, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(muon, max_lr=[0.4, 0.2, 0.3], total_steps=4, cycle_momentum=False)
    rates = []
    for t in range(4):
        before, lrs = [p.detach().double() for p in params], [float(g["lr"]) for g in muon.param_groups]
        for p in params:
            p.grad = torch.zeros_like(p)
        muon.step()
        for p, W, lr, peak in zip(params, before, lrs, peaks, strict=True):
            torch.testing.assert_close(p.detach().double(), (1 - lr * 0.25 * lr / peak) * W, rtol=1e-6, atol=1e-7)
        rates.append(lrs[0])
        if t < 3:
            schedule.step()
    assert max(rates) > 0.3 and rates[0] < 0.02
    # A checkpoint of torch's, without a peak, has OneCycleLR's.
    theirs = torch.optim.Muon(params, lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.4, total_steps=4, cycle_momentum=False)
    ours = Muon(params, **options)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["peak_lr"] == 0.4


def test_peak_lr_of_one_cycle_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that the host may not ask for."""
    monkeypatch.setattr(options_of, "on_host", lambda value: not isinstance(value, Tensor))
    for given, peak in ((0.1, 0.4), (0.5, 0.5)):
        found = peak_lr({"peak_lr": torch.tensor(given), "max_lr": 0.4})
        assert isinstance(found, Tensor) and found.item() == pytest.approx(peak)


# ---- stochastic rounding ----


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (17, 280), (280, 17), (16, 64), (16, 513), (514, 16)], ids=str)
def test_random_bits_are_everybodys(backend: str, shape: tuple[int, int], cautious: bool) -> None:
    """To the bit, in any layout, of whole matrices and of parts, for seeds of 64 bits.

    tests/*/test_elementwise_*.py ask the GPU kernels the same.
    """
    ops = backends.get(backend)
    torch.manual_seed(0)
    m, n = sorted(shape)
    X = torch.randn(4, m, n).bfloat16()
    kept = [torch.randn(shape).bfloat16() for _ in range(4)]
    kept[0].view(-1)[0] = -0.0
    kept[1].view(-1)[0], kept[2].view(-1)[0] = math.nan, -1.5
    X[2, 0, 0], X[3, 0, 0] = 0.0, math.inf
    seed, ratios, numbers = 2**64 - 5, [1.0, 0.7, 2.0, 1.0], [3, 1 << 24, 5, 6]
    decay = torch.tensor(1 - 0.5 * 0.3, dtype=torch.float32)
    for (window, whole, here), given in zip(windows(m, n), cycle([numbers, None]), strict=False):
        params = [kept[0].clone(), kept[1].T.contiguous().T, torch.empty(2 * shape[0], 2 * shape[1]).bfloat16()]
        params[2] = params[2][::2, ::2].copy_(kept[2])
        params.append(kept[3].clone())
        at = [Matrices(p, layout(p.shape, p.stride(), None, ())) for p in params]  # type: ignore[arg-type]
        ops.apply_update(ApplyUpdate(at, X, 0.5, 0.3, ratios), ApplyOptions(cautious, True, seed, given, window))
        for i, (p, number) in enumerate(zip(params, given or range(4), strict=True)):
            W, bits = kept[i].float(), random_bits(seed, number, *whole)[here]
            bits = bits.mT if window.turned else bits  # as x has them
            x = (X[i].mT if shape[0] > shape[1] else X[i]).float()
            decayed_ = W * decay
            if cautious:
                decayed_ = decayed_.where(x * torch.ones_like(W).copysign(W) >= 0, W)
            value = (decayed_.double() - torch.tensor(0.5 * ratios[i]).double() * x.double()).float()
            expected = rounded_by(value, bits.mT if shape[0] > shape[1] else bits)
            finite = ~value.isnan()
            assert torch.equal(p.isnan(), ~finite) and torch.equal(p[finite], expected[finite]), window


def test_other_parameters_are_rounded_as_ever(backend: str) -> None:
    p, q = torch.ones(2, 8, 16)
    X = torch.randn(1, 8, 16).bfloat16()
    for t, rounding in ((p, False), (q, True)):
        at = [Matrices(t, layout(t.shape, t.stride(), None, ()))]  # type: ignore[arg-type]
        options = ApplyOptions(stochastic_rounding=rounding, seed=1)
        backends.get(backend).apply_update(ApplyUpdate(at, X, 0.5, 0.3, [1.0]), options)
    assert torch.equal(p, q)


def test_small_updates_are_not_lost(backend: str) -> None:
    """Twenty of them, each a fraction of bf16's step: in the mean all, where rounding to nearest loses each."""
    G = torch.eye(64).repeat(1, 4)  # of which NS has entries in the same places, all equal
    update = float(orthogonalize(G, backend=backend)[0, 0])
    ends = {}
    for rounding in (False, True):
        p = nn.Parameter(torch.ones(64, 256).bfloat16())
        options = {"momentum": 0.0, "nesterov": False, "stochastic_rounding": rounding, "backend": backend}
        muon = Muon([p], lr=2e-3, weight_decay=0.0, **options)
        for _ in range(20):
            p.grad = G.bfloat16()
            muon.step()
        ends[rounding] = 1 - p.detach().float()
    assert not ends[False].any()
    moved = ends[True][G.bool()]
    spread = (20 * 2e-3 * update * 2**-8 / len(moved)) ** 0.5
    assert float(moved.mean()) == pytest.approx(20 * 2e-3 * update, abs=5 * spread)


def rounded(backend: str, groups: Callable[[list[nn.Parameter]], Any], **options: Any) -> list[Tensor]:
    """What stochastic rounding made of ones, by one gradient for all, in two steps."""
    shapes = (24, 40), (16, 16), (24, 40), (40, 24), (2, 24, 40)
    params = [nn.Parameter(torch.ones(shape).bfloat16()) for shape in shapes]
    options |= {"momentum": 0.0, "nesterov": False, "stochastic_rounding": True, "backend": backend}
    muon = Muon(groups(params), lr=1e-3, weight_decay=0.0, **options)
    torch.manual_seed(0)
    G = torch.randn(24, 40)
    taken = []
    for _ in range(2):
        for p in params:
            g = G.T if p.shape == (40, 24) else G
            p.data.fill_(1.0)
            p.grad = (g[:16, :16] if p.shape == (16, 16) else g.expand(p.shape)).bfloat16()
        muon.step()
        taken += [p.detach().float().clone() for p in params]
    return taken


def test_steps_and_matrices_have_their_own_bits(backend: str) -> None:
    bits = rounded(backend, list)
    matrices = [t for p in bits for t in p.reshape(-1, *p.shape[-2:]) if t.numel() == 24 * 40]
    matrices = [t.T if t.shape[0] == 40 else t for t in matrices]
    assert len(matrices) == 10
    for i, j in product(range(10), repeat=2):
        assert (i == j) == torch.equal(matrices[i], matrices[j])


def test_every_matrix_of_every_step_has_its_own_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever groups and buckets they are in."""
    ops, seeds = backends.get(backend), []

    def seen(options: ApplyOptions, run: Callable[[], None]) -> None:
        if not memory.rehearsing():
            seeds.extend(options.seed + number for number in options.number or ())
        run()

    update, step = ops.apply_update, getattr(ops, "fused_step", None)
    monkeypatch.setattr(ops, "apply_update", lambda args, options: seen(options, lambda: update(args, options)))
    monkeypatch.setattr(ops, "fused_step", lambda args: seen(args.options, lambda: step(args)), raising=False)
    params = parameters(torch.bfloat16)
    muon = Muon([{"params": params[::2]}, {"params": params[1::2]}], stochastic_rounding=True, backend=backend)
    train(muon, params, 0, 2)
    assert len(seeds) == 2 * sum(bucket.count for bucket in muon.plan().buckets) == len(set(seeds))


def test_bits_do_not_depend_on_buckets(backend: str) -> None:
    """Not on the cut into chunks, nor on where a bucket stands among the others."""
    whole = rounded(backend, list)
    chunked = rounded(backend, list, max_workspace_bytes=20_000)
    assert all(map(torch.equal, whole, chunked))
    in_groups = lambda cut: lambda params: [{"params": params[:cut]}, {"params": params[cut:]}]
    apart = [rounded(backend, in_groups(cut)) for cut in (2, 4)]
    assert torch.equal(apart[0][0], whole[0]) and not torch.equal(apart[0][2], whole[2])
    assert not torch.equal(apart[1][4], whole[4]) and not torch.equal(apart[0][0], apart[0][2])


DECAYED: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.01, "stochastic_rounding": True}


def test_bits_do_not_depend_on_other_gradients(backend: str) -> None:
    """Nor on what is split into equal parts, or into parts of their own."""

    def stepped(present: Sequence[int], **options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = (16, 24), (3, 12, 8), (12, 8, 1, 2), (16, 24)
        params = [nn.Parameter(torch.rand(shape).bfloat16()) for shape in shapes]
        muon = Muon(params, **DECAYED, **options, backend=backend)
        for indices in (range(4), present):  # in the second step from what the first has prepared
            for i, p in enumerate(params):
                p.grad = torch.zeros_like(p) if i in indices else None
            muon.step()
        return [p.detach() for p in params]

    for options in ({}, {"split": equal(4)}):
        whole = stepped(range(4), **options)
        assert len({tuple(t.flatten()[:64].tolist()) for t in whole}) == 4
        for present in ((1, 3), (3,), (0, 2)):
            found = stepped(present, **options)
            assert all(torch.equal(found[i], whole[i]) for i in present)


def test_a_parameter_before_others_counts(backend: str) -> None:
    """Also where one without a gradient comes before those of the last step, which have been prepared."""

    def stepped(before: Sequence[nn.Parameter], later: bool) -> Tensor:
        p = nn.Parameter(torch.full((16, 24), 1.3).bfloat16())
        muon = Muon([p] if later else [*before, p], **DECAYED, backend=backend)
        for i in range(2):
            if i and later:
                muon.param_groups[0]["params"][:0] = before
            p.data.fill_(1.3)
            p.grad = torch.zeros_like(p)
            muon.step()
        return p.detach()

    before = [nn.Parameter(torch.ones(2, 8, 8).bfloat16())]
    assert torch.equal(stepped(before, later=True), stepped(before, later=False))
    assert not torch.equal(stepped(before, later=True), stepped([], later=False))


def test_groups_of_one_kind_are_stepped_as_one(backend: str) -> None:
    """With the bits of groups that are stepped by themselves."""
    results = []
    for lrs in ((0.1, 0.1), (0.1, 0.1000001)):
        params = [nn.Parameter(torch.full((16, 24), 1.3).bfloat16()) for _ in range(2)]
        groups = [{"params": [p], "lr": lr, "weight_decay": 0.05} for p, lr in zip(params, lrs, strict=True)]
        muon = Muon(groups, stochastic_rounding=True, backend=backend)
        for p in params:
            p.grad = torch.zeros_like(p)
        for _ in range(2):
            muon.step()
        results.append([p.detach() for p in params])
        assert [group["step"] for group in muon.param_groups] == [2, 2]
        assert len(muon.plan().buckets) == (1 if lrs[0] == lrs[1] else 2)
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(*results[0])


# ---- all of it ----

EVERYTHING: dict[str, Any] = {
    "lr": 0.05,
    "weight_decay": 0.5,
    "weight_decay_form": "scheduled",
    "peak_lr": 0.1,
    "cautious": True,
    "second_moment": "neuron",
    "beta2": 0.9,
}


ADAMUON = {"second_moment": "element", "sign_momentum": True}


def groups_of(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """With different options each."""
    return [
        {"params": params[:3], **EVERYTHING, "stochastic_rounding": True},
        {"params": params[3:6], **EVERYTHING, **ADAMUON, "weight_decay_form": "independent"},
        {"params": params[6:8], "stochastic_rounding": True, "cautious": True},
        {"params": params[8:]},
    ]


def test_all_options_at_once(backend: str) -> None:
    """In groups, against the formulas one after the other; a group of plain Muon stays what it is."""
    params = parameters()
    groups = groups_of(params)
    for group in groups:
        group["stochastic_rounding"] = False  # whose bits are judged above
    muon, U = Muon(groups, backend=backend), updates(params, backend=backend)
    signed = updates(params, sign_momentum=True, backend=backend)
    V: list[Tensor] = [torch.zeros(1, dtype=torch.float64)] * len(params)
    before = [p.detach().double() for p in params]
    for t in range(STEPS):
        train(muon, params, t, t + 1)
        for i, p in enumerate(params):
            group = next(g for g in muon.param_groups if any(p is q for q in g["params"]))
            update = (signed if group["sign_momentum"] else U)[t][i]
            lr, decay = group["lr"], group["lr"] * group["weight_decay"]
            if group["second_moment"] is not None:
                update, V[i] = normalized(group["second_moment"], update, V[i], group["beta2"])
            if group["weight_decay_form"] != "decoupled":
                decay = 0.5 if group["weight_decay_form"] == "independent" else 0.05 * 0.5 * 0.05 / 0.1
            keeps = torch.where(update * before[i] >= 0, 1 - decay, 1.0) if group["cautious"] else 1 - decay
            rows, cols = as_matrices(p).shape[1:]
            moved = lr * math.sqrt(max(1, rows / cols)) * update
            allowed = moved.abs() * ROUNDED[group["second_moment"]] * 1.01 + 1e-5
            assert ((p.detach().double() - (keeps * before[i] - moved)).abs() <= allowed).all(), list(MAKERS)[i]
            before[i] = p.detach().double()


def test_parts_are_stepped_as_if_they_were_apart(backend: str) -> None:
    """To the bit: second moments of elements, and random bits, are those of matrices of their own."""
    options = {**EVERYTHING, "second_moment": "element", "stochastic_rounding": True, "backend": backend}
    (whole,) = parameters(torch.bfloat16, ["tall"])
    for split, cut in ((equal(4), lambda t: t.chunk(4)), (equal(3, dim=1), lambda t: t.chunk(3, -1))):
        p = nn.Parameter(whole.detach().clone())
        parts = [nn.Parameter(x.detach().clone()) for x in cut(p)]
        together, apart = Muon([p], split=split, **options), Muon(parts, **options)
        for t in range(STEPS):
            feed([p], t)
            for x, g in zip(parts, cut(p.grad), strict=True):
                x.grad = g.clone()
            together.step()
            apart.step()
            assert all(map(torch.equal, cut(p), parts))
        V = cut(together.state[p]["second_momentum_buffer"])
        assert all(torch.equal(v, apart.state[x]["second_momentum_buffer"]) for v, x in zip(V, parts, strict=True))


def make_muon(params: list[nn.Parameter], backend: str, **defaults: Any) -> torch.optim.Optimizer:
    return Muon(groups_of(params), backend=backend, **defaults)


def make_both(params: list[nn.Parameter], backend: str, **defaults: Any) -> torch.optim.Optimizer:
    groups = [{"use_muon": True, **group} for group in groups_of(params)]
    return MuonAdamW(groups, muon_options={"backend": backend, **defaults})


@pytest.mark.parametrize("make", [make_muon, make_both])
def test_resumes_to_the_bit(backend: str, tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    whole = parameters(torch.bfloat16)
    train(uninterrupted := make(whole, backend), whole, 0, 2 * STEPS)
    params = parameters(torch.bfloat16)
    train(first := make(params, backend), params, 0, STEPS)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(params, backend)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(second.state_dict(), first.state_dict())
    moments = [s["second_momentum_buffer"] for s in second.state.values() if "second_momentum_buffer" in s]
    assert len(moments) == 6 and all(m.dtype == torch.float32 for m in moments)
    train(second, params, STEPS, 2 * STEPS)
    assert all(map(torch.equal, params, whole)) and same(second.state_dict(), uninterrupted.state_dict())
    assert [g.get("step") for g in second.param_groups] == [2 * STEPS, None, 2 * STEPS, None]
    # The steps are part of it.
    other = make(parameters(torch.bfloat16), backend)
    state = first.state_dict()
    state["param_groups"][0]["step"] = 0
    other.load_state_dict(state)
    assert other.param_groups[0]["step"] == 0


def test_a_checkpoint_without_a_second_moment(backend: str) -> None:
    """torch's, or one from before: V begins with zeros, as momentum does."""
    params = parameters(names=["wide", "tall"])
    train(theirs := torch.optim.Muon(params, lr=0.01), params, 0, 2)
    ours = Muon(params, second_moment="neuron", cautious=True, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["second_moment"] == "neuron" and ours.param_groups[0]["cautious"]
    train(ours, params, 2, 3)
    assert all(s["second_momentum_buffer"].shape == (len(p), 1) for p, s in ours.state.items())
    back = torch.optim.Muon(params)
    back.load_state_dict(ours.state_dict())
    train(back, params, 3, 4)


@pytest.mark.parametrize(
    ("form", "moment"),
    [
        ("neuron", torch.zeros(24, 40)),
        ("element", torch.zeros(24, 1)),
        ("neuron", torch.zeros(24, 1, dtype=torch.bfloat16)),
        ("neuron", torch.zeros(24)),
    ],
)
def test_a_second_moment_that_does_not_fit(backend: str, form: str, moment: Tensor) -> None:
    """In a checkpoint or in the state: nothing changes."""
    params = parameters(names=["wide"])
    train(muon := Muon(params, second_moment=form, backend=backend), params, 0, 1)
    state = copy.deepcopy(muon.state_dict())
    state["state"][0]["second_momentum_buffer"] = moment
    before = snapshot(muon, params)
    with pytest.raises(
        ValueError, match=rf"second_momentum_buffer should be of size .* for second_moment='{form}' but"
    ):
        muon.load_state_dict(state)
    assert same(before, snapshot(muon, params))
    kept = muon.state[params[0]]["second_momentum_buffer"]
    muon.state[params[0]]["second_momentum_buffer"] = moment
    feed(params, 1)
    with pytest.raises(ValueError, match="delete it from the state to start anew"):
        muon.step()
    muon.state[params[0]]["second_momentum_buffer"] = kept
    assert same(before, snapshot(muon, params))
    train(muon, params, 1, 2)
    assert not same(before, snapshot(muon, params))


def test_a_failed_step_changes_nothing(backend: str) -> None:
    params = parameters(torch.bfloat16)
    train(muon := make_muon(params, backend), params, 0, 1)
    before = snapshot(muon, params)
    feed(params, 1)
    params[-1].grad = params[-1].grad.to_sparse()  # type: ignore[index]
    with pytest.raises((TypeError, RuntimeError)):
        muon.step()
    assert same(before, snapshot(muon, params))
    untouched = make_muon(fresh := parameters(torch.bfloat16), backend)
    feed(fresh, 1)
    fresh[-1].grad = fresh[-1].grad.to_sparse()  # type: ignore[index]
    with pytest.raises((TypeError, RuntimeError)):
        untouched.step()
    assert not untouched.state and "step" not in untouched.param_groups[0]


def test_options_may_change_between_steps(backend: str) -> None:
    """One that is switched off leaves plain Muon, and its state for later."""
    params, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    ours, theirs = Muon(params, **EVERYTHING, stochastic_rounding=True, backend=backend), Muon(plain, backend=backend)
    train(ours, params, 0, 1)
    train(theirs, plain, 0, 1)
    for p, q in zip(params, plain, strict=True):
        assert not torch.equal(p, q)
        p.data.copy_(q)
    group = ours.param_groups[0]
    group.update({key: value for key, value in theirs.param_groups[0].items() if key != "params"})
    train(ours, params, 1, 2)
    train(theirs, plain, 1, 2)
    assert all(map(torch.equal, params, plain)) and group["step"] == 1
    group["second_moment"] = "neuron"
    train(ours, params, 2, 3)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cautious": 1}, TypeError, "cautious should be True or False but is: 1"),
    ({"stochastic_rounding": "yes"}, TypeError, "stochastic_rounding should be True or False but is: 'yes'"),
    (
        {"stochastic_rounding": True},
        TypeError,
        "stochastic_rounding is of torch.bfloat16 parameters but one is of: torch.float32",
    ),
    ({"weight_decay_form": "l2"}, ValueError, "should be one of 'decoupled', 'independent', 'scheduled' but is: 'l2'"),
    ({"weight_decay_form": ["l2"]}, ValueError, "weight_decay_form should be one of"),
    ({"weight_decay_form": None}, ValueError, "but is: None"),
    ({"weight_decay_form": "scheduled", "lr": 0.0}, ValueError, "peak_lr should be > 0 for weight_decay_form="),
    ({"peak_lr": -1.0}, ValueError, "peak_lr should be >= 0 but is: -1.0"),
    ({"peak_lr": "big"}, TypeError, "peak_lr should be a number but is: 'big'"),
    ({"second_moment": "row"}, ValueError, "second_moment should be one of None, 'neuron', 'element' but is: 'row'"),
    ({"second_moment": True}, ValueError, "but is: True"),
    ({"sign_momentum": None}, TypeError, "sign_momentum should be True or False but is: None"),
    (
        {"second_moment": "element", "power": 1.0},
        ValueError,
        "second_moment should be None where power is 1, which is SGD in torch, but is: 'element'",
    ),
    ({"cautious": True, "power": 1.0}, ValueError, "cautious should be False where power is 1, which is SGD in torch"),
    ({"sign_momentum": True, "power": 1.0}, ValueError, "sign_momentum should be False where power is 1"),
    ({"stochastic_rounding": True, "power": 1.0}, ValueError, "stochastic_rounding should be False where power is 1"),
    ({"beta2": 1.0}, ValueError, "beta2 should be < 1 but is: 1.0"),
    ({"beta2": -0.1}, ValueError, "beta2 should be >= 0 but is: -0.1"),
    ({"beta2": float("nan")}, ValueError, "beta2 should be >= 0 but is: nan"),
]


@pytest.mark.parametrize(("options", "error", "sentence"), BAD)
def test_bad_options(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    """In the constructor, in a group, and set between steps; nothing changes."""
    params = parameters(names=["wide"])
    with pytest.raises(error) as raised:
        Muon(params, **options)
    assert sentence in str(raised.value)
    muon = Muon(params)
    with pytest.raises(error):
        muon.add_param_group({"params": [nn.Parameter(torch.randn(4, 5))], **options})
    assert len(muon.param_groups) == 1
    before = snapshot(muon, params)
    if "lr" in options:
        options = {**options, "peak_lr": 0.0}
    kept = dict(muon.param_groups[0])
    muon.param_groups[0].update(options)
    feed(params, 0)
    with pytest.raises(error):
        muon.step()
    muon.param_groups[0].update(kept)
    assert same(before, snapshot(muon, params))


def test_a_copied_group_with_its_steps_is_taken() -> None:
    params = parameters(torch.bfloat16, ["wide"])
    train(muon := Muon(params, stochastic_rounding=True), params, 0, 2)
    assert Muon(muon.param_groups).param_groups[0]["step"] == 2
