"""U Σ^p Vᵀ: the weights, the function on every backend, and the optimizers of arXiv 2602.04669."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muon_kernels
from muon_kernels import Muon, SpectralAdam, SpectralMomentum, paper_optimizer, spectral_power
from muon_kernels.backends import unavailable
from muon_kernels.coefficients import resolve
from muon_kernels.newton_schulz import ALGORITHMS, Square
from muon_kernels.optimizers.paper import PAPER
from muon_kernels.powers import TRIPLES, error, fit, fit_weights, schedule_of
from muon_kernels.split import equal
from muon_kernels.step.counting import Counter, count, count_iteration
from muon_kernels.step.options import StepOptions
from muon_kernels.step.plan import plan_bucket

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(unavailable(name) is not None, reason=f"{name} cannot run here"))
    for name in ("cpu", "eager")
]
POWERS = (0.25, 0.5)

SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "log-spaced": lambda n: torch.logspace(0, -3, n, dtype=torch.float64),
    "flat": lambda n: torch.ones(n, dtype=torch.float64),
    "harmonic": lambda n: (1 / torch.arange(1, n + 1, dtype=torch.float64)).clamp(min=1e-3),
    "one large": lambda n: torch.tensor([1.0] + [1e-2] * (n - 1), dtype=torch.float64),
}


def of_spectrum(S: Tensor, m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vᵀ) of a random m x n matrix."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, len(S), generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, len(S), generator=generator, dtype=torch.float64)).Q
    return U, S, V.mT


def relative(Y: Tensor, U: Tensor, S: Tensor, Vh: Tensor, p: float) -> Tensor:
    """By how much uᵢᵀ Y vᵢ differs from σᵢ^p."""
    return (torch.einsum("mi,mn,in->i", U, Y.double(), Vh) / S**p - 1).abs()


# ---- weights ----


@pytest.mark.parametrize("p", [0.125, 0.25, 0.375, 0.5, 0.75])
@pytest.mark.parametrize("m", [1, 64, 1024, 4096, 15000])
def test_weights_hold_in_exact_arithmetic(p: float, m: int) -> None:
    """However far `_measure` may leave the largest singular value below 1."""
    worst, rms = error(schedule_of(p), 1e-3, m**-0.125)
    assert worst < 0.043 and rms < 0.021


def test_weights_of_any_power() -> None:
    for p in (0.01, 0.06, 0.3, 0.9, 0.99):
        assert error(schedule_of(p)).worst < 0.054
        assert all(abs(w) < 1.1 for w in schedule_of(p).weights)


def test_iterates_do_not_explode() -> None:
    """Wherever rounding puts them, above one too."""
    for factors in itertools.product((0.93, 1.07), repeat=len(TRIPLES)):
        x = torch.linspace(0, 1, 500, dtype=torch.float64)
        for (a, b, c), factor in zip(TRIPLES, factors, strict=True):
            x = x * factor
            x = x * (a + b * x**2 + c * x**4)
            assert x.abs().max() < 1.2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func's own
def test_fit_finds_such_triples() -> None:
    triples, worst = fit((0.5,), steps=4, iterates=range(5), lowest=0.03, starts=1)
    assert worst < 0.03
    beyond = torch.linspace(0, 1.08, 500, dtype=torch.float64)
    assert all((a * beyond + b * beyond**3 + c * beyond**5).abs().max() < 1.02 for a, b, c in triples)
    weights = fit_weights(0.5, triples, tuple(range(5)), 0.03)
    sigma = torch.logspace(math.log10(0.03), 0, 1000, dtype=torch.float64)
    total, x = weights[0] * sigma, sigma
    for (a, b, c), w in zip(triples, weights[1:], strict=True):
        x = a * x + b * x**3 + c * x**5
        total += w * x
    assert (total / sigma.sqrt() - 1).abs().max() < 0.03


def test_gram_form_has_no_second_iterate() -> None:
    weights = fit_weights(0.5, TRIPLES, tuple(range(len(TRIPLES) + 1)))
    with pytest.raises(ValueError, match="no weight of the second iterate"):
        count("gram", 8, 16, schedule_of(0.5)._replace(weights=weights), True, True)


# ---- spectral_power ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (136, 160), (300, 130)])
@pytest.mark.parametrize("p", POWERS)
def test_accuracy(backend: str, algorithm: str, spectrum: str, shape: tuple[int, int], p: float) -> None:
    U, S, Vh = of_spectrum(SPECTRA[spectrum](min(shape)), *shape)
    Y = (
        spectral_power((U * S) @ Vh, p, backend=backend, ns_algorithm=algorithm)
        if backend == "eager"
        else (spectral_power(((U * S) @ Vh).float(), p, backend=backend, ns_algorithm=algorithm))
    )
    off = relative(Y, U, S, Vh, p)
    # Of equal singular values, the mean is the error of one.
    assert off.max() < 0.10 and off.square().mean().sqrt() < (0.03 if spectrum == "log-spaced" else 0.04)
    exact = (U * S**p) @ Vh
    assert (Y.double() - exact).norm() < 0.16 * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("n", [64, 256])
def test_a_singular_value_that_leads(backend: str, algorithm: str, n: int) -> None:
    """A few times as large as the others, as in the momentum of trained layers."""
    generator = torch.Generator().manual_seed(0)
    for lead in (1.5, 2, 3, 4, 6):
        noise, u, v = (torch.randn(20, *shape, generator=generator) for shape in ((n, 64), (n, 1), (1, 64)))
        G = noise + lead * u * v
        U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        exact = (U * S[:, None].sqrt()) @ Vh
        Y = spectral_power(G, 0.5, backend=backend, ns_algorithm=algorithm)
        assert ((Y - exact).norm(dim=(1, 2)) < 0.1 * exact.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("p", [0.125, 0.25, 0.5])
def test_singular_values_of_rounding(backend: str, algorithm: str, p: float) -> None:
    """Spectra that end far below what bf16 tells apart: what their powers are summed from must not spoil large ones."""
    for condition in (1e4, 1e6):
        U, S, Vh = of_spectrum(torch.logspace(0, -math.log10(condition), 96, dtype=torch.float64), 96, 300)
        S[3:8] = S[:1]
        Y = spectral_power(((U * S) @ Vh).float(), p, backend=backend, ns_algorithm=algorithm)
        large = S > 0.01
        assert relative(Y, U[:, large], S[large], Vh[large], p).max() < 0.09
        assert torch.linalg.svdvals(Y.double()).max() < 1.08


class Watched(Counter):
    """Products of squares without their diagonals are no precise ones."""

    def syrkx(self, A: Square, B: Square, *, out: Square, gamma: float = 0.0) -> None:
        assert A.diagonal is not None and B.diagonal is not None and out.diagonal is not None
        super().syrkx(A, B, out=out, gamma=gamma)

    def gemm(self, A: Square, X: Tensor | Square, **others: Any) -> None:
        assert A.diagonal is not None
        super().gemm(A, X, **others)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_products_know_what_rounding_took_from_diagonals(algorithm: str) -> None:
    """Of the sum of squares too, where it is 2^-9 at most: too little for the bounds above."""
    watched = Watched(symmetric=True, precise=True)
    count_iteration(watched, algorithm, 48, 200, schedule_of(0.5))
    assert watched.launches > 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.25, 0.5, 0.7])
def test_scale(backend: str, p: float) -> None:
    """By a power of two with an exact power, the same bits; by others, nearly."""
    G = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    Y = spectral_power(G, p, backend=backend).double()
    for factor in (2.0**-96, 2.0**-20, 2.0**4, 2.0**90, 1e-30, 1e25):
        scaled = spectral_power(G * factor, p, backend=backend).double() / factor**p
        assert (scaled - Y).abs().max() < 0.02 * Y.abs().max(), factor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_matrix_is_its_own(backend: str, algorithm: str) -> None:
    """A batch, strides, tall ones, zeros and NaN."""
    G = torch.randn(6, 70, 40, generator=torch.Generator().manual_seed(1))
    G[1], G[2, 3, 4], G[3], G[4] = 0, torch.nan, G[3] * 1e-9, G[4][:, :1] @ G[4][:1]
    Y = spectral_power(G, 0.5, backend=backend, ns_algorithm=algorithm)
    assert (Y[1] == 0).all() and Y[2].isnan().all()
    for i in (0, 3, 4, 5):
        assert Y[i].isfinite().all()
        alone = spectral_power(G[i].mT.clone().mT, 0.5, backend=backend, ns_algorithm=algorithm)
        torch.testing.assert_close(Y[i], alone, rtol=0, atol=0.03 * float(Y[i].abs().max()))
    S = torch.linalg.svdvals(G[4].double())[0]
    torch.testing.assert_close(torch.linalg.svdvals(Y[4].double())[0], S.sqrt(), rtol=0.06, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_and_repeats(backend: str) -> None:
    G = torch.randn(9, 24, 30, generator=torch.Generator().manual_seed(2))
    Y = spectral_power(G, 0.25, backend=backend)
    options = StepOptions(schedule_of(0.25))
    small = plan_bucket((24, 30), 2, options, backend, bytes_per_element=8, stepped=False).workspace_bytes
    # torch's products may round a batch of another size otherwise.
    chunked = spectral_power(G, 0.25, backend=backend, max_workspace_bytes=small)
    torch.testing.assert_close(chunked, Y, rtol=0, atol=0.02 if backend == "eager" else 0)
    assert torch.equal(spectral_power(G, 0.25, backend=backend), Y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_odd_sizes(backend: str, algorithm: str) -> None:
    """Whatever lies where in the workspace."""
    for shape in ((1, 1), (1, 3), (3, 5), (5, 3), (3, 7, 9), (1, 3, 3)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        exact = (U * S[..., None, :].sqrt()) @ Vh
        Y = spectral_power(G, 0.5, backend=backend, ns_algorithm=algorithm)
        assert (Y - exact).norm() < 0.06 * exact.norm(), shape


def test_ends() -> None:
    G = torch.randn(2, 5, 9)
    assert torch.equal(spectral_power(G, 0), muon_kernels.orthogonalize(G))
    one = spectral_power(G.mT, 1)
    assert torch.equal(one, G.mT) and one.data_ptr() != G.data_ptr() and one.is_contiguous()
    for shape in ((0, 3, 4), (2, 0, 4), (3, 0)):
        assert spectral_power(torch.ones(shape), 0.5).shape == shape
    assert spectral_power(torch.full((1, 1), -4.0), 0.5).item() == pytest.approx(-2, rel=0.06)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    U, S, Vh = of_spectrum(SPECTRA["log-spaced"](32), 32, 64)
    Y = spectral_power(((U * S) @ Vh).to(dtype), 0.5)
    assert Y.dtype == dtype
    exact = (U * S.sqrt()) @ Vh
    assert (Y.double() - exact).norm() < 0.04 * exact.norm()


@pytest.mark.parametrize("shape", [(20, 20), (12, 50), (2, 50, 12)])
@pytest.mark.parametrize("p", POWERS)
def test_references(shape: tuple[int, ...], p: float) -> None:
    """The two exact ways agree with the singular value decomposition of this file."""
    U, S, Vh = of_spectrum(SPECTRA["log-spaced"](min(shape[-2:])), *shape[-2:])
    G, wanted = ((U * S) @ Vh).expand(shape), ((U * S**p) @ Vh).expand(shape)
    torch.testing.assert_close(spectral_power(G, p, exact="svd"), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(spectral_power(G, p, exact="coupled"), wanted, rtol=0, atol=1e-9)
    assert (spectral_power(G.float(), p, exact="svd") - wanted).abs().max() < 1e-5
    assert (spectral_power(G.float(), p, exact="coupled") - wanted).norm() < 0.03 * wanted.norm()


def test_references_of_singular_matrices() -> None:
    G = torch.outer(torch.arange(1.0, 6), torch.ones(7)).double()
    wanted = G / torch.linalg.norm(G).sqrt()
    for exact in ("svd", "coupled"):
        torch.testing.assert_close(spectral_power(G, 0.5, exact=exact), wanted, rtol=1e-6, atol=1e-6)
        assert (spectral_power(torch.zeros(3, 4), 0.5, exact=exact) == 0).all()
    polar = G / torch.linalg.norm(G)
    torch.testing.assert_close(spectral_power(G, 0, exact="svd"), polar, rtol=1e-6, atol=1e-6)


def test_compiles() -> None:
    G = torch.randn(2, 8, 12)
    compiled = torch.compile(lambda G: spectral_power(G * 2, 0.3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(G), spectral_power(G * 2, 0.3))
    torch.library.opcheck(torch.ops.muon_kernels.spectral_power.default, (G, 0.5, None, "auto", "auto", None))


@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (1024, 2048), (768, 900), (384, 1024), (64, 768), (64, 64)])
def test_costs_at_most_1_6_times_as_much(shape: tuple[int, int]) -> None:
    """As five steps of `orthogonalize`, on backends that have the Gram form and on those that have not."""
    for backend in ("cuda", "eager"):
        flops = [
            plan_bucket(shape, 1, StepOptions(schedule), backend, bytes_per_element=8, stepped=False).flops
            for schedule in (resolve("keller", 5), schedule_of(0.5))
        ]
        assert flops[1] <= 1.501 * flops[0]  # asked are 1.6; a product more would be noticed


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(2, 3), -0.1), {}, "p should be from 0"),
        ((torch.ones(2, 3), 1.5), {}, "p should be from 0"),
        ((torch.ones(2, 3), math.nan), {}, "p should be from 0"),
        ((torch.ones(2, 3), "half"), {}, "p should be a number"),
        ((torch.ones(2, 3), True), {}, "p should be a number"),
        ((torch.ones(3), 0.5), {}, "at least 2 dimensions"),
        ((torch.ones(2, 3, dtype=torch.int32), 0.5), {}, "floating-point dtype"),
        ((torch.ones(2, 3), 0.5), {"exact": "qr"}, "exact should be None or one of 'svd', 'coupled'"),
        ((torch.ones(2, 3), 0.3), {"exact": "coupled"}, 'is for p = 1/2 and 1/4 but p is: 0.3; exact="svd"'),
        ((torch.ones(2, 3), 1), {"ns_algorithm": "grams"}, "ns_algorithm should be"),
        ((torch.ones(2, 3), 0.5), {"backend": "gpu"}, "backend should be"),
        ((torch.ones(2, 3), 0.5), {"max_workspace_bytes": 8}, "to hold one matrix"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        spectral_power(*arguments, **options)


# ---- optimizers ----


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(24, 40), (40, 24), (24, 40), (3, 16, 16)]
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return params


def give_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1


def power_of(M: Tensor, p: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U * S[..., None, :] ** p) @ Vh


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [0.25, 0.5])
def test_spectral_momentum(backend: str, power: float) -> None:
    """Three steps against the formula in float64; the matrices' spectra lie within two decades."""
    params = parameters()
    plain = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(p) for p in plain]
    optimizer = SpectralMomentum(params, lr=0.1, power=power, weight_decay=0.2, backend=backend)
    for step in range(3):
        give_gradients(params, step)
        before = [p.clone() for p in plain]
        optimizer.step()
        for i, p in enumerate(params):
            assert p.grad is not None
            buffers[i] = 0.9 * buffers[i] + p.grad.double()
            update = power_of(buffers[i], power)
            plain[i] = (1 - 0.1 * 0.2) * plain[i] - 0.1 * update
            moved, wanted = p.detach().double() - before[i] * 0.98, plain[i] - before[i] * 0.98
            assert (moved - wanted).norm() < 0.05 * wanted.norm() * (step + 1)
            plain[i] = p.detach().double()


