"""`Muon(backend="cuda")` from end to end: through the host's real launch code to nvcc's PTX, executed on the CPU; where
there is a GPU, on that as well."""

from __future__ import annotations

import pytest
import torch
from checks.step import *  # noqa: F403
from checks.step import stepped
from emulated import on
from ptx import standin
from torch import nn

from muon_kernels import Muon, options
from muon_kernels.backends import cuda
from muon_kernels.checks.steps import captured_steps_replay
from muon_kernels.step.plan import Bucket

needs_nvcc = pytest.mark.skipif(standin.nvcc() is None, reason="no nvcc: kernels cannot be compiled")


@needs_nvcc
def test_many_matrices_take_more_launches(emulated: standin.Runtime) -> None:
    """Their lists are arguments, which are limited, and no two neighbours of these have equal strides."""
    module = cuda._device.module()
    capacities = module.cuda.momentum_capacity(), module.cuda.apply_capacity(), module.cuda.fused_capacity()
    assert capacities == (cuda.MOMENTUM_CAPACITY, cuda.APPLY_CAPACITY, cuda.FUSED_CAPACITY)
    for count, columns in ((cuda.FUSED_CAPACITY + 1, 3), (cuda.MOMENTUM_CAPACITY + 1, 2)):
        memory = torch.ones(10 * count)
        params = [nn.Parameter(memory.as_strided((2, columns), (columns + i % 2, 1), 10 * i)) for i in range(count)]
        muon = Muon(params, backend="cuda", ns_coefficients="keller" if columns == 3 else "deepseek_v4")
        for i, p in enumerate(params):
            p.grad = torch.ones(columns, 2).T * (i + 1) if i % 2 else torch.ones(2, columns) * (i + 1)
        before = len(emulated.log)
        muon.step()
        assert len(emulated.log) - before == muon.plan().launches
        assert muon.plan().buckets[0].fused == (columns == 3)


@needs_nvcc
def test_few_wide_matrices_are_stepped_in_parts(emulated: standin.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plan says, and captured; by one block each the momenta are the same to the bit, the parameters nearly."""
    shapes = ((2, 16, 2061), (2061, 16))

    def both() -> list[nn.Parameter]:
        memory = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=memory)) for shape in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, generator=memory)
        muon = Muon(params, lr=0.1, backend="cuda")
        before = len(emulated.log)
        muon.step()
        assert len(emulated.log) - before == muon.plan().launches
        found.append((muon.plan().buckets[0], [muon.state[p]["momentum_buffer"] for p in params]))
        return params

    found: list[tuple[Bucket, list[torch.Tensor]]] = []
    divided = both()
    monkeypatch.setattr(cuda, "fused_parts", lambda *_: 1)
    whole = both()
    (bucket, momenta), (other, theirs) = found
    assert (bucket.parts, bucket.launches, other.parts, other.launches) == (33, 2, 1, 1)
    assert all(map(torch.equal, momenta, theirs))
    for p, q in zip(divided, whole, strict=True):
        assert not torch.equal(p, q), "sums of two orders"
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(options, "on_host", lambda value: not isinstance(value, torch.Tensor))
    captured_steps_replay(on(emulated), shapes)


@needs_nvcc
@pytest.mark.parametrize("name", ["keller", "you6", "deepseek_v4"])
def test_what_is_not_fused_is_stepped_all_the_same(emulated: standin.Runtime, name: str) -> None:
    """The plan knows which schedules and sizes the fused kernel does not take."""
    *_, muon = stepped("cuda", steps=1, ns_coefficients=name)
    assert [b.fused for b in muon.plan().buckets[:2]] == [name != "deepseek_v4"] * 2
    assert len(emulated.log) == muon.plan().launches


@needs_nvcc
@pytest.mark.parametrize("shape", [(24, 40), (130, 150)], ids=["fused_step", "momentum_update"])
def test_old_devices(emulated: standin.Runtime, shape: tuple[int, int]) -> None:
    """By the plan, and by the kernels if nobody has asked."""
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    emulated.device.major = 7
    try:
        with pytest.raises(ValueError, match=r"compute capability is below 8.0, for 1 of \d+x\d+ on cpu; "):
            Muon([p], backend="cuda").step()
        cuda._device.capability = lambda device: (7, 5)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"compute capability 8.0 or more, cpu has 7.5; use backend='auto'"):
            Muon([p], backend="cuda")
    finally:
        emulated.pretend(8, 0)
    assert torch.equal(p, torch.ones(shape))


@needs_nvcc
@pytest.mark.parametrize(
    ("function", "shape", "verb"),
    [
        ("cudaFuncSetAttribute", (65, 70), "fused_step"),  # which asks for as much shared memory as it needs
        ("cudaGetDevice", (24, 40), "fused_step"),
        ("cudaDeviceGetAttribute", (130, 150), "momentum_update"),
    ],
)
def test_an_error_is_reported_once(emulated: standin.Runtime, function: str, shape: tuple[int, int], verb: str) -> None:
    """Whatever failed, the next step finds nothing of it."""
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    muon = Muon([p], backend="cuda")
    emulated.fail_next(2, function)
    with pytest.raises(RuntimeError, match=rf"{verb}: cudaErrorMemoryAllocation \(CUDA error 2\).*free memory"):
        muon.step()
    assert emulated.last_error == 0
    assert torch.equal(p, torch.ones(shape))
    muon.step()
    assert not torch.equal(p, torch.ones(shape))


@needs_nvcc
@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (209, "MUON_KERNELS_CUDA_ARCHS=80"),
        (35, "driver is older"),
        (1, r"CUDA 12.1 \(530\)"),
        (700, "CUDA_LAUNCH_BLOCKING=1"),
    ],
)
@pytest.mark.parametrize(("shape", "verb"), [((24, 40), "fused_step"), ((130, 150), "momentum_update")])
def test_an_error_of_a_launch(
    emulated: standin.Runtime, code: int, mend: str, shape: tuple[int, int], verb: str
) -> None:
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    muon = Muon([p], backend="cuda")
    emulated.fail_next(code)
    sentence = rf"{verb}: .*\(CUDA error {code}\), for 1 of {shape[0]}x{shape[1]} on cpu; .*{mend}"
    with pytest.raises(RuntimeError, match=sentence):
        muon.step()
    assert torch.equal(p, torch.ones(shape)), "the first launch of a step fails before anything is written"
    muon.step()
    assert not torch.equal(p, torch.ones(shape))
