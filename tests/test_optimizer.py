"""Muon as an optimizer: against torch.optim.Muon, the float64 reference, and itself in another arrangement."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checks import needs
from checks.yardsticks import torchs_muon_in_fp32 as torchs_muon_in_fp32
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from muon_kernels import COEFFICIENTS, Muon, MuonAdamW, backends, memory, orthogonalize, reference
from muon_kernels.checks.matrices import make
from muon_kernels.coefficients import resolve
from muon_kernels.scaling import ADJUST_LR, lr_ratio
from muon_kernels.step.run import run_iteration

SHAPES = [(48, 48), (96, 144), (64, 200), (200, 64), (33, 50)]
SPECTRA = ["gaussian", "power -1", "one large", "exponential", "rank 8"]
STEPS = 4
# Beside torch's own error, what rounding to bf16 may make of an update: the accuracy rule of test_newton_schulz.py.
FLOOR, FACTOR = 0.025, 1.3

pytestmark = pytest.mark.usefixtures("torchs_muon_in_fp32")


def parameters(shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [(0.1 * torch.randn(*shape, generator=generator)).to(dtype) for shape in shapes]


def gradients(step: int, shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A gradient a shape, of another spectrum each."""
    return [
        make(SPECTRA[i % len(SPECTRA)], shape[-2], shape[-1], tuple(shape[:-2]), dtype, seed=step)
        for i, shape in enumerate(shapes)
    ]


def copies(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(t.clone()) for t in tensors]


def step(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """One step, which must leave the gradients as they are."""
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    kept = [None if g is None else g.clone() for g in grads]
    optimizer.step()
    for g, before in zip(grads, kept, strict=True):
        assert g is None or same_bits(g, before), "a gradient was written"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal with NaN equal to itself and 0 other than -0."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a, kinds) == bits(b, kinds)).all())


def bits(t: Tensor, kinds: dict[int, torch.dtype]) -> Tensor:
    return t.detach().contiguous().view(kinds[t.element_size()])


def all_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def momenta(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    return [optimizer.state[p]["momentum_buffer"] for p in params]


def deterministic(backend: str) -> bool:
    """Whether a matrix's bits are known not to depend on its neighbours: torch's batched product promises nothing."""
    return backends.get(backend).precise_squares


def ns_error(a: Tensor, b: Tensor, start: Tensor) -> float:
    """How far two results lie apart, relative to the way from the start."""
    a, b, start = (t.detach().double() for t in (a, b, start))
    return float((a - b).norm() / (b - start).norm())


def twins(a: Sequence[Tensor], b: Sequence[Tensor], start: Sequence[Tensor], backend: str) -> None:
    """The same computation in two arrangements: equal bits, or twice the rule where torch multiplies."""
    if deterministic(backend):
        assert all_same(a, b)
    for x, y, p in zip(a, b, start, strict=True):
        assert ns_error(x, y, p) < 2 * FLOOR


def truth(start: Tensor, grads: Sequence[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Parameter and momentum after steps by the reference in float64."""
    options = {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": True,
        "eps": 1e-7,
        "adjust_lr_fn": None,
        **options,
    }
    schedule = resolve("keller", 5)
    ratio = lr_ratio(options.pop("adjust_lr_fn"), start.shape[-2], start.shape[-1])
    p, buffer = start.double(), torch.zeros_like(start, dtype=torch.float64)
    for g in grads:
        p, buffer = reference.muon_step(
            p, g.double(), buffer, coefficients=schedule.triples, margin=schedule.margin, lr_ratio=ratio, **options
        )
    return p, buffer


def as_accurate_as_torch(start: Tensor, grads: Sequence[Tensor], result: Tensor, **options: Any) -> None:
    """`result` is at most about as far from the truth as torch.optim.Muon's, for one matrix."""
    expected, _ = truth(start, grads, **options)
    (theirs,) = copies([start])
    options.pop("dampened", None)  # which makes no difference from M = 0
    optimizer = torch.optim.Muon([theirs], **options)
    for g in grads:
        theirs.grad = g.clone()
        optimizer.step()
    ours, torchs = ns_error(result, expected, start), ns_error(theirs, expected, start)
    assert ours <= max(FACTOR * torchs, FLOOR), f"{tuple(start.shape)}: {ours:.4f}, torch {torchs:.4f}"


# ------------------------------------------------------------------------------------------ torch.optim.Muon


def test_arguments_are_torchs() -> None:
    theirs = inspect.signature(torch.optim.Muon).parameters
    ours = inspect.signature(Muon).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    # torch's main branch has use_addmm in its tenth place.
    assert list(ours)[9] == "use_addmm" and ours["use_addmm"].default is False
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in {*theirs, "use_addmm"})
    p = [torch.zeros(2, 2)]
    mine, other = Muon(p).defaults, torch.optim.Muon(p).defaults
    assert {key: mine[key] for key in other} == other
    assert type(mine["ns_steps"]) is int  # so that a checkpoint holds it


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.02, "nesterov": False},
        {"lr": 0.02, "weight_decay": 0.0},
        {"lr": 0.1, "weight_decay": 2.0},
        {"lr": 0.02, "momentum": 0.0},
        {"lr": 0.02, "momentum": 0.3, "adjust_lr_fn": "match_rms_adamw"},
    ],
    ids=str,
)
def test_is_torchs_muon(backend: str, options: dict[str, Any]) -> None:
    start, grads = parameters(), [gradients(t) for t in range(STEPS)]
    ours, theirs = copies(start), copies(start)
    mine = Muon(ours, backend=backend, **options)
    other = torch.optim.Muon(theirs, **options)
    for g in grads:
        step(mine, ours, g)
        step(other, theirs, [x.clone() for x in g])
        assert all_same(momenta(mine, ours), momenta(other, theirs))
    for i, p in enumerate(ours):
        as_accurate_as_torch(start[i], [g[i] for g in grads], p, **options)


