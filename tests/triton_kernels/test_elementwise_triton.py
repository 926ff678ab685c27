"""momentum_update and apply_update in Triton: what it compiles, run on the CPU, against the formulas in float64."""

from __future__ import annotations

import os

import pytest
import torch
from checks.elementwise import *  # noqa: F403
from checks.elementwise import check_x, directions, fma
from elementwise_triton import Verbs, device_at, matrices
from emulated_gpu import SHARED_BYTES, compiling
from gates import ARCHITECTURES, spilled
from torch import Tensor

from muon_kernels.layout import Bundle
from muon_kernels.triton_kernels import elementwise, launch, tables
from muon_kernels.verbs import MomentumUpdate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def verbs(place: int) -> Verbs:
    return Verbs(place)


def plain(batch: int, shape: tuple[int, int], X_dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Gradients, momenta, parameters, and a workspace."""
    return [*(torch.randn(batch, *shape) for _ in range(3)), torch.empty(batch, *sorted(shape), dtype=X_dtype)]


RAGGED = [1, 3, 17, 63, 65, 129]


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_ragged_sizes(verbs: Verbs, batch: int) -> None:
    """In every combination of one side with another, wide and tall."""
    for i, rows in enumerate(RAGGED):
        shape = rows, RAGGED[(2 * i + batch) % len(RAGGED)]
        grads, momenta, params, X = plain(batch, shape)
        new, direction = directions(grads, momenta, 0.9, True, True)
        scale = verbs.momentum_update(list(grads), list(momenta), X)
        assert torch.equal(momenta, new)
        expected = fma(-0.5, direction.bfloat16().float(), params * 0.75)
        verbs.apply_update(list(params), X)
        assert torch.equal(params, expected)
        for x, s, d in zip(X, scale, direction, strict=True):
            check_x(x, s, d)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_launches_and_compilations(verbs: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches and one; and no number that changes from step to step or from bucket to bucket compiles again."""
    monkeypatch.setattr(launch, "_compiled", {})
    for kernel in (elementwise.momentum_kernel, elementwise.norm_kernel, elementwise.apply_kernel):
        kernel.device_caches.clear()  # another file's tests, in the same process, may have compiled them
    grads, momenta, params, X = plain(2, (72, 136))
    changes = [(2, (72, 136)), (3, (136, 72)), (1, (16, 1024)), (1, (1024, 16))]
    verbs.momentum_update(list(grads), list(momenta), X)
    verbs.apply_update(list(params), X, stochastic_rounding=True, seed=1)
    assert verbs.compiled
    verbs.compiled.clear()
    for i, (batch, shape) in enumerate(changes):
        grads, momenta, params, X = plain(batch, shape)
        with verbs.options():
            verbs.momentum_update(
                list(grads), list(momenta), X, mu=0.9 - 0.3 * i, grad_scale=1.0 - i, eps=0.1 * i, margin=1.0 + i
            )
            verbs.apply_update(
                list(params),
                X,
                lr=0.1 * i,
                weight_decay=float(i),
                ratios=[i] * batch,
                seed=i << 40,
                stochastic_rounding=True,
            )
            assert [ran.name for ran in verbs.log] == ["momentum_kernel", "norm_kernel", "apply_kernel"]
    assert not verbs.compiled


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_memory_traffic(verbs: Verbs) -> None:
    """Everything in once and out once, in whole sectors, 16 bytes at a time."""
    for shape in ((128, 192), (192, 128)):
        grads, momenta, params, X = plain(2, shape)
        elements = X.numel()
        for call, bytes_ in [
            (lambda g=grads, b=momenta, x=X: verbs.momentum_update(list(g), list(b), x), 14),
            (lambda p=params, x=X: verbs.apply_update(list(p), x), 10),
        ]:
            with verbs.options(profile=True):
                call()
            profile = verbs.log[0].result.profile
            assert profile.sector_efficiency >= 0.95, profile.table()
            at_once = sum(r.bytes for r in profile.rows if r.sectors and ".v4" in r.op)
            assert at_once >= 0.7 * bytes_ * elements, "not 16 bytes at a time"
            assert profile.bank_conflicts == 0, profile.table()


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_compiles_without_spills(arch: int | str) -> None:
    """In vectors, and element by element."""
    verbs = Verbs(0)
    with compiling(arch) as device:
        for cols in (128, 127):
            grads, momenta, params, X = plain(1, (64, cols), torch.float16)
            verbs.momentum_update(list(grads), list(momenta), X, nesterov=False)
            verbs.apply_update(list(params.bfloat16()), X, stochastic_rounding=True, cautious=True)
        kernels = [k for f in {*device.compiled} for k in device.kernels(f)]
    assert len(kernels) == 5
    for kernel in kernels:
        assert spilled(kernel) == 0, kernel.name
        assert kernel.metadata.shared <= SHARED_BYTES[arch] // 2, kernel.name


def test_scratch_is_optional(place: int) -> None:
    assert not place, "no kernel is built for it"
    grads, momenta, _, X = plain(2, (70, 90))
    _, direction = directions(grads, momenta, 0.9, True, True)
    rule = 0.9, True, True, 1.0, 1e-7, 1.0
    scale = elementwise.momentum_update(MomentumUpdate(matrices(list(grads)), matrices(list(momenta)), X, *rule))
    for x, s, d in zip(X, scale, direction, strict=True):
        check_x(x, s, d)


def test_vectors_end_with_the_columns() -> None:
    """However far apart aligned rows are."""
    for cols, expected in ((32, 4), (33, 1)):
        of_t, X = torch.empty(16, 48)[:, :cols], torch.empty(1, 16, 48, dtype=torch.bfloat16)[:, :, :cols]
        table = tables.table(matrices([of_t]), torch.device("cpu"))
        assert tables.width(16, cols, 4, X, table) == expected


def test_what_stays_where_it_is_has_one_table() -> None:
    """And what moves has a new one."""
    place = torch.device("cpu")
    bundle = Bundle()
    bundle += matrices([torch.randn(4, 8), torch.randn(8, 4)])
    assert tables.table(bundle, place) is tables.table(bundle, place)
    one = tables.table([bundle[0]], place)
    assert one.refs.tolist() == [bundle[0].tensor.data_ptr(), 8, 1]
    assert tables.table([bundle[0]], place).refs is one.refs
    assert tables.table([bundle[1]], place).refs.tolist() == [bundle[1].tensor.data_ptr(), 1, 4]


@pytest.mark.skipif(INTERPRETED, reason="there are no graphs")
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 15, 64, 100])
def test_what_a_graph_reads_is_written_by_launches(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not copied from memory of the host, which a graph would read again."""
    numbers = (torch.randn(count, dtype=torch.float64) * 2.0**40).to(dtype)
    monkeypatch.setattr(tables, "capturing", lambda _: True)
    with device_at(80, []) as device:
        on_device = tables.on_device(bytes(numbers.untyped_storage()), dtype, torch.device("cpu"))
        assert torch.equal(on_device, numbers) and on_device.dtype == dtype
        assert len(device.log) == -(-count * dtype.itemsize // 256)
