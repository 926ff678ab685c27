"""`orthogonalize` against the float64 spectral truth, for every coefficient set, spectrum, form and backend."""

from typing import Any

import pytest
import torch

from muon_kernels import COEFFICIENTS, backends, orthogonalize
from muon_kernels.checks.matrices import factors, spectral_truth
from muon_kernels.checks.steps import misses
from muon_kernels.checks.yardsticks import bf16_loop, relative_error
from muon_kernels.coefficients import resolve
from muon_kernels.reference import newton_schulz
from muon_kernels.step.plan import workspace_bytes

SHAPES = [(48, 48), (96, 144), (64, 256), (256, 64), (129, 300)]


@pytest.mark.parametrize("shape", [(40, 70), (70, 40)], ids=str)
@pytest.mark.parametrize("spectrum", ["gaussian", "flat", "power -2", "rank 8"])
def test_bf16_loop_is_torchs_own(spectrum: str, shape: tuple[int, int]) -> None:
    """Every rounding where torch has it: the errors are the same, and but for the order of sums the numbers are."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    schedule = resolve("keller", 5)
    U, s, V = factors(spectrum, *shape)
    G = ((U * s) @ V.mT).float()
    truth = spectral_truth(U, s, V, schedule.triples, schedule.margin)
    ours, theirs = bf16_loop(G, schedule), _zeropower_via_newtonschulz(G, schedule.triples[0], 5, 1e-7)
    assert relative_error(ours, theirs.double()) < 2e-3
    assert relative_error(ours, truth) == pytest.approx(relative_error(theirs, truth), rel=0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_accuracy(backend: str, name: str, shape: tuple[int, int]) -> None:
    assert not misses(name, shape, (2,), backend=backend)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_accuracy_of_large_matrices(name: str) -> None:
    """From 256 rows on, some sets run three steps between two visits to X."""
    for shape in ((256, 320), (520, 600)):
        assert not misses(name, shape, (1,))


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(40, 200), (200, 40)], ids=str)
def test_a_batch_is_its_matrices(backend: str, shape: tuple[int, int], algorithm: str) -> None:
    """However many go through the workspace at a time, bit for bit on native kernels."""
    G = torch.randn(20, *shape) * torch.logspace(-20, 20, 20)[:, None, None]
    each = workspace_bytes(backend, algorithm, 40, 200, resolve("keller", 5))
    alone = torch.cat([orthogonalize(g[None], ns_algorithm=algorithm, backend=backend) for g in G])
    tolerance = 0 if backends.get(backend).precise_squares else 2**-4
    for cap in (None, 3 * each, 9 * each):
        together = orthogonalize(G, ns_algorithm=algorithm, backend=backend, max_workspace_bytes=cap)
        torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("triple", [(0, 0, 0), (100, 100, 100), (1e30, 1, 1), (0, 1, 1)], ids=str)
def test_coefficients_that_vanish_or_explode(backend: str, triple: tuple[float, float, float]) -> None:
    """Such numbers are the user's to choose: the choice of a form must not fall over them."""
    result = orthogonalize(torch.randn(30, 50), triple, backend=backend)
    assert not result.any() or result.isnan().any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ns_steps": 7},
        {"ns_coefficients": "polar_express"},
        {"ns_coefficients": [(3.4, -4.7, 2.0), (1.5, -0.5, 0.0)]},
        {"backend": "eager", "workspace_dtype": torch.float16},
    ],
    ids=str,
)
def test_one_operation_of_a_compiled_function(options: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    f = lambda G: orthogonalize(2 * G, **options).sin()
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for shape in ((3, 20, 30), (30, 20), (3, 0, 4)):
        G = torch.randn(shape, requires_grad=True)
        result = compiled(G)
        assert torch.equal(result, f(G)) and not result.requires_grad
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_the_operation_keeps_torchs_rules() -> None:
    G, schedule = torch.randn(2, 6, 9), resolve("keller")
    coefficients = [c for triple in schedule.triples for c in triple]
    torch.library.opcheck(
        torch.ops.muon_kernels.orthogonalize.default,
        (G, coefficients, schedule.margin, 1e-7, "auto", "auto", None, torch.bfloat16),
    )


def test_fp16_is_more_accurate() -> None:
    """On torch's own products, in the standard form."""
    schedule = resolve("keller")
    for spectrum in ("gaussian", "power -1", "power -2", "exponential", "rank 8"):
        U, s, V = factors(spectrum, 64, 96)
        G = ((U * s) @ V.mT).float()
        truth = spectral_truth(U, s, V, schedule.triples, schedule.margin)
        result = orthogonalize(G, backend="eager", workspace_dtype=torch.float16)
        assert 3 * relative_error(result, truth) <= relative_error(bf16_loop(G[None], schedule)[0], truth), spectrum


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_coefficients_without_higher_powers(backend: str, algorithm: str) -> None:
    """a x alone: products that only scale. torch's, with alpha = 0, would forget beta, or what was to be written."""
    G = torch.randn(3, 30, 50)
    exact = G / torch.linalg.vector_norm(G, dim=(1, 2), keepdim=True)
    tripled = orthogonalize(G, [(2, 0, 0), (1.5, 0, 0)], None, ns_algorithm=algorithm, backend=backend)
    torch.testing.assert_close(tripled, 3 * exact, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_a_singular_value_that_leads(backend: str, algorithm: str, name: str) -> None:
    """A few times as large as the others, as in the momentum of trained layers."""
    if algorithm == "gram" and not backends.get(backend).precise_squares:
        pytest.skip("where it is not for accuracy")
    generator = torch.Generator().manual_seed(1)
    schedule = resolve(name)
    for m, n in ((64, 64), (64, 256), (32, 100)):
        noise, u, v = (torch.randn(40, *shape, generator=generator) for shape in ((m, n), (m, 1), (1, n)))
        for lead in (2, 4):
            G = noise + lead * u * v
            exact = newton_schulz(G.double(), schedule.triples, schedule.margin)
            X = orthogonalize(G, name, None, backend=backend, ns_algorithm=algorithm)
            assert ((X - exact).norm(dim=(1, 2)) < 0.3 * exact.norm(dim=(1, 2))).all()


@pytest.mark.parametrize("shape", [(512, 512), (512, 768)], ids=str)
def test_three_steps_where_a_singular_value_leads(shape: tuple[int, int]) -> None:
    """The accuracy rule where segments of three steps come closest to it: it is ten times the next."""
    if backends.unavailable("cpu"):
        pytest.skip("needs precise squares")
    schedule = resolve("keller")
    for lead in (0.7, 1.0, 1.5):
        generator = torch.Generator().manual_seed(2)
        noise, u, v = (torch.randn(n, k, generator=generator) for n, k in (shape, (shape[0], 1), (1, shape[1])))
        G = (noise + lead * u * v)[None]
        truth = newton_schulz(G.double(), schedule.triples, schedule.margin)
        ours = relative_error(orthogonalize(G, ns_algorithm="gram", backend="cpu"), truth)
        assert ours <= max(1.3 * relative_error(bf16_loop(G, schedule), truth), 0.025)


@pytest.mark.parametrize("value", [7e-41, 7e-40, 7e-39, 3e-38])
@pytest.mark.parametrize("shape", [(4, 4), (64, 32), (3, 3, 1, 9)], ids=str)
def test_numbers_below_bf16s_normal_range(backend: str, shape: tuple[int, ...], value: float) -> None:
    """Rounding to bf16 may double them; the iteration diverges where the norm is not that of what was rounded."""
    Y = orthogonalize(torch.full(shape, value), backend=backend)
    assert Y.isfinite().all() and torch.linalg.matrix_norm(Y.double(), 2).max() <= 1.3