@pytest.mark.parametrize("nesterov", [True, False])
def test_not_dampened(backend: str, nesterov: bool) -> None:
    start, grads = parameters(), [gradients(t) for t in range(STEPS)]
    options = {"lr": 0.02, "momentum": 0.8, "nesterov": nesterov, "dampened": False}
    ours = copies(start)
    optimizer = Muon(ours, backend=backend, **options)
    for g in grads:
        step(optimizer, ours, g)
    for i, p in enumerate(ours):
        as_accurate_as_torch(start[i], [g[i] for g in grads], p, **options)
        _, buffer = truth(start[i], [g[i] for g in grads], **options)
        # Two roundings of fp32 a step, of numbers below sum(|g|).
        bound = STEPS * 2 * 2**-24 * sum(float(g[i].abs().max()) for g in grads)
        assert float((optimizer.state[p]["momentum_buffer"] - buffer).abs().max()) <= bound


def test_maximize_is_the_negative_gradient(backend: str) -> None:
    start, grads = parameters(), gradients(0)
    up, down = copies(start), copies(start)
    step(Muon(up, maximize=True, backend=backend), up, grads)
    step(Muon(down, backend=backend), down, [-g for g in grads])
    assert all_same(up, down)


# -------------------------------------------------------------------------------------- aliasing and precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momentum_is_not_overwritten_by_the_iteration(backend: str, dtype: torch.dtype) -> None:
    """torch 2.13 normalises a bf16 buffer in place."""
    for momentum in (0.0, 0.9):
        params, grads = copies(parameters(dtype=dtype)), [gradients(t, dtype=dtype) for t in range(3)]
        before = [p.detach().clone() for p in params]
        options: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "nesterov": False}
        optimizer = Muon(params, backend=backend, **options)
        expected = [torch.zeros_like(g) for g in grads[0]]
        for g in grads:
            step(optimizer, params, g)
            for buffer, x in zip(expected, g, strict=True):
                buffer.lerp_(x, 1 - momentum)
        # One rounding of bf16 may fall otherwise where fp32 intermediates do.
        for buffer, e in zip(momenta(optimizer, params), expected, strict=True):
            if dtype == torch.float32:
                assert same_bits(buffer, e)
            else:
                torch.testing.assert_close(buffer, e, rtol=3 * 2**-8, atol=float(e.abs().max()) * 2**-9)
        assert all_same(params, before)


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(backend: str, dtype: torch.dtype, momentum_dtype: torch.dtype | None) -> None:
    start, grads = parameters(dtype=dtype), [gradients(t, dtype=dtype) for t in range(2)]
    params = copies(start)
    options = {"lr": 0.5, "weight_decay": 0.25, "momentum": 0.5}
    optimizer = Muon(params, momentum_dtype=momentum_dtype, backend=backend, **options)
    for g in grads:
        step(optimizer, params, g)
    # Relative to the way: the direction's own error, a rounding of the momentum, one of the parameter at every step.
    rounding = 2**-9 * (dtype == torch.bfloat16), 2**-9 * ((momentum_dtype or dtype) == torch.bfloat16)
    for i, p in enumerate(params):
        assert p.dtype == dtype and optimizer.state[p]["momentum_buffer"].dtype == (momentum_dtype or dtype)
        expected, buffer = truth(start[i], [g[i] for g in grads], **options)
        (theirs,) = copies([start[i].float()])
        other = torch.optim.Muon([theirs], **options)
        for g in grads:
            step(other, [theirs], [g[i].float()])
        torchs = ns_error(theirs, expected, start[i])
        way = float((expected - start[i].double()).norm())
        rule = max(FACTOR * torchs, FLOOR) + 2 * rounding[0] * float(expected.norm() + way) / way
        # A rounded momentum is another matrix; its small singular values turn: compare where they are not amplified.
        if not rounding[1]:
            assert ns_error(p, expected, start[i]) <= rule
        got = optimizer.state[p]["momentum_buffer"].double()
        torch.testing.assert_close(
            got, buffer, rtol=2 * rounding[1] + 1e-6, atol=float(buffer.abs().max()) * (rounding[1] + 1e-6)
        )


