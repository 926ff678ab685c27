"""torch's default dtype and device are the user's: a step and a function have the same bits under any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import muon_kernels
from muon_kernels import Muon, MuonAdamW, SpectralAdam, SpectralMomentum, spectra, split
from muon_kernels import powers as spectral
from muon_kernels.stages import quantize as quantized

SHAPES = [(24, 16), (16, 24), (2, 16, 20), (8, 4, 3, 3)]
HUGE = torch.finfo(torch.float32).max * 2.0**-20


@contextmanager
def foreign(default: torch.dtype | str) -> Iterator[None]:
    """Another default dtype, or another default device: of torch, or "context" for a context."""
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        elif default == "set":
            torch.set_default_device("meta")
        with torch.device("meta" if default == "context" else "cpu") if default != "set" else torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


DEFAULTS: list[torch.dtype | str] = [torch.bfloat16, torch.float16, torch.float64, "set", "context"]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").mul_(scale).to(dtype)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(normal(i, *shape, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def both(**adamw_options: Any) -> Callable[[str], Optimizer]:
    def make(backend: str) -> Optimizer:
        vectors = [nn.Parameter(normal(9, 7)), nn.Parameter(normal(10, 5, 3))]
        groups = [{"params": params(), "use_muon": True}, {"params": vectors, "use_muon": False}]
        return MuonAdamW(groups, muon_options={"backend": backend}, adamw_options=adamw_options)

    return make


def muon(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[str], Optimizer]:
    return lambda backend: Muon(params(dtype), **{"backend": backend, **options})


BF16 = torch.bfloat16
OPTIMIZERS: dict[str, Callable[[str], Optimizer]] = {
    "plain": muon(),
    "bf16": muon(BF16, momentum_dtype=torch.float32),
    "int8": muon(momentum_dtype=torch.int8),
    "master": muon(BF16, master_weights=True),
    "neuron": muon(second_moment="neuron"),
    "neuron, split": muon(second_moment="neuron", split=split.equal(2)),
    "element": muon(second_moment="element", sign_momentum=True),
    "stochastic": muon(BF16, stochastic_rounding=True, cautious=True),
    "power 1": muon(power=1.0, maximize=True),
    "power 0.3": muon(power=0.3),
    "gram": muon(ns_algorithm="gram", ns_coefficients="polar_express", adjust_lr_fn="match_rms_adamw"),
    "scheduled": lambda backend: muon(lr=number(0.01), weight_decay_form="scheduled")(backend),
    "fp64": muon(torch.float64, backend="eager"),
    "fp16": muon(torch.float16, workspace_dtype=torch.float16, backend="eager"),
    "SpectralMomentum": lambda backend: SpectralMomentum(params(), backend=backend),
    "SpectralAdam": lambda backend: SpectralAdam(params(), power=0.25, backend=backend),
    "SpectralAdam, power 0": lambda backend: SpectralAdam(params(BF16), power=0.0, backend=backend),
    "SpectralAdam, power 1": lambda backend: SpectralAdam(params(), power=1.0, backend=backend),
    "MuonAdamW": both(),
    "MuonAdamW, unfused": both(fused=False, amsgrad=True),
}


def stepped(make: Callable[[str], Optimizer], backend: str) -> list[Tensor]:
    """Parameters and state after three steps, a plan and a load between them."""
    optimizer = make(backend)
    for step, scale in enumerate((1.0, HUGE, 1e-30)):
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                # What AdamW squares has to be of ordinary size.
                ordinary = group.get("betas") is not None or p.dtype == torch.float16
                p.grad = normal(100 * step + i, *p.shape, dtype=p.dtype, scale=1.0 if ordinary else scale)
        optimizer.step()
        if step == 1:
            optimizer.plan()  # type: ignore[attr-defined]
            optimizer.load_state_dict(optimizer.state_dict())
    found = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        for p in group["params"]:
            found += [value for _, value in sorted(optimizer.state[p].items())]
    return found


def assert_same(expected: list[Tensor], found: list[Tensor]) -> None:
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert a.device == b.device
        if a.numel() == 1 and {a.dtype, b.dtype} == {torch.float32, torch.float64}:
            assert a == b  # torch's AdamW counts its steps in double where that is the default
        else:
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps(backend: str, name: str) -> None:
    expected = stepped(OPTIMIZERS[name], backend)
    for default in DEFAULTS:
        with foreign(default):
            assert_same(expected, stepped(OPTIMIZERS[name], backend))


def test_steps_are_counted_beyond_those_that_bf16_has() -> None:
    p = nn.Parameter(torch.ones(1, 1))
    with foreign(torch.bfloat16):
        optimizer = SpectralAdam([p], power=1.0)
        p.grad = torch.ones_like(p)
        for _ in range(300):
            optimizer.step()
    assert optimizer.state[p]["step"] == 300


def functions() -> list[Tensor]:
    """What the package's functions say of fixed tensors."""
    G, W = normal(1, 3, 12, 20), normal(2, 12, 20, dtype=torch.bfloat16)
    q, k = (normal(seed, 2, 4, 9, 8) for seed in (3, 4))
    found = [muon_kernels.orthogonalize(G, backend=name) for name in ("auto", "eager")]
    found += [muon_kernels.orthogonalize(W), muon_kernels.orthogonalize(G, "polar_express", ns_algorithm="gram")]
    found += [muon_kernels.spectral_power(G, p) for p in (0.0, 0.3, 0.5, 1.0)]
    found += [muon_kernels.spectral_power(G, 0.5, exact=exact) for exact in ("svd", "coupled")]
    codes, absmax = quantized.quantize(G)
    found += [codes, absmax, quantized.dequantize(codes, absmax)]
    found += list(spectra.summary(G))
    logits = muon_kernels.max_logits(q, k, causal=True)
    weights = normal(5, 32, 16), normal(6, 32, 16)
    found += [logits, muon_kernels.qk_clip_(*weights, logits, 0.5), *weights]
    return found


def test_fits() -> None:
    """Not to the bit: LAPACK's last one depends on where memory lies."""
    expected = spectral.fit_weights(0.3)
    error = spectral.error(spectral.schedule_of(0.3))
    for default in DEFAULTS:
        with foreign(default):
            assert spectral.fit_weights.__wrapped__(0.3) == pytest.approx(expected, rel=1e-9)
            assert spectral.error(spectral.schedule_of(0.3)) == pytest.approx(error, rel=1e-9)


def test_functions() -> None:
    expected = functions()
    for default in DEFAULTS:
        with foreign(default):
            assert_same(expected, functions())


def test_groups_and_their_table() -> None:
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 7))
    expected = str(muon_kernels.param_groups(model))
    for default in DEFAULTS:
        with foreign(default):
            assert str(muon_kernels.param_groups(model)) == expected
