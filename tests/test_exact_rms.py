"""The option exact_rms: every update has the norm of an orthogonal matrix of its shape."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_kernels import COEFFICIENTS, Muon, spectra
from muon_kernels.checks.matrices import SPECTRA, make
from muon_kernels.coefficients import NS_STEPS, resolve
from muon_kernels.reference import newton_schulz
from muon_kernels.split import equal
from muon_kernels.stages import STAGES, ExactRms, exact_rms, sums

SHAPES = [(40, 40), (24, 100), (100, 24), (24, 100), (1, 7), (3, 16, 20)]


def update(p: nn.Parameter, **options: Any) -> Tensor:
    """What a step of lr 1 takes from a parameter, in doubles."""
    before = p.detach().clone()
    Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, **{"adjust_lr_fn": "none", **options}).step()
    return before.double() - p.detach().double()


def with_gradient(G: Tensor) -> nn.Parameter:
    p = nn.Parameter(torch.zeros_like(G))
    p.grad = G
    return p


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_are_those_of_orthogonal_matrices(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    U = update(with_gradient(torch.randn(shape)), backend=backend, exact_rms=True)
    norms = U.reshape(-1, *shape[-2:]).norm(dim=(1, 2))
    # Rounding to bf16 takes 2^-9 of an element at most, and not always in one direction.
    assert (norms / math.sqrt(min(shape[-2:])) - 1).abs().max() < 2**-9


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name != "zero"])
def test_whatever_the_coefficients_and_the_spectrum(name: str, spectrum: str) -> None:
    G = make(spectrum, 48, 80)
    U = update(with_gradient(G), ns_coefficients=name, exact_rms=True)
    assert float(U.norm()) == pytest.approx(math.sqrt(48), rel=2**-9)


def test_only_the_norm_is_another(backend: str) -> None:
    torch.manual_seed(0)
    G = torch.randn(48, 80)
    plain, exact = (update(with_gradient(G), backend=backend, exact_rms=value) for value in (False, True))
    factor = float(exact.norm() / plain.norm())
    assert 1.02 < factor < 1.4, "the five steps of keller fall short"
    torch.testing.assert_close(exact, factor * plain, rtol=2**-8, atol=1e-9)


def test_the_rms_is_what_match_rms_adamw_says(backend: str) -> None:
    p = with_gradient(torch.randn(64, 200, generator=torch.Generator().manual_seed(0)))
    muon = Muon([p], lr=0.5, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", exact_rms=True, backend=backend)
    muon.step()
    assert float(p.detach().double().square().mean().sqrt()) == pytest.approx(0.2 * 0.5, rel=2**-9)


NORMAL_SHAPES = [(64, 64), (256, 64), (64, 256), (128, 1024), (300, 200)]


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_rms_of_a_set_is_what_float64_says_and_what_the_docs_say(name: str) -> None:
    """Of "match_rms_adamw", for independent normal gradients; and 0.2 with exact_rms."""
    schedule = resolve(name, NS_STEPS)
    found = []
    for shape, seed in itertools.product(NORMAL_SHAPES, range(3)):
        G = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        factor = 0.2 * math.sqrt(max(shape))
        found.append(spectra.rms(newton_schulz(G.double(), schedule.triples, schedule.margin)).item() * factor)
        plain, exact = (
            update(with_gradient(G), adjust_lr_fn="match_rms_adamw", ns_coefficients=name, exact_rms=value)
            for value in (False, True)
        )
        assert spectra.rms(plain).item() == pytest.approx(found[-1], rel=2**-8)
        assert spectra.rms(exact).item() == pytest.approx(0.2, rel=2**-8)
    page = (Path(__file__).parents[1] / "docs" / "options.md").read_text()
    said = re.search(rf'^\| `"{name}".*?\| \S+–\S+ \| ([0-9.–]+) \|', page, re.MULTILINE)
    assert said is not None
    low, high = said[1].split("–") if "–" in said[1] else (said[1], said[1])
    assert (f"{min(found):.2f}", f"{max(found):.2f}") == (low, high)


def test_the_rms_of_low_rank_is_what_the_docs_say() -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(64, 4, generator=generator) @ torch.randn(4, 256, generator=generator)
    plain, exact = (
        update(with_gradient(G), adjust_lr_fn="match_rms_adamw", ns_coefficients="you6", exact_rms=value)
        for value in (False, True)
    )
    # Rounding is of full rank, and adds to √(4/64).
    assert 0.05 < spectra.rms(plain).item() < 0.07
    assert spectra.rms(exact).item() == pytest.approx(0.2, rel=2**-8)


def test_zero_stays_zero_and_nan_stays_where_it_is(backend: str) -> None:
    G = torch.randn(3, 20, 30)
    G[0], G[2, 3, 4] = 0, math.nan
    U = update(with_gradient(G), backend=backend, exact_rms=True)
    assert not U[0].any() and U[2].isnan().any()
    assert float(U[1].norm()) == pytest.approx(math.sqrt(20), rel=2**-9)


def test_parts_of_a_split_have_norms_of_their_own(backend: str) -> None:
    U = update(with_gradient(torch.randn(60, 40)), backend=backend, exact_rms=True, split=equal(3))
    for part in U.split(20):
        assert float(part.norm()) == pytest.approx(math.sqrt(20), rel=2**-9)


def test_chunks_and_buckets_change_nothing(backend: str) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(24, 40) for _ in range(5)]
    results = []
    for cap in (None, 30_000):
        params = [with_gradient(G) for G in gradients]
        muon = Muon(params, exact_rms=True, backend=backend, max_workspace_bytes=cap)
        assert cap is None or len(muon.plan().buckets[0].chunks) > 1
        muon.step()
        results.append([p.detach() for p in params])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("others", [{"sign_momentum": True}, {"second_moment": "neuron"}, {"second_moment": "element"}])
def test_beside_other_stages(backend: str, others: dict[str, Any]) -> None:
    """Which keep the norm."""
    U = update(with_gradient(torch.randn(24, 40)), backend=backend, exact_rms=True, **others)
    assert float(U.norm()) == pytest.approx(math.sqrt(24), rel=2**-8)


@pytest.mark.parametrize("shape", [(64, 520), (200, 200)], ids=str)
def test_bits_do_not_depend_on_the_batch(shape: tuple[int, int]) -> None:
    """Not of sums of more elements either than torch adds in one thread."""
    for seed in range(30):
        torch.manual_seed(seed)
        X = torch.randn(3, *shape).half()
        stage = ExactRms()
        together, alone = X.clone(), X.clone()
        floats = stage.floats(*shape, X.device)
        stage.orthogonalized(together, torch.empty(3 * floats))
        for x in alone:
            stage.orthogonalized(x[None], torch.empty(floats))
        assert torch.equal(together, alone), seed


def test_updates_that_are_small_are_no_zeros(backend: str) -> None:
    """As from coefficients that shrink them."""
    U = update(
        with_gradient(torch.randn(24, 40)),
        backend=backend,
        exact_rms=True,
        ns_coefficients=(0.01, 0.0, 0.0),
        ns_steps=1,
    )
    assert float(U.norm()) == pytest.approx(math.sqrt(24), rel=2**-8)


@pytest.mark.parametrize("in_cache", [True, False], ids=["blocks", "as on a device"])
def test_in_blocks_and_as_on_a_device(in_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "BLOCK_ON_CPU", 100)
    for module in (sums, exact_rms):
        monkeypatch.setattr(module, "in_cache", lambda _: in_cache)
    X = torch.randn(3, 20, 30).bfloat16()
    X[1] = 0
    norms, before = X.double().norm(dim=(1, 2), keepdim=True), X.double()
    scratch = torch.full((3 * ExactRms().floats(20, 30, X.device),), torch.nan)
    ExactRms().orthogonalized(X, scratch)
    torch.testing.assert_close(X.double(), (before * math.sqrt(20) / norms).nan_to_num(0.0), rtol=2**-8, atol=0)


def test_the_plan_says_it() -> None:
    p = with_gradient(torch.randn(24, 40))
    plain, exact = Muon([p]).plan(), Muon([p], exact_rms=True).plan()
    assert "exact_rms=True" in str(exact) and "exact_rms" not in str(plain)
    assert exact.launches > plain.launches and exact.bytes > plain.bytes


@pytest.mark.parametrize("others", [{"strategy": "gram"}, {"power": 0.5}, {"power": 1.0}], ids=str)
def test_what_it_does_not_go_with(others: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exact_rms should be False"):
        Muon([with_gradient(torch.randn(4, 4))], exact_rms=True, **others)


def test_values_that_there_are_not() -> None:
    with pytest.raises(TypeError, match="exact_rms should be True or False but is: 1"):
        Muon([with_gradient(torch.randn(4, 4))], exact_rms=1)


def test_a_checkpoint_from_before_the_option_has_its_default() -> None:
    p = with_gradient(torch.randn(24, 40))
    muon = Muon([p])
    muon.step()
    saved = muon.state_dict()
    for stage in STAGES:
        del saved["param_groups"][0][stage.option]
    again = Muon([p])
    again.load_state_dict(saved)
    assert again.param_groups[0]["exact_rms"] is False
    again.step()


def test_a_group_may_change_it(backend: str) -> None:
    p = with_gradient(torch.randn(24, 40))
    muon = Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, backend=backend)
    muon.step()
    muon.param_groups[0]["exact_rms"] = True
    before = p.detach().clone()
    muon.step()
    assert float((before - p.detach()).double().norm()) == pytest.approx(math.sqrt(24), rel=2**-9)


def test_help_and_signature_have_it() -> None:
    import inspect

    assert inspect.signature(Muon).parameters["exact_rms"].default is False
    assert "        exact_rms: scale every update" in str(Muon.__doc__)