def test_bf16_momentum_of_fp32_parameters_gives_nearly_the_same_update(backend: str) -> None:
    """Where the spectrum is flat nothing is amplified but the rounding's own size, 2^-9."""
    start = parameters([(48, 96)])
    grads = [make("flat", 48, 96)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        (p,) = copies(start)
        step(Muon([p], lr=0.5, momentum_dtype=dtype, nesterov=False, backend=backend), [p], grads)
        results.append(p)
    assert ns_error(results[0], results[1], start[0]) < 2 * FLOOR


def test_scale_of_the_gradient_does_not_matter(backend: str) -> None:
    shapes = [(48, 80), (80, 48)]
    for dtype in (torch.float32, torch.bfloat16):
        start, grads = parameters(shapes), gradients(0, shapes, dtype)
        results = {}
        for exponent in (0, -30, -20, -10, 10, 20, 30):
            params = copies([s.to(dtype).float() for s in start])
            params = [nn.Parameter(p.to(dtype)) for p in params]
            scaled = [(g.double() * 10.0**exponent).to(dtype) for g in grads]
            step(Muon(params, lr=1.0, weight_decay=0.0, backend=backend), params, scaled)
            results[exponent] = [p.detach().clone() for p in params]
        for exponent, ps in results.items():
            for p, q, s in zip(ps, results[0], start, strict=True):
                assert ns_error(p, q, s) < 2 * FLOOR, exponent


# ------------------------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradient_only_decays(backend: str, dtype: torch.dtype) -> None:
    lr, decay = 0.03, 0.7
    start = parameters([*SHAPES, (3, 20, 30)], dtype)
    params = copies(start)
    optimizer = Muon(params, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw", backend=backend)
    step(optimizer, params, [torch.zeros_like(p) for p in params])
    assert all_same(params, [s * (1 - lr * decay) for s in start])
    assert all(not buffer.any() for buffer in momenta(optimizer, params))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_spoilt_matrix_spoils_no_other(backend: str, bad: float) -> None:
    shapes = [(24, 40), (40, 24), (24, 40), (3, 24, 40), (30, 30)]
    results = []
    for spoil in (False, True):
        grads = gradients(0, shapes)
        if spoil:
            grads[2][7, 11] = bad
            grads[3][1, 0, 0] = bad
        params = copies(parameters(shapes))
        step(Muon(params, backend=backend), params, grads)
        results.append(params)
    clean, spoilt = results
    for i in (0, 1, 4):
        assert same_bits(clean[i], spoilt[i])
    for j in (0, 2):
        assert same_bits(clean[3][j], spoilt[3][j])
    assert not spoilt[2].isfinite().any()
    assert not spoilt[3][1].isfinite().any()


# ------------------------------------------------------------------------------------------------ arrangements


def test_a_stack_is_its_matrices(backend: str) -> None:
    for shape in [(5, 24, 40), (5, 40, 24)]:
        start, grads = parameters([shape]), [gradients(t, [shape])[0] for t in range(2)]
        (stack,), singles = copies(start), copies(list(start[0]))
        one, many = Muon([stack], backend=backend), Muon(singles, backend=backend)
        for g in grads:
            step(one, [stack], [g])
            step(many, singles, list(g))
        twins(list(stack), singles, list(start[0]), backend)
        assert all_same(list(momenta(one, [stack])[0]), momenta(many, singles))
        for i, p in enumerate(stack):  # and really all of them
            as_accurate_as_torch(start[0][i], [g[i] for g in grads], p)


@pytest.mark.parametrize(
    ("shape", "flatten"), [((12, 5, 3, 3), None), ((6, 4, 3, 2, 2), None), ((12, 5, 7), True), ((30, 2, 2, 2), None)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_its_flattened_matrix(
    backend: str, shape: tuple[int, ...], flatten: bool | None, channels_last: bool
) -> None:
    rows, cols = shape[0], torch.Size(shape[1:]).numel()
    (start,), grads = parameters([(rows, cols)]), [gradients(t, [(rows, cols)])[0] for t in range(2)]

    def laid(t: Tensor) -> Tensor:
        t = t.reshape(shape).clone()
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t

    conv, (matrix,) = nn.Parameter(laid(start)), copies([start])
    assert conv.is_contiguous() != channels_last
    mine, other = Muon([conv], flatten=flatten, backend=backend), Muon([matrix], backend=backend)
    for i, g in enumerate(grads):
        # Gradients lie as the parameter does or otherwise.
        step(mine, [conv], [laid(g) if i == 0 else g.reshape(shape)])
        step(other, [matrix], [g])
    if not channels_last:
        assert same_bits(conv.reshape(rows, cols), matrix)
    assert conv.stride() == laid(start).stride()
    as_accurate_as_torch(start, grads, conv.reshape(rows, cols))
    assert same_bits(momenta(mine, [conv])[0].reshape(rows, cols), momenta(other, [matrix])[0])


# A tensor and the part of it that is the parameter.
STRIDED: dict[str, Callable[[], tuple[Tensor, Callable[[Tensor], Tensor]]]] = {
    "transposed": lambda: (torch.empty(50, 30), lambda t: t.T),
    "sliced": lambda: (torch.empty(33, 57), lambda t: t[2:-1, 4:-3]),
    "sliced tall": lambda: (torch.empty(57, 33), lambda t: t[4:-3, 2:-1]),
    "every second": lambda: (torch.empty(60, 100), lambda t: t[::2, 1::2]),
    "rows far apart": lambda: (torch.empty(30, 3, 50), lambda t: t[:, 1]),
    "part of a flat buffer": lambda: (torch.empty(1700), lambda t: t[100:1600].view(30, 50)),
    "stack in the middle": lambda: (torch.empty(20, 4, 30), lambda t: t.transpose(0, 1)),
    "stack, part": lambda: (torch.empty(8, 20, 30), lambda t: t[1:7:2]),
    "convolution, unviewable": lambda: (torch.empty(20, 8, 3, 3), lambda t: t[:, ::2]),
    "convolution, permuted": lambda: (torch.empty(3, 8, 20, 3), lambda t: t.permute(2, 1, 0, 3)[:, 1:5]),
    "convolution, windows": lambda: (torch.empty(20, 4, 5, 5), lambda t: t[..., 1:4, 1:4]),
    "stacks, unviewable": lambda: (torch.empty(4, 3, 20, 30), lambda t: t[:, ::2]),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_parameters(backend: str, kind: str) -> None:
    base, part = STRIDED[kind]()
    base.copy_(0.1 * torch.randn(base.shape, generator=torch.Generator().manual_seed(1)))
    whole = base.clone()
    p = nn.Parameter(part(base))
    flatten = False if kind.startswith("stack") else None
    start = p.detach().clone(memory_format=torch.contiguous_format)
    mats = (lambda t: t.flatten(0, -3)) if kind.startswith("stack") else (lambda t: t.flatten(1)[None])
    rows, cols = mats(start).shape[-2:]
    optimizer = Muon([p], flatten=flatten, backend=backend)
    grads = [
        gradients(t, [mats(start).shape])[0].reshape(start.shape) for t in range(3)
    ]  # every step with other strides
    laid = [grads[0], part(torch.empty_like(base)).copy_(grads[1]), grads[2].mT.contiguous().mT]
    for g in laid:
        step(optimizer, [p], [g])
    assert p.stride() == part(base).stride() and p.data_ptr() == part(base).data_ptr()
    for i, result in enumerate(mats(p.detach())):
        as_accurate_as_torch(mats(start)[i], [mats(g)[i] for g in grads], result)
    part(base).copy_(part(whole))
    assert same_bits(base, whole), "memory around the parameter was written"
    assert (rows, cols) != (0, 0)


def test_gradients_may_be_expanded(backend: str) -> None:
    """As those of sum() are."""
    (start,) = parameters([(20, 30)])
    (p, q) = copies([start, start])
    step(Muon([p], backend=backend), [p], [torch.ones(()).expand(20, 30)])
    step(Muon([q], backend=backend), [q], [torch.ones(20, 30)])
    twins([p], [q], [start], backend)


def test_thin_and_empty_shapes(backend: str) -> None:
    shapes = [(1, 40), (40, 1), (1, 1), (0, 7), (7, 0), (0, 3, 4), (2, 0, 4), (20, 30)]
    start, grads = parameters(shapes), [torch.randn(s, generator=torch.Generator().manual_seed(3)) for s in shapes]
    params = copies(start)
    optimizer = Muon(params, lr=0.1, backend=backend)
    step(optimizer, params, grads)
    for s, g, p in zip(start, grads, params, strict=True):
        assert p.shape == s.shape
        if s.numel():
            as_accurate_as_torch(s, [g], p, lr=0.1)
    step(optimizer, params, grads)
    str(optimizer.plan())


def test_shapes_in_one_optimizer_do_not_mix(backend: str) -> None:
    """Stepped together as stepped alone."""
    shapes = [(24, 40), (40, 24), (3, 24, 40), (16, 16), (2, 40, 24), (24, 40), (6, 4, 2, 2)]
    start, grads = parameters(shapes), [g for g in gradients(0, [s if len(s) < 4 else (6, 16) for s in shapes])]
    grads = [g.reshape(s) for g, s in zip(grads, shapes, strict=True)]
    together, alone = copies(start), copies(start)
    step(Muon(together, backend=backend), together, grads)
    for p, g in zip(alone, grads, strict=True):
        step(Muon([p], backend=backend), [p], [g])
    twins(together, alone, start, backend)


# ------------------------------------------------------------------------------------------------ options


def test_tensor_lr(backend: str) -> None:
    start, grads = parameters(), gradients(0)
    results = []
    for lr in (2**-6, torch.tensor(2**-6), torch.tensor([2**-6]), torch.tensor(2**-6, dtype=torch.float64)):
        params = copies(start)
        optimizer = Muon(params, lr=lr, backend=backend)
        step(optimizer, params, grads)
        if isinstance(lr, Tensor):  # in place, as a captured scheduler does
            lr.fill_(2**-4)
        else:
            optimizer.param_groups[0]["lr"] = 2**-4
        step(optimizer, params, grads)
        results.append(params)
    for params in results[1:]:
        assert all_same(params, results[0])


def test_scheduler(backend: str) -> None:
    start, grads = parameters(), [gradients(t) for t in range(3)]
    params, other = copies(start), copies(start)
    optimizer = Muon(params, lr=0.1, backend=backend)
    scheduler = LambdaLR(optimizer, lambda t: (1.0, 0.25, 0.0)[min(t, 2)])
    by_hand = Muon(other, lr=0.1, backend=backend)
    for t, g in enumerate(grads):
        step(optimizer, params, g)
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.1 * (1.0, 0.25, 0.0)[t]
        before = [p.detach().clone() for p in other]
        step(by_hand, other, g)
        assert all_same(params, other)
    assert all_same(other, before)  # lr = 0


def test_groups_have_their_own_settings(backend: str) -> None:
    start, grads = parameters(), [gradients(t) for t in range(2)]
    settings: list[dict[str, Any]] = [
        {"lr": 0.1, "weight_decay": 1.0},
        {"lr": 0.02, "momentum": 0.5, "nesterov": False},
        {"ns_steps": 3, "adjust_lr_fn": "spectral", "dampened": False},
        {"ns_coefficients": "you6", "ns_steps": 6, "maximize": True},
        {"ns_algorithm": "gram", "momentum_dtype": torch.bfloat16},
    ]
    together, alone = copies(start), copies(start)
    one = Muon([{"params": [p], **s} for p, s in zip(together, settings, strict=True)], backend=backend)
    each = [Muon([p], backend=backend, **s) for p, s in zip(alone, settings, strict=True)]
    for g in grads:
        step(one, together, g)
        for optimizer, p, x in zip(each, alone, g, strict=True):
            step(optimizer, [p], [x])
    assert all_same(together, alone)
    assert len({float((p.detach() - s).norm()) for p, s in zip(together, start, strict=True)}) == len(start)


@pytest.mark.parametrize("coefficients", [*COEFFICIENTS, "list", "one"])
def test_coefficients(backend: str, coefficients: str) -> None:
    """From W = 0 without momentum and decay, W = -NS(G); `orthogonalize` is judged in test_newton_schulz.py."""
    given: Any = {"list": [(3.0, -3.2, 1.2), (1.875, -1.25, 0.375)], "one": (2.0, -1.5, 0.5)}.get(
        coefficients, coefficients
    )
    grads = gradients(0)
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    optimizer = Muon(
        params,
        lr=1.0,
        weight_decay=0.0,
        momentum=0.0,
        ns_coefficients=given,
        adjust_lr_fn="none",
        backend=backend,
    )
    step(optimizer, params, grads)
    expected = [-orthogonalize(g, given, backend=backend) for g in grads]
    twins(params, expected, [torch.zeros_like(g) for g in grads], backend)


def test_coefficients_change_between_steps(backend: str) -> None:
    grads = gradients(0)
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    optimizer = Muon(params, lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="none", backend=backend)
    step(optimizer, params, grads)
    group = optimizer.param_groups[0]
    for name, steps in (("you6", 6), ("polar_express", 6), ("polar_express", 5)):
        group.update(ns_coefficients=name, ns_steps=steps, lr=0.5)
        before = [p.detach().clone() for p in params]
        step(optimizer, params, grads)
        for p, b, g in zip(params, before, grads, strict=True):
            expected = b.double() - 0.5 * orthogonalize(g, name, steps, backend=backend).double()
            if deterministic(backend):
                torch.testing.assert_close(p.double(), expected, rtol=0, atol=2**-22)  # |W| < 4 in fp32
            assert ns_error(p, expected, b) < 2 * FLOOR


def test_a_record_of_products_is_of_one_scale(backend: str) -> None:
    """Matrices that a rank steps alone, and those whose slices it is sent, may share stacks but not their scales."""
    p = nn.Parameter(torch.zeros(24, 40))
    muon = Muon([p], backend=backend, power=0.5)  # which is not fused
    p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    muon.step()
    (work,) = next(iter(muon._tasks.kept)).works
    stacks, results = muon._workspace.stacks(work, 1), []
    for scale in (torch.tensor([0.5]), torch.tensor([0.25])):
        stacks.X.copy_(p.grad / p.grad.norm() / scale)
        assert stacks.blend is not None
        stacks.blend.norms.fill_(1)
        results.append(run_iteration(work, stacks, scale).clone())
    assert results[0].norm() > 0 and torch.equal(*results)


def own_rule(rows: int, cols: int) -> float:
    return rows / (cols + 1)


def seven(rows: int, cols: int) -> float:
    return 7.0


@pytest.mark.parametrize("name", [None, *ADJUST_LR, "callable"])
def test_adjust_lr(backend: str, name: str | None) -> None:
    given: Any = own_rule if name == "callable" else name
    ratios = {
        None: lambda a, b: max(1.0, a / b) ** 0.5,
        "original": lambda a, b: max(1.0, a / b) ** 0.5,
        "match_rms_adamw": lambda a, b: 0.2 * max(a, b) ** 0.5,
        "spectral": lambda a, b: (a / b) ** 0.5,
        "spectral_unclamped": lambda a, b: (a / b) ** 0.5,
        "none": lambda a, b: 1.0,
        "callable": lambda a, b: a / (b + 1),
    }
    shapes = [(20, 30), (30, 20), (2, 30, 20), (12, 2, 3, 4)]
    grads = [g.reshape(s) for g, s in zip(gradients(0, [*shapes[:3], (12, 24)]), shapes, strict=True)]
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    options: dict[str, Any] = {"momentum": 0.0, "backend": backend}
    step(Muon(params, lr=0.1, weight_decay=0.5, adjust_lr_fn=given, **options), params, grads)
    plain = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    step(Muon(plain, lr=1.0, adjust_lr_fn="none", **options), plain, grads)
    for p, q, (rows, cols) in zip(params, plain, [(20, 30), (30, 20), (30, 20), (12, 24)], strict=True):
        torch.testing.assert_close(p.data, 0.1 * ratios[name](rows, cols) * q.data, rtol=2**-22, atol=0)


def test_decay_uses_lr_as_it_is(backend: str) -> None:
    """And not the one adjusted to the shape: seen where the update is 0."""
    (start,) = parameters([(40, 10)])
    (p,) = copies([start])
    step(Muon([p], lr=0.1, weight_decay=0.5, adjust_lr_fn=seven, backend=backend), [p], [start * 0])
    assert same_bits(p, start * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_algorithms(backend: str, algorithm: str) -> None:
    if algorithm == "gram" and not backends.get(backend).precise_squares:
        pytest.skip("less accurate there, which is why 'auto' does not choose it")
    start, grads = parameters(), [gradients(t) for t in range(2)]
    params = copies(start)
    optimizer = Muon(params, lr=0.1, ns_algorithm=algorithm, backend=backend)
    for g in grads:
        step(optimizer, params, g)
    assert {b.algorithm for b in optimizer.plan().buckets} == {algorithm}
    for i, p in enumerate(params):
        as_accurate_as_torch(start[i], [g[i] for g in grads], p, lr=0.1)


# ------------------------------------------------------------------------------------------- gradients that come and go


def test_missing_gradients(backend: str) -> None:
    start, grads = parameters(), [gradients(t) for t in range(4)]
    present = [(0, 1, 2), (1, 2, 3), (), (0, 1, 2, 3)]
    params, alone = copies(start), copies(start)
    optimizer = Muon(params, backend=backend)
    each = [Muon([p], backend=backend) for p in alone]
    seen: set[int] = set()
    for at, g in zip(present, grads, strict=True):
        seen |= set(at)
        step(optimizer, params, [x if i in at else None for i, x in enumerate(g)])
        assert {i for i, p in enumerate(params) if p in optimizer.state} == seen
        for i in at:
            step(each[i], [alone[i]], [g[i]])
    twins([params[i] for i in seen], [alone[i] for i in seen], [start[i] for i in seen], backend)
    assert same_bits(params[4], start[4])


def test_parameters_added_later(backend: str) -> None:
    start, grads = parameters(), gradients(0)
    params = copies(start)
    optimizer = Muon(params[:2], backend=backend)
    step(optimizer, params[:2], grads[:2])
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    step(optimizer, params, [None, None, *grads[2:]])
    alone = copies(start[2:])
    step(Muon(alone, lr=0.5, backend=backend), alone, grads[2:])
    assert all_same(params[2:], alone)


def test_closure(backend: str) -> None:
    (start,) = parameters([(20, 30)])
    p, q = copies([start, start])
    optimizer = Muon([p], backend=backend)
    target = gradients(0, [(20, 30)])[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * target).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == float((start * target).sum())
    assert Muon([q]).step() is None
    step(Muon([q], backend=backend), [q], [target])
    assert same_bits(p, q)


# ---------------------------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(backend: str, unscale_first: bool) -> None:
    start, grads = parameters(), [gradients(t) for t in range(3)]
    params, plain = copies(start), copies(start)
    optimizer, other = Muon(params, backend=backend), Muon(plain, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for g in grads:
        for p, x in zip(params, g, strict=True):
            p.grad = None
            scaler.scale((p * x).sum()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        step(other, plain, g)
    assert all_same(params, plain)
    assert all_same(momenta(optimizer, params), momenta(other, plain))
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_skips_a_step_that_overflowed(backend: str, unscale_first: bool) -> None:
    start, grads = parameters(), gradients(0)
    params = copies(start)
    optimizer = Muon(params, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    grads[3][5, 5] = torch.inf
    for p, x in zip(params, grads, strict=True):
        scaler.scale((p * x).sum()).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all_same(params, start)
    assert not optimizer.state


# -------------------------------------------------------------------------------------------------------- workspace

CHUNKED = [(24, 40), (3, 24, 40), (40, 24), (4, 40, 24), (24, 40), (2, 3, 24, 40), (10, 10)]


def chunked(backend: str, cap: int | None) -> tuple[list[Tensor], list[Tensor], Muon]:
    start, grads = parameters(CHUNKED), [gradients(t, CHUNKED) for t in range(2)]
    params = copies(start)
    optimizer = Muon(params, flatten=False, max_workspace_bytes=cap, backend=backend)
    for g in grads:
        step(optimizer, params, g)
    return params, momenta(optimizer, params), optimizer


@pytest.mark.parametrize("matrices", [1, 2, 5, 7])
def test_chunks_change_nothing(backend: str, matrices: int) -> None:
    torch.set_num_threads(5)  # too many for a fused step, which needs no chunks
    params, buffers, optimizer = chunked(backend, None)
    (bucket,) = (b for b in optimizer.plan().buckets if b.shape == (24, 40))
    assert bucket.count == 16 and bucket.chunks == (16,)
    cap = matrices * bucket.workspace_bytes // bucket.count
    small, small_buffers, optimizer = chunked(backend, cap)
    (bucket,) = (b for b in optimizer.plan().buckets if b.shape == (24, 40))
    assert sum(bucket.chunks) == 16 and max(bucket.chunks) <= matrices
    assert optimizer.plan().workspace_bytes <= cap
    twins(small, params, parameters(CHUNKED), backend)
    assert all_same(small_buffers, buffers)


def test_a_fused_step_changes_nothing(backend: str) -> None:
    """But the workspace, which holds a matrix for each thread. Threads may change between steps."""
    results = []
    for counts in ((2, 2), (5, 5), (2, 5), (5, 2)):
        start, grads = parameters(CHUNKED), [gradients(t, CHUNKED) for t in range(2)]
        params = copies(start)
        optimizer = Muon(params, flatten=False, backend=backend)
        for threads, g in zip(counts, grads, strict=True):
            torch.set_num_threads(threads)
            step(optimizer, params, g)
        (bucket,) = (b for b in optimizer.plan().buckets if b.shape == (24, 40))
        assert bucket.fused == (counts[-1] == 2 and backends.get(backend).symmetric_products)
        if bucket.fused:
            assert (bucket.slots, bucket.launches) == (2, 1)
        results.append(params + momenta(optimizer, params))
    if backends.get(backend).symmetric_products:  # torch's own products may differ by thread count
        for result in results[1:]:
            assert all_same(result, results[0])


def test_a_fused_step_goes_on_in_a_larger_workspace(backend: str) -> None:
    """What is kept from step to step must not point into the workspace that was."""
    results = []
    for threads in (2, 5):
        torch.set_num_threads(threads)
        params = copies(parameters([(24, 40)] * 10))
        optimizer = Muon(params, backend=backend)
        step(optimizer, params, gradients(0, [(24, 40)] * 10))
        more = copies(parameters([(300, 300)] * 2))
        optimizer.add_param_group({"params": more})
        params += more
        for t in (1, 2):
            step(optimizer, params, gradients(t, [(24, 40)] * 10 + [(300, 300)] * 2))
        results.append(params)
    if backends.get(backend).symmetric_products:
        assert all_same(*results)


ASKED: list[tuple[int, int]] = []


def asked(rows: int, cols: int) -> float:
    ASKED.append((rows, cols))
    return 1.0


def test_a_rule_is_asked_once(backend: str) -> None:
    ASKED.clear()
    p = torch.randn(8, 12)
    optimizer = Muon([p], adjust_lr_fn=asked, backend=backend)
    for t in range(3):
        step(optimizer, [p], gradients(t, [(8, 12)]))
    assert ASKED == [(8, 12)]


def test_a_negation_that_torch_has_put_off(backend: str) -> None:
    """Strides do not tell of it: in gradients, parameters and arguments."""
    z = torch.complex(torch.randn(8, 12), torch.randn(8, 12)).conj().imag
    assert z.is_neg()
    torch.testing.assert_close(orthogonalize(z, backend=backend), orthogonalize(z.clone(), backend=backend))
    results = []
    for grad in (torch.ones(8, 12), z, z.clone()):
        p = torch.zeros(8, 12)
        optimizer = Muon([p], backend=backend)
        step(optimizer, [p], [torch.ones(8, 12)])
        step(optimizer, [p], [grad])
        results.append(p)
    assert torch.equal(results[1], results[2]) and not torch.equal(results[0], results[1])
    q, twin = z.detach(), z.clone()
    for p in (q, twin):
        step(Muon([p], backend=backend), [p], [torch.ones(8, 12)])
    assert torch.equal(q, twin)


def test_workspace_is_as_planned(backend: str, workspace_blocks: list[int]) -> None:
    """And is kept: the second step allocates none."""
    for shapes in ([(24, 40)] * 8, [(64, 64), (8, 100), (3, 30, 20)]):
        workspace_blocks.clear()
        params = copies(parameters(shapes))
        grads = [torch.ones_like(p) for p in params]
        optimizer = Muon(params, backend=backend)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        assert max(workspace_blocks) == optimizer.plan().workspace_bytes
        held = len(workspace_blocks)
        optimizer.step()
        assert len(workspace_blocks) == held


MEASURE = """
import os, resource, torch
from muon_kernels import Muon
torch.set_num_threads(5)  # too many for a fused step, which needs no large workspace

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

params = [torch.nn.Parameter(torch.zeros(512, 768)) for _ in range(16)]
for p in params:
    p.grad = torch.randn(1, 768).expand(512, 768).clone()
optimizer = Muon(params, ns_steps=1, backend="cpu", max_workspace_bytes=4 << 20)
optimizer.step()  # now there is everything but a large workspace
small = optimizer.plan().workspace_bytes
optimizer.param_groups[0]["max_workspace_bytes"] = 1 << 30
# What ran before may have been larger for a moment: fill up to that mark.
ballast = torch.ones(max(0, peak() - rss()), dtype=torch.uint8)
before = max(rss(), peak())
optimizer.step()
print(peak() - before, optimizer.plan().workspace_bytes, small, optimizer.plan().buckets[0].chunks)
"""


@needs.cpu_kernels
def test_resident_memory_grows_by_the_workspace() -> None:
    out = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
    grown, planned, small = map(int, out.split()[:3])
    assert planned > 10 * small
    # The small block goes when the large one comes.
    assert planned - 2 * small - 0.1 * planned <= grown <= 1.1 * planned


# ----------------------------------------------------------------------------------- what torch expects of an optimizer


def test_versions_are_counted(backend: str) -> None:
    """So that a backward pass through a parameter that was stepped meanwhile is refused."""
    p = nn.Parameter(parameters([(20, 30)])[0])
    unviewable = nn.Parameter(torch.ones(20, 8, 3, 3)[:, ::2])
    optimizer = Muon([p, unviewable], backend=backend)
    before = p._version, unviewable._version
    loss = (p**2).sum()
    step(optimizer, [p, unviewable], [torch.ones_like(p), torch.ones(20, 4, 3, 3)])
    assert p._version > before[0] and unviewable._version > before[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_of_the_optimizer_go_on(backend: str, how: str) -> None:
    start, grads = parameters(), [gradients(t) for t in range(3)]
    params = copies(start)
    optimizer = Muon(params, lr=0.1, momentum=0.5, backend=backend)
    step(optimizer, params, grads[0])
    for p in params:
        p.grad = None
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    others = twin.param_groups[0]["params"]
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(params, others, strict=True))
    before = [p.detach().clone() for p in params]
    for g in grads[1:]:
        step(twin, others, g)
    assert all_same(params, before)
    for g in grads[1:]:
        step(optimizer, params, g)
    assert all_same(params, others)


def test_data_may_move(backend: str) -> None:
    """Cached addresses must not outlive the memory: p.data = ... is what FSDP and .to() do."""
    start, grads = parameters(), [gradients(t) for t in range(3)]
    params, still = copies(start), copies(start)
    optimizer, other = Muon(params, backend=backend), Muon(still, backend=backend)
    olds = []
    for t, g in enumerate(grads):
        step(optimizer, params, g)
        step(other, still, g)
        assert all_same(params, still)
        for p in params:
            old = p.data
            olds.append((old, old.clone()))
            p.data = old.clone()
            if t:
                state = optimizer.state[p]
                state["momentum_buffer"] = state["momentum_buffer"].clone()
    assert all(same_bits(old, kept) for old, kept in olds), "memory was written that the parameter had left"


def test_gradients_may_move(backend: str) -> None:
    start = parameters()
    laid: list[Callable[[Tensor], Tensor]] = [
        lambda g: g.clone(),
        lambda g: g.clone(),
        lambda g: g.T.contiguous().T,
        lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
        lambda g: g.clone(),
    ]
    grads = [gradients(t) for t in range(len(laid))]
    params = copies(start)
    optimizer = Muon(params, backend=backend)
    for how, g in zip(laid, grads, strict=True):
        step(optimizer, params, [how(x) for x in g])
    for i, p in enumerate(params):
        as_accurate_as_torch(start[i], [g[i] for g in grads], p)


def test_a_step_that_raises_changes_nothing(backend: str) -> None:
    start, grads = parameters(), gradients(0)
    for steps_before in (0, 1):
        params = copies(start)
        optimizer = Muon([{"params": params[:3]}, {"params": params[3:]}], backend=backend)
        for _ in range(steps_before):
            step(optimizer, params, grads)
        before = [p.detach().clone() for p in params]
        buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in params if p in optimizer.state]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        params[-1].grad = grads[-1].to_sparse()
        with pytest.raises(TypeError, match="gradient should be dense, not sparse"):
            optimizer.step()
        assert all_same(params, before)
        assert len(optimizer.state) == len(buffers)
        assert all_same([s["momentum_buffer"] for s in optimizer.state.values()], buffers)
        params[-1].grad = grads[-1]
        optimizer.step()  # and it goes on
        fresh = copies(start)
        other = Muon(fresh, backend=backend)
        for _ in range(steps_before + 1):
            step(other, fresh, grads)
        twins(params, fresh, start, backend)


def test_coefficients_changed_in_place_are_seen() -> None:
    start = torch.randn(6, 9)
    steps = []
    for replace in (False, True):
        p = torch.nn.Parameter(start.clone())
        p.grad = torch.ones_like(p)
        optimizer = Muon([p], ns_coefficients=[[3.4445, -4.7750, 2.0315] for _ in range(5)])
        optimizer.step()
        coefficients = optimizer.param_groups[0]["ns_coefficients"]
        if replace:
            optimizer.param_groups[0]["ns_coefficients"] = [[1.0, 0.0, 0.0] for _ in range(5)]
        else:
            for triple in coefficients:
                triple[:] = [1.0, 0.0, 0.0]
        optimizer.step()
        steps.append(p.detach())
    assert torch.equal(*steps)


def test_a_step_in_inference_mode_leaves_what_normal_steps_can_use(backend: str) -> None:
    """Momentum, workspace and the copies of tensors that no strides describe outlive it."""
    params = [nn.Parameter(torch.ones(20, 60)), nn.Parameter(torch.ones(6, 4, 8, 3)[:, :, ::2])]
    optimizer = Muon(params, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    for p in params:
        assert not optimizer.state[p]["momentum_buffer"].is_inference()
        assert p.isfinite().all() and not (p == 1).any()


def test_memory_first_taken_in_inference_mode_is_of_use_outside(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In `orthogonalize`, which rehearses nothing before.

    torch lets views with another dtype be written even if the memory is of inference mode, but says that it does not.
    """
    monkeypatch.setattr(memory._kept, "block", None)
    G = torch.randn(20, 60)
    with torch.inference_mode():
        inside = orthogonalize(G, backend=backend)
    assert memory._kept.block is None or not memory._kept.block.is_inference()
    assert torch.equal(orthogonalize(G, backend=backend), inside)


@pytest.mark.parametrize("coefficients", ["aol", "deepseek_v4", [(2.0, -1.5, 0.5)] * 3])
def test_a_groups_own_coefficients_bring_their_number_of_steps(coefficients: Any) -> None:
    p, q, r = (nn.Parameter(torch.ones(3, 4)) for _ in range(3))
    optimizer = Muon([{"params": [p], "ns_coefficients": coefficients}, {"params": [q]}], ns_steps=7)
    expected = len(resolve(coefficients, None).triples)
    assert [group["ns_steps"] for group in optimizer.param_groups] == [expected, 7]
    with pytest.raises(ValueError, match=f"has {expected} steps but ns_steps is: 7; set ns_steps to None or"):
        optimizer.add_param_group({"params": [r], "ns_coefficients": coefficients, "ns_steps": 7})
    optimizer.add_param_group({"params": [r], "ns_coefficients": "polar_express"})  # of any length
    assert optimizer.param_groups[2]["ns_steps"] == 7


def test_a_step_is_no_part_of_a_compiled_function() -> None:
    """It would be traced into warnings and graphs that are of no use: one quiet break instead."""
    p, q = (nn.Parameter(torch.eye(20, 60)) for _ in range(2))
    compiled, plain = (
        MuonAdamW(
            [{"params": [r], "use_muon": True}, {"params": [nn.Parameter(torch.ones(3))], "use_muon": False}],
            muon_options={"lr": 0.1},
        )
        for r in (p, q)
    )
    p.grad, q.grad = torch.ones(20, 60), torch.ones(20, 60)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(compiled.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step()
            plain.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert torch.equal(p, q) and not torch.equal(p, torch.eye(20, 60))
