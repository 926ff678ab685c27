"""Checks of optimizer steps, whatever backend runs them and where; tests share them with `verify`.

Parameters are made on the processor, so that they are the same everywhere, and stepped on the device of a `Where`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends
from ..coefficients import DEFAULT, NS_STEPS, resolve
from ..optimizers.muon import Muon
from ..step.orthogonalize import orthogonalize
from . import Wrong, agree, require, within
from .matrices import SPECTRA, factors, make, spectral_truth
from .yardsticks import bf16_loop, newton_schulz, relative_error

Shape = tuple[int, ...]
# Two buckets that are stepped in one launch on a GPU, two whose products are launched one by one.
SHAPES: list[Shape] = [(24, 40), (40, 24), (3, 24, 40), (64, 64), (130, 150), (150, 130), (136, 136)]
_LR, _DECAY, _MU = 0.1, 0.5, 0.95


class Where(Protocol):
    """Place of a backend: the name of the backend, and the device of tensors."""

    @property
    def backend(self) -> str:
        """Return the name of the backend."""

    @property
    def device(self) -> str:
        """Return the device of tensors."""


class Captures(Where, Protocol):
    """Place where a step can be captured, and what was captured replayed."""

    @property
    def capture(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return what makes the context that a step is captured in."""

    @property
    def replay(self) -> Callable[[], object]:
        """Return what runs the captured step."""