def assert_steps_are_the_same(
    a: torch.optim.Optimizer, ours: list[Tensor], b: torch.optim.Optimizer, theirs: list[Tensor]
) -> None:
    """Step both with the same gradients, four times: the parameters have the same bits each time."""
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        a.step()
        b.step()
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("nesterov", [False, True])
def test_power_one_is_sgd(nesterov: bool) -> None:
    ours, theirs = parameters(), parameters()
    a = SpectralMomentum(ours, lr=0.03, power=1, nesterov=nesterov)
    b = torch.optim.SGD(theirs, lr=0.03, momentum=0.9, nesterov=nesterov)
    assert_steps_are_the_same(a, ours, b, theirs)
    assert "none" in str(a.plan())


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("maximize", [False, True])
def test_where_nothing_is_iterated_it_is_adamw(power: float, maximize: bool) -> None:
    """All with p = 1; vectors with any."""
    make = parameters if power == 1 else lambda: [torch.linspace(-1, 1, 9).requires_grad_()]
    ours, theirs = make(), make()
    options = dict(lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, maximize=maximize)
    a, b = SpectralAdam(ours, power=power, **options), torch.optim.AdamW(theirs, **options)
    assert_steps_are_the_same(a, ours, b, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_spectral_adam(backend: str, power: float) -> None:
    params = parameters()
    optimizer = SpectralAdam(params, lr=0.1, power=power, weight_decay=0.2, backend=backend, ns_steps=5)
    m = [torch.zeros_like(p.detach()).double() for p in params]
    v = [torch.zeros_like(p.detach()).double() for p in params]
    for step in range(3):
        give_gradients(params, step)
        before = [p.detach().double() for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            assert p.grad is not None
            g = p.grad.double()
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g**2
            R = (m[i] / (1 - 0.9 ** (step + 1))) / ((v[i] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
            moved = (0.98 * before[i] - p.detach().double()) / 0.1
            if power:
                wanted = power_of(R, power)
            else:
                rows, cols = p.shape[-2:]
                wanted = muon_kernels.orthogonalize(R, backend="eager") * max(1, rows / cols) ** 0.5
            assert (moved - wanted).norm() < 0.04 * wanted.norm()


@pytest.mark.parametrize("name", sorted(PAPER))
def test_paper_names_resume_to_the_bit(name: str) -> None:
    def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
        for step in steps:
            give_gradients(params, step)
            optimizer.step()

    params = parameters()
    optimizer = paper_optimizer(name, params, lr=0.01)
    run(optimizer, params, range(2))
    copies = [p.detach().clone().requires_grad_() for p in params]
    resumed = paper_optimizer(name, copies, lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    run(optimizer, params, range(2, 4))
    run(resumed, copies, range(2, 4))
    assert all(map(torch.equal, params, copies))


def test_paper_settings() -> None:
    z = paper_optimizer("msgd_z", parameters(), lr=0.1)
    assert {k: z.defaults[k] for k in ("momentum", "nesterov", "dampened", "weight_decay", "ns_steps", "power")} == {
        "momentum": 0.9, "nesterov": False, "dampened": False, "weight_decay": 0.0, "ns_steps": 15, "power": 0.0,
    }  # fmt: skip
    q = paper_optimizer("adam_q", parameters(), lr=0.1)
    assert q.defaults["betas"] == (0.9, 0.95) and q.defaults["power"] == 0.25 and q.defaults["adjust_lr_fn"] == "none"
    with pytest.raises(ValueError, match="name should be one of 'msgd'"):
        paper_optimizer("msgdz", parameters(), lr=0.1)


def test_power_by_group_and_plan() -> None:
    params = parameters()
    optimizer = Muon([{"params": params[:2], "power": 0.5}, {"params": params[2:]}], lr=0.1)
    give_gradients(params, 0)
    optimizer.step()
    lines = str(optimizer.plan()).splitlines()
    assert any("power 0.5" in line for line in lines) and any("power" not in line and "24x40" in line for line in lines)
    alone = [p.detach().clone().requires_grad_() for p in parameters()[2:]]
    other = Muon(alone, lr=0.1)
    for p, q in zip(alone, params[2:], strict=True):
        p.grad = q.grad
    other.step()
    assert all(map(torch.equal, alone, params[2:]))


@pytest.mark.parametrize("kind", [SpectralMomentum, SpectralAdam])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 1.2}, "power should be from 0"),
        ({"power": "half"}, "power should be a number"),
        ({"lr": -1.0}, "(lr|Learning rate) should be >= 0"),
        ({"weight_decay": math.inf}, "weight.decay should be finite"),
        ({"backend": "tpu"}, "backend should be"),
        ({"flatten": 1}, "flatten should be"),
    ],
)
def test_bad_options(kind: type[torch.optim.Optimizer], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kind(parameters(), **options)


def test_fp16_workspaces_have_no_powers() -> None:
    with pytest.raises(ValueError, match="workspace_dtype should be bfloat16 where power is above 0"):
        SpectralMomentum(parameters(), workspace_dtype=torch.float16)


def test_a_failed_step_of_adam_changes_nothing() -> None:
    params = parameters()
    optimizer = SpectralAdam(params, lr=0.1)
    give_gradients(params, 0)
    optimizer.step()
    give_gradients(params, 1)
    before = [p.detach().clone() for p in params]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in params]
    params[-1].grad = torch.ones(3, 16, 16).to_sparse()
    with pytest.raises(TypeError, match="dense"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    assert all(torch.equal(a, optimizer.state[p]["exp_avg"]) for a, p in zip(moments, params, strict=True))


@pytest.mark.parametrize("name", ["msgd", "msgd_q", "adam_s"])
def test_packed_matrices_are_cut(name: str) -> None:
    """As the paper does with packed queries, keys and values."""
    packed = torch.randn(60, 20, generator=torch.Generator().manual_seed(7))
    thirds = [part.clone().requires_grad_() for part in packed.chunk(3)]
    packed.requires_grad_()
    options = {"adjust_lr_fn": "match_rms_adamw"}
    whole = paper_optimizer(name, [packed], lr=0.1, split=equal(3), **options)
    parts = paper_optimizer(name, thirds, lr=0.1, **options)
    for step in range(2):
        give_gradients([packed], step)
        assert packed.grad is not None
        for part, grad in zip(thirds, packed.grad.chunk(3), strict=True):
            part.grad = grad.clone()
        whole.step()
        parts.step()
        assert torch.equal(packed, torch.cat(thirds))


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_power_one_is_the_formula(nesterov: bool, lr: float | Tensor) -> None:
    """With what torch.optim.SGD has otherwise, or not: dampened momentum, decay, ascent and the rule of shapes."""
    p = parameters()[1]
    W, M = p.detach().double(), torch.zeros(40, 24).double()
    optimizer = SpectralMomentum(
        [p], lr, power=1, weight_decay=0.4, momentum=0.7, nesterov=nesterov, dampened=True, maximize=True,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(3):
        give_gradients([p], step)
        assert p.grad is not None
        g = -p.grad.double()
        M = 0.7 * M + 0.3 * g
        W = W * (1 - 0.05 * 0.4) - 0.05 * 0.2 * 40**0.5 * (0.3 * g + 0.7 * M if nesterov else M)
        optimizer.step()
    torch.testing.assert_close(p.detach().double(), W, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_adam_s_own_options(power: float) -> None:
    """A large eps, decay, and a vector beside the matrix, which torch's AdamW steps alike."""
    matrix, vector = parameters()[0], torch.linspace(-1, 1, 9).requires_grad_()
    theirs = vector.detach().clone().requires_grad_()
    before = matrix.detach().double()
    options = dict(lr=0.03, betas=(0.5, 0.5), eps=0.2, weight_decay=0.3)
    ours, adamw = SpectralAdam([matrix, vector], power=power, **options), torch.optim.AdamW([theirs], **options)
    give_gradients([matrix, vector], 0)
    assert matrix.grad is not None and vector.grad is not None
    theirs.grad = vector.grad.clone()
    ours.step()
    adamw.step()
    assert torch.equal(vector, theirs)
    g = matrix.grad.double()
    wanted = power_of(g / (g.abs() + 0.2), power)
    moved = ((1 - 0.03 * 0.3) * before - matrix.detach().double()) / 0.03
    assert (moved - wanted).norm() < 0.04 * wanted.norm()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_first_step_in_inference_mode_is_of_use_outside(power: float) -> None:
    p = nn.Parameter(torch.randn(6, 9))
    optimizer = SpectralAdam([p], power=power)
    p.grad = torch.randn(6, 9)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_keys_of_ones_own_are_no_options() -> None:
    """Nor those that are options of `Muon` alone."""
    given = {"weight_decay_form": "decoupled", "momentum": -1, "exact_rms": True, "block_period": None}
    G, updates = torch.randn(6, 9), []
    for own in ({}, given):
        p = nn.Parameter(torch.zeros(6, 9))
        p.grad = G
        optimizer = SpectralAdam([{"params": [p], **own}], power=0.0)
        optimizer.step()
        updates.append(p.detach())
    assert torch.equal(*updates) and optimizer.param_groups[0]["exact_rms"] is True
