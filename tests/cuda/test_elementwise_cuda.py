"""momentum_update and apply_update on CUDA: nvcc's PTX, run on the CPU, against the formulas in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from checks.elementwise import *  # noqa: F403
from checks.elementwise import HALVES, fma, workspace
from elementwise import Verbs
from emulated import ROOT
from ptx.standin import Runtime
from torch import Tensor

from muon_kernels.backends import native
from muon_kernels.verbs import ApplyOptions


@pytest.fixture(scope="module")
def verbs(built: tuple[ModuleType, Runtime]) -> Verbs:
    return Verbs(*built)


def launches(verbs: Verbs, call: Callable[[], Any]) -> list[str]:
    with verbs.runtime.options():
        call()
        return [m[0] for m in (re.search(r"(momentum|norm|apply)_kernel", e.kernel) for e in verbs.runtime.log) if m]


def test_launches(verbs: Verbs) -> None:
    """Two for momenta, one for parameters; more only where a list is longer than a kernel's argument."""
    X, _ = workspace(1030, 2, 3, torch.bfloat16)
    stack = torch.randn(1030, 2, 3)
    apart = list(torch.randn(1200, 2, 3))
    apart = [apart[i] for i in torch.randperm(1200)[:1030]]
    few = [*stack[:300], *apart[:100]]
    for tensors, count in [(list(stack), 1), (few, 1), (apart, 2), (apart[:1], 1), ([], 0)]:
        momenta, params = torch.zeros(len(tensors), 2, 3), torch.zeros(len(tensors), 2, 3)
        x = X[: len(tensors)]
        scale = torch.empty(0)

        def update(tensors: list[Tensor] = tensors, momenta: Tensor = momenta, x: Tensor = x) -> None:
            nonlocal scale
            scale = verbs.momentum_update(tensors, list(momenta), x, mu=0.0)

        assert launches(verbs, update) == ["momentum_kernel"] * count + ["norm_kernel"] * bool(count)
        # The parameters' list is longer: in the order of `apart`, at most two matrices make an entry.
        order = torch.randperm(len(tensors))
        views = [params[i] for i in order]
        assert launches(verbs, lambda v=views, x=x: verbs.apply_update(v, x, lr=1.0)) == ["apply_kernel"] * bool(count)
        if not count:
            continue
        directions = torch.stack(tensors)
        assert torch.equal(momenta, directions)
        assert torch.equal(x, directions.bfloat16())
        torch.testing.assert_close(scale, 1 / directions.norm(dim=(1, 2)), rtol=1e-6, atol=0)
        assert torch.equal(params[order], -x.float())


# Bytes of a kernel's arguments, and the runs that the shorter ones hold.
SHORT, LONG = 4096, 32764
SHORT_RUNS = {"momentum": 48, "apply": 80}


@pytest.mark.parametrize("verb", SHORT_RUNS)
def test_few_runs_travel_in_short_arguments(verbs: Verbs, verb: str) -> None:
    """However many matrices they are of."""
    most = SHORT_RUNS[verb]
    for apart, joined, expected in [
        (1, 0, SHORT),
        (most, 0, SHORT),
        (most + 1, 0, LONG),
        (most - 1, 100, SHORT),
        (most, 100, LONG),
    ]:
        memory = torch.randn(10 * apart)
        # No two neighbours have equal strides.
        tensors = [memory.as_strided((2, 3), (3 + i % 2, 1), 10 * i) for i in range(apart)]
        tensors += torch.randn(joined, 2, 3)
        before, X = torch.stack(tensors), torch.ones(apart + joined, 2, 3).bfloat16()
        with verbs.runtime.options():
            if verb == "momentum":
                verbs.momentum_update(tensors, None, X)
                assert torch.equal(X, before.bfloat16())
            else:
                verbs.apply_update(tensors, X)
                assert torch.equal(torch.stack(tensors), fma(-0.5, X.float(), before * 0.75))
            sizes = [int(m[1]) for e in verbs.runtime.log if (m := re.search(verb + r"_kernelI.*?Li(\d+)E", e.kernel))]
        assert sizes == [expected], (apart, joined)


def test_nothing_is_launched_for_empty_matrices(verbs: Verbs) -> None:
    X = torch.empty(3, 0, 5, dtype=torch.bfloat16)
    assert launches(verbs, lambda: verbs.apply_update(list(torch.empty(3, 0, 5)), X)) == []


