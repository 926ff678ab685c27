"""The oracle itself, judged by its action on singular values and by torch.optim.Muon."""

import math

import pytest
import torch
from torch import Tensor

from muon_kernels.checks.matrices import SPECTRA, factors, make, spectral_truth
from muon_kernels.coefficients import COEFFICIENTS, resolve
from muon_kernels.reference import muon_step, newton_schulz
from muon_kernels.scaling import lr_ratio

WIDE, TALL, SQUARE, BATCHED = (9, 21, ()), (21, 9, ()), (12, 12, ()), (14, 10, (2, 3))
SHAPES = [WIDE, TALL, SQUARE, BATCHED, (1, 5, ()), (5, 1, ()), (1, 1, (2,))]
KELLER = resolve("keller").triples


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_acts_on_singular_values_alone(shape, name, spectrum):
    m, n, batch = shape
    triples, margin, *_ = resolve(name)
    U, s, V = factors(spectrum, m, n, batch)
    actual = newton_schulz((U * s) @ V.mT, triples, margin)
    expected = spectral_truth(U, s, V, triples, margin)
    assert actual.shape == (*batch, m, n)
    if spectrum == "zero":
        assert torch.equal(actual, expected)
    else:
        # The slope at 0 is what a rounding error of the matrix itself can grow by.
        slope = math.prod(a for a, _, _ in triples)
        assert relative_error(actual, expected) < max(1e-12, slope * 2**-52)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-100, 100])  # 1e-30 and 1e30
def test_newton_schulz_does_not_depend_on_scale(exponent, dtype):
    G = make("power -1", 6, 10, batch=(2,), dtype=dtype)
    scaled = G * 2.0**exponent
    assert torch.equal(newton_schulz(scaled, KELLER), newton_schulz(G, KELLER))


def test_newton_schulz_of_a_batch_takes_each_norm_alone():
    G = make("gaussian", 6, 10, batch=(3,), dtype=torch.float64)
    scales = torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(newton_schulz(G * scales, KELLER), newton_schulz(G, KELLER), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_newton_schulz_confines_what_is_not_finite(bad):
    G = make("gaussian", 8, 5, batch=(3,))
    expected = newton_schulz(G, KELLER)
    G[1, 2, 3] = bad
    actual = newton_schulz(G, KELLER)
    assert actual[1].isnan().any()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4)], ids=str)
def test_newton_schulz_of_nothing(shape):
    assert newton_schulz(torch.empty(shape), KELLER).shape == shape


@pytest.mark.parametrize("shape", [WIDE, TALL, BATCHED], ids=str)
@pytest.mark.parametrize("dampened", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_step_is_its_formula(nesterov, dampened, shape):
    m, n, batch = shape
    mu, lr, weight_decay, ratio, margin = 0.9, 0.02, 0.3, 1.7, 1.01
    torch.manual_seed(0)
    W, M = torch.randn(2, *batch, m, n, dtype=torch.float64)
    for _ in range(3):
        g = torch.randn_like(W)
        before = [t.clone() for t in (W, g, M)]
        actual_W, actual_M = muon_step(
            W,
            g,
            M,
            lr=lr,
            weight_decay=weight_decay,
            momentum=mu,
            nesterov=nesterov,
            coefficients=KELLER,
            margin=margin,
            eps=1e-7,
            lr_ratio=ratio,
            dampened=dampened,
        )
        assert all(map(torch.equal, (W, g, M), before)), "wrote to an argument"

        scale = 1 - mu if dampened else 1.0
        expected_M = mu * M + scale * g
        D = scale * g + mu * expected_M if nesterov else expected_M
        U, s, Vh = torch.linalg.svd(D, full_matrices=False)
        expected_W = W - lr * weight_decay * W
        expected_W -= lr * ratio * spectral_truth(U, s, Vh.mT, KELLER, margin)
        torch.testing.assert_close(actual_M, expected_M, rtol=0, atol=1e-14)
        torch.testing.assert_close(actual_W, expected_W, rtol=0, atol=1e-13)
        W, M = actual_W, actual_M


def test_muon_step_with_a_zero_gradient_only_decays():
    W = torch.randn(4, 6)
    zero = torch.zeros_like(W)
    actual, M = muon_step(
        W,
        zero,
        zero,
        lr=0.5,
        weight_decay=0.5,
        momentum=0.95,
        nesterov=True,
        coefficients=KELLER,
        margin=1.0,
        eps=1e-7,
        lr_ratio=1.0,
    )
    assert torch.equal(actual, W * 0.75)
    assert torch.equal(M, zero)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)], ids=str)
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_step_follows_torch(nesterov, adjust_lr_fn, shape):
    torch.manual_seed(0)
    W = torch.randn(shape)
    M = torch.zeros_like(W)
    param = torch.nn.Parameter(W.clone())
    hyper = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov, "eps": 1e-7}
    optimizer = torch.optim.Muon([param], adjust_lr_fn=adjust_lr_fn, **hyper)
    ratio = lr_ratio(adjust_lr_fn, *shape)
    travelled = 0.0
    for _ in range(6):
        param.grad = torch.randn(shape)
        optimizer.step()
        decayed = W * (1 - hyper["lr"] * hyper["weight_decay"])
        W, M = muon_step(W, param.grad, M, **hyper, coefficients=KELLER, margin=1.0, lr_ratio=ratio)
        travelled += float((W - decayed).norm())
    assert torch.equal(M, optimizer.state[param]["momentum_buffer"])
    # torch iterates in bfloat16: X is rounded once a step, by at most 2^-8 of itself, and the five
    # roundings of an update add up at worst. Ours is in float32, exact by comparison.
    assert float((param.detach() - W).norm()) < len(KELLER) * 2**-8 * travelled