def make_params(
    device: str, shapes: Sequence[Shape] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Return parameters of these shapes."""
    return [nn.Parameter(make("power -1/2", s[-2], s[-1], s[:-2], dtype).to(device)) for s in shapes]


def make_grad(p: Tensor, seed: int) -> Tensor:
    """Return a gradient of a parameter, another for another seed, in fp32."""
    return make("power -1", p.shape[-2], p.shape[-1], tuple(p.shape[:-2]), seed=seed).to(p.device)


def misses(name: str, shape: tuple[int, int], batch: Shape, device: str = "cpu", **options: str) -> list[str]:
    """Return the spectra on which the accuracy rule is broken: 1.3 times torch's error, or 2.5 % where that is less."""
    schedule = resolve(name, None)
    missed = []
    for spectrum in SPECTRA:
        U, s, V = factors(spectrum, *shape, batch=batch)
        G = ((U * s) @ V.mT).float()
        truth = spectral_truth(U, s, V, schedule.triples, schedule.margin)
        result = orthogonalize(G.to(device), name, None, **options).cpu()  # type: ignore[arg-type]
        if spectrum == "zero":
            agree(result, torch.zeros_like(G), "of zero")
            continue
        ours, torchs = relative_error(result, truth), relative_error(bf16_loop(G, schedule), truth)
        if not backends.get(options.get("backend", "cpu")).precise_squares:
            # With torch's own products this is torch's own loop but for the norm, which torch rounds to bf16. On a
            # flat spectrum the error is that of one number and the norm's last bit decides: either may be luckier.
            torchs = max(torchs, relative_error(bf16_loop(G, schedule, torch.float32), truth))
        if not ours <= max(1.3 * torchs, 0.025):
            missed.append(f"{spectrum}: {ours:.4f}, torch {torchs:.4f}")
    return missed


def zoo(where: Where, name: str, shape: tuple[int, int]) -> None:
    """Require the accuracy rule on every spectrum."""
    if missed := misses(name, shape, (1,), where.device, backend=where.backend):
        raise Wrong(f"errors above 1.3 times torch's and 2.5 %: {'; '.join(missed)}")


def _steps(params: Sequence[nn.Parameter], muon: Any, factor: float, strided: bool, steps: int) -> list[list[Tensor]]:
    """Step; return the gradients of every step."""
    grads = []
    for t in range(steps):
        for i, p in enumerate(params):
            g = (make_grad(p, 10 * t + i) * factor).to(p.dtype)
            p.grad = _apart(g) if strided else g
        grads.append([p.grad.clone() for p in params if p.grad is not None])
        muon.step()
    return grads


def _apart(t: Tensor) -> Tensor:
    """Return a copy whose rows are the columns of memory, and of these every second one."""
    wide = torch.zeros(*t.shape[:-2], t.shape[-1], 2 * t.shape[-2], dtype=t.dtype, device=t.device)
    return wide[..., ::2].mT.copy_(t)


def steps_are_exact(
    where: Where,
    shapes: Sequence[Shape] = SHAPES,
    dtype: torch.dtype = torch.float32,
    factor: float = 1.0,
    strided: bool = False,
    steps: int = 2,
) -> None:
    """Require steps to be those in float64, up to the accuracy rule for every update and the parameters' rounding.

    Args:
        where: the backend.
        shapes: of parameters.
        dtype: of parameters, gradients and momenta.
        factor: of the gradients.
        strided: whether neither parameters nor gradients are contiguous.
        steps: how many.
    """
    params = make_params(where.device, shapes, dtype)
    if strided:
        params = [nn.Parameter(_apart(p.detach())) for p in params]
    values = [p.detach().double().cpu() for p in params]
    muon = Muon(params, lr=_LR, weight_decay=_DECAY, momentum=_MU, backend=where.backend)
    grads = _steps(params, muon, factor, strided, steps)
    schedule = resolve(DEFAULT, NS_STEPS)
    for i, (p, value) in enumerate(zip(params, values, strict=True)):
        allowed, momentum = 0.0, torch.zeros_like(value)
        for of_step in grads:
            g = of_step[i].double().cpu()
            momentum = (_MU * momentum + (1 - _MU) * g).to(dtype).double()
            direction = _MU * momentum + (1 - _MU) * g
            update = newton_schulz(direction, schedule)
            torchs = relative_error(bf16_loop((direction / direction.abs().max()).float(), schedule), update)
            ratio = _LR * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
            value = (1 - _LR * _DECAY) * value - ratio * update
            rounding = 2**-8 if dtype == torch.bfloat16 else 2**-23
            allowed += max(1.3 * torchs, 0.025) * ratio * float(update.norm()) + rounding * float(value.norm())
        error = float((p.detach().double().cpu() - value).norm())
        shape = "x".join(map(str, p.shape))
        require(error <= allowed, f"{shape}: expected an error of at most {allowed:.3g}, got {error:.3g}")


def momentum_is_torchs(where: Where, shapes: Sequence[Shape] = SHAPES) -> None:
    """Require momenta to be torch.optim.Muon's, on the same device, to the bit."""
    flat = [s for s in shapes if len(s) == 2]
    ours, theirs = make_params(where.device, flat), make_params(where.device, flat)
    muon, torchs = Muon(ours, lr=_LR, backend=where.backend), torch.optim.Muon(theirs, lr=_LR)
    for params, optimizer in ((ours, muon), (theirs, torchs)):
        _steps(params, optimizer, 1.0, False, 3)
    for p, q in zip(ours, theirs, strict=True):
        one, other = (optimizer.state[t]["momentum_buffer"] for optimizer, t in ((muon, p), (torchs, q)))
        agree(one, other, f"momentum of {p.shape[0]}x{p.shape[1]}")


def zero_and_nan(where: Where, shape: tuple[int, int]) -> None:
    """Require a zero gradient to change nothing but by decay, and a NaN to spoil its own matrix only."""
    results = []
    for spoilt in (False, True):
        params = make_params(where.device, [shape] * 3)
        before = params[1].detach().clone()
        for i, p in enumerate(params):
            p.grad = make_grad(p, i)
        if spoilt:
            for p, value in ((params[0], torch.nan), (params[1], 0.0)):
                assert p.grad is not None
                p.grad[: 1 if value else None] = value
        Muon(params, lr=_LR, weight_decay=_DECAY, backend=where.backend).step()
        results.append([p.detach() for p in params])
    (_, _, alone), (nan, zero, beside) = results
    require(bool(nan.isnan().any()), "a NaN in a gradient is lost")
    decayed = (1 - _LR * _DECAY) * before.double()
    within(zero, decayed, 2**-23 * decayed.abs(), "a parameter whose gradient is zero")
    agree(beside, alone, "a matrix beside one with a NaN")


def lr_on_the_device(where: Where, shapes: Sequence[Shape] = SHAPES) -> None:
    """Require a learning rate in a tensor to do what the number does, to the bit."""
    results = []
    for value in (_LR, torch.tensor(_LR, device=where.device)):
        params = make_params(where.device, shapes)
        _steps(params, Muon(params, lr=value, backend=where.backend), 1.0, False, 2)
        results.append(params)
    for p, q in zip(*results, strict=True):
        # A number is a double on the host, a tensor fp32.
        within(p.detach(), q.detach().double(), 2**-21, "stepped with a tensor, and with a number")


class NothingWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where the host would wait for the device; keeps what is allocated, as a graph's own memory pool does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of torch, unless it waits."""
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        require(func not in waits, f"the host waits for the device: {func}")
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        return out


class _Pair:
    """Two optimizers of equal parameters, which are fed the same: the one of a `Where`, to capture, and a plain one."""

    def __init__(self, where: Where, shapes: Sequence[Shape]) -> None:
        self.where = where
        self.params, self.scalars, self.muons = [], [], []
        for _ in range(2):
            params = make_params(where.device, shapes)
            for p in params:
                p.grad = torch.empty_like(p)
            lr, decay = torch.tensor(_LR, device=where.device), torch.tensor(_DECAY, device=where.device)
            self.params.append(params)
            self.scalars.append(lr)
            self.muons.append(Muon(params, lr=lr, weight_decay=decay, backend=where.backend))

    def feed(self, t: int) -> None:
        """Write other gradients and another learning rate where those before were."""
        for params, lr in zip(self.params, self.scalars, strict=True):
            lr.fill_(_LR / (t + 1))
            for i, p in enumerate(params):
                assert p.grad is not None
                p.grad.copy_(make_grad(p, 10 * t + i))

    def compare(self, what: str) -> None:
        """Require equal parameters."""
        for p, q in zip(*self.params, strict=True):
            agree(p.detach(), q.detach(), what)


def captured_steps_replay(where: Captures, shapes: Sequence[Shape] = SHAPES) -> None:
    """Require what a captured step replays to be steps: new gradients and a new learning rate take effect."""
    pair = _Pair(where, shapes)
    captured, plain = pair.muons
    for t in range(4):
        pair.feed(t)
        plain.step()
        if t == 0:
            captured.step()
        elif t == 1:
            before = [p.detach().clone() for p in pair.params[0]]
            with where.capture(), NothingWaits() as memory:
                captured.step()
            require(bool(memory.kept), "nothing was captured")
            require(all(map(torch.equal, pair.params[0], before)), "a step that is captured also ran")
        if t:
            where.replay()
        pair.compare(f"step {t}, replayed")


def replays_after_growth(
    where: Captures, shapes: Sequence[Shape] = SHAPES, larger: Shape = (2048, 3072), bytes_: int = 1 << 30
) -> None:
    """Require a graph to stay good when the optimizer's workspace has grown and others use the memory that was its own.

    Args:
        where: the backend.
        shapes: of parameters.
        larger: of the parameter for which the workspace grows.
        bytes_: of memory, at most, that is allocated and filled before the replay.
    """
    pair = _Pair(where, shapes)
    captured, plain = pair.muons
    pair.feed(0)
    captured.step()
    plain.step()
    with where.capture(), NothingWaits() as memory:
        captured.step()
    for muon in pair.muons:
        values = torch.randn(larger, generator=torch.Generator().manual_seed(1)).to(where.device)
        p = nn.Parameter(values)
        muon.add_param_group({"params": [p]})
        p.grad = values.clone()
        muon.step()
        p.grad = None
    foreign = _of_many_sizes(bytes_, where.device)
    pair.feed(1)
    where.replay()
    require(bool(memory.kept), "nothing was captured")
    plain.step()
    pair.compare("replayed after the workspace had grown")
    require(all(bool((t == 5).all()) for t in foreign), "a replay wrote to memory that others have allocated since")


def _of_many_sizes(bytes_: int, device: str) -> list[Tensor]:
    """Return fives in blocks of 4 KiB and more, so that whatever was given back is taken again."""
    sizes = [1 << i for i in range(12, max(13, (bytes_ // 16).bit_length()))]
    return [torch.full((size // 4,), 5.0, device=device) for size in sizes for _ in range(4)]


def on_a_side_stream(where: Where, shapes: Sequence[Shape] = SHAPES) -> None:
    """Require steps on another stream to have the same bits; for a GPU."""
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        params = make_params(where.device, shapes)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _steps(params, Muon(params, lr=_LR, backend=where.backend), 1.0, False, 2)
        torch.cuda.current_stream().wait_stream(stream)
        results.append([p.detach() for p in params])
    for p, q in zip(*results, strict=True):
        agree(p, q, "stepped on a side stream")