def test_stochastic_rounding_does_not_depend_on_launches(verbs: Verbs) -> None:
    X = torch.rand(1400, 1, 2).bfloat16()
    stack = torch.ones(1400, 1, 2).bfloat16()
    order = torch.randperm(1400)
    one = stack.clone()
    assert len(launches(verbs, lambda: verbs.apply_update(list(one), X, stochastic_rounding=True))) == 1
    apart = [stack.clone()[0] for _ in order]
    apart = [apart[i] for i in order]
    assert len(launches(verbs, lambda: verbs.apply_update(apart, X, stochastic_rounding=True))) > 1
    assert torch.equal(one, torch.stack(apart))


def test_refusals(verbs: Verbs) -> None:
    p, X = torch.zeros(4, 8), torch.zeros(1, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="apply_update"):
        verbs.apply_update([p.half()], X, stochastic_rounding=True)
    with pytest.raises(ValueError, match="operand"):
        verbs.apply_update([p], X.new_zeros(1, 4, 8, dtype=torch.float32))
    try:
        verbs.runtime.device.major = 7
        for call in (lambda: verbs.apply_update([p], X), lambda: verbs.momentum_update([p], None, X)):
            with pytest.raises(ValueError, match="capability is below"):
                call()
    finally:
        verbs.runtime.pretend(8, 0)
    verbs.runtime.forget_memory()
    m, refs, ratios = verbs.module, torch.tensor([p.data_ptr(), 8, 1]), torch.ones(1).double()
    stack = (X.data_ptr(), *X.shape, 32, 8)
    update = m.ApplyUpdate(refs.data_ptr(), m.DType.f32, stack, 0.1, 0.0, ratios.data_ptr())
    with pytest.raises(RuntimeError, match=r"apply_update: .*719"):
        m.cuda.apply_update(update, native.apply_options(m, ApplyOptions())[0], m.DType.bf16, 0)


# ---- what decides the speed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("X_dtype", HALVES, ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_memory_traffic(verbs: Verbs, dtypes: tuple[torch.dtype, torch.dtype], X_dtype: torch.dtype) -> None:
    """Everything in once and out once, in whole sectors, without bank conflicts."""
    grad_dtype, momentum_dtype = dtypes
    for shape in ((128, 192), (192, 128)):
        grads, momenta = torch.randn(2, *shape).to(grad_dtype), torch.randn(2, *shape).to(momentum_dtype)
        X = torch.empty(2, 128, 192, dtype=X_dtype)
        elements = X.numel()
        for verb, per_element in [
            (
                lambda g=grads, b=momenta, X=X: verbs.momentum_update(list(g), list(b), X),
                grads.itemsize + 2 * momenta.itemsize + 2,
            ),
            (lambda g=grads, X=X: verbs.apply_update(list(g), X), 2 * grads.itemsize + 2),
        ]:
            with verbs.runtime.options(profile=True):
                verb()
                profiles = verbs.runtime.profiles
            small = sum(p.global_bytes for n, p in profiles.items() if "norm_kernel" in n)
            assert small <= 16 * 2 * 6 + 8, "partial sums in, scale out"
            (large,) = (p for n, p in profiles.items() if "norm_kernel" not in n)
            assert large.bank_conflicts == 0, large.table()
            assert large.sector_efficiency >= 0.95, large.table()
            assert large.global_bytes <= per_element * elements + 8 * 12, large.table()
            at_once = sum(r.bytes for r in large.rows if r.sectors and ".v4" in r.op)
            assert at_once >= 0.7 * large.global_bytes, "not 16 bytes at a time"


def test_host_code_only_launches() -> None:
    for file in (ROOT / "csrc" / "cuda").iterdir():
        assert not re.search(r"cudaMalloc|cudaFree|Synchronize|printf|std::cout|cudaMemcpy", file.read_text()), (
            file.name
        )


@pytest.mark.parametrize("value", [1 + 2.0**-12, 1 / 3, 3e-13, 3e17, 3e-22, 3e20])
def test_norms_have_the_digits_of_doubles(verbs: Verbs, value: float) -> None:
    """Of equal numbers, whose squares lose as much each: in fp32 a norm would be off by 2^-24 or more."""
    G = torch.full((64, 64), value)
    X, _ = workspace(1, 64, 64, torch.bfloat16)
    norms = torch.empty(1, dtype=torch.float64)
    with verbs.runtime.options():
        verbs.momentum_update([G], None, X, norms=norms)
    torch.testing.assert_close(norms, G.double().norm()[None], rtol=2.0**-40, atol=0)
