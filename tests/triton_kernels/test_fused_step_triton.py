"""fused_step in Triton: what it compiles, run on the CPU, against float64."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch
from checks.fused import *  # noqa: F403
from checks.fused import BF16, FLOAT, RESTART_FREE, Step, accuracy, check, make_step, shape_id
from elementwise_triton import device_at, matrices
from emulated_gpu import SHARED_BYTES, Ran, compiling
from gates import ARCHITECTURES, spilled

from muon_kernels import verbs
from muon_kernels.backends.terms import terms_needed
from muon_kernels.coefficients import resolve
from muon_kernels.triton_kernels import configs, fused_step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Compiled:
    """Triton's PTX, behind Triton's launch code."""

    rows = configs.FUSED_ROWS

    def __init__(self, place: int) -> None:
        self.place = place
        self.log: list[Ran] = []
        self.compiled: list[Any] = []

    def step(self, step: Step, *, terms: int | None = None, **options: Any) -> list[int]:
        """The grids of its launches; `terms`: None for as many as the backend takes."""
        on_device = [t for t in (step.device_lr, step.device_weight_decay) if t is not None]
        memory = [*step.grads, *(step.momenta or ()), *step.params, *on_device]
        with device_at(self.place, memory, **options) as device:
            schedule, momenta = step.schedule, None if step.momenta is None else matrices(step.momenta)
            rule = step.mu, step.nesterov, step.dampened, step.grad_scale, step.eps, schedule.margin
            X = torch.empty(1, *step.grads[0].shape, device="meta")
            lr = step.lr if step.device_lr is None else step.device_lr
            weight_decay = step.weight_decay if step.device_weight_decay is None else step.device_weight_decay
            ratio = [step.ratio_of(i) for i in range(len(step.grads))]
            fused_step.fused_step(
                verbs.Step(
                    verbs.MomentumUpdate(matrices(step.grads), momenta, X, *rule),
                    lambda scale: X,
                    schedule.triples,
                    verbs.ApplyUpdate(matrices(step.params), X, lr, weight_decay, ratio),
                    verbs.ApplyOptions(step.cautious),
                ),
                terms or terms_needed(schedule.triples, schedule.margin) or 0,
            )
        assert not device.warnings()
        self.log, self.compiled = device.log, device.compiled
        return [ran.grid[0] for ran in device.log] if self.place else [len(step.grads)]


@pytest.fixture
def stepper(place: int) -> Compiled:
    return Compiled(place)


@pytest.mark.parametrize("name", RESTART_FREE)
def test_accuracy(stepper: Compiled, name: str) -> None:
    assert not accuracy(stepper, name, (16, 160))


@pytest.mark.parametrize("name", ["keller", "you6", "polar_express"])
def test_accuracy_of_the_largest(stepper: Compiled, name: str) -> None:
    assert not accuracy(stepper, name, (64, 129))


@pytest.mark.parametrize(("terms", "tolerance"), [(2, 3e-5), (3, 2e-6)])
def test_more_terms_are_more_exact(stepper: Compiled, terms: int, tolerance: float) -> None:
    """Of two, 5e-6 of the largest update were measured; of three, less than a tenth of that."""
    check(make_step((24, 64)), stepper, tolerance, terms=terms)


def test_what_is_refused(stepper: Compiled) -> None:
    for shape in ((65, 200), (20, 10)):
        with pytest.raises(ValueError, match="fused_step"):
            make_step(shape).run(stepper)


def test_counts(stepper: Compiled) -> None:
    check(make_step((3, 17), 7), stepper)
    no_columns = Step([torch.empty(0, 5)], [torch.empty(0, 5)], [torch.empty(0, 5)])
    assert INTERPRETED or no_columns.run(stepper) == []


def test_ragged_sizes(stepper: Compiled) -> None:
    for i, (rows, cols) in enumerate(product((1, 3, 17, 63), (63, 65, 129))):
        check(make_step((rows, cols), 1, "columns" if i % 2 else "rows", schedule=resolve("keller", 1)), stepper)


def test_half_precision(stepper: Compiled) -> None:
    check(make_step((17, 33), 1, dtypes=(torch.float16,) * 3), stepper, tolerance=1e-2)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_compilations(stepper: Compiled) -> None:
    """No number that changes from step to step or from bucket to bucket compiles again."""
    make_step((8, 72), 2).run(stepper)
    for i, (count, shape) in enumerate([(1, (16, 16)), (3, (1, 8)), (16, (32, 48)), (1, (8, 80))]):
        schedule = resolve("polar_express", 1 + i)
        make_step(
            shape, count, schedule=schedule, eps=0.1 * i, grad_scale=1.0 - i, mu=0.9 - 0.3 * i, lr=0.1 * i,
            weight_decay=float(i), ratio=1.0 + i,
        ).run(stepper)  # fmt: skip
        assert not stepper.compiled


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize(
    ("shape", "terms"),
    [((32, 96), 2), ((64, 128), 2), ((64, 128), 3)],
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else str(value),
)
def test_memory_traffic(stepper: Compiled, shape: tuple[int, int], terms: int, layout: str) -> None:
    """Gradient and momentum read twice, momentum written, parameter read and written: 16 bytes at a time. And as many
    tensor instructions as the plan's FLOPs need."""
    step = make_step(shape, 1, layout)
    step.run(stepper, terms=terms, profile=True)
    profile = stepper.log[0].result.profile
    assert profile.sector_efficiency >= 0.95, profile.table()
    at_once = sum(r.bytes for r in profile.rows if r.sectors and ".v4" in r.op)
    assert at_once == 7 * 4 * shape[0] * shape[1], profile.table()
    if stepper.place == 80:
        executed = sum(row.threads for row in profile.rows if row.tensor) // 32 * 2 * 16 * 8 * 16
        assert executed == configs.executed_flops(*shape, len(step.schedule.triples), terms)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_compiles(arch: int | str) -> None:
    """Registers, shared memory, and tensor cores that multiply bf16. In vectors, and element by element."""
    stepper = Compiled(0)
    on_device = dict(device_lr=torch.tensor(0.1), device_weight_decay=torch.tensor(0.1), cautious=True)
    with compiling(arch) as device:
        for rows, cols in product((32, 64), (128, 127)):
            make_step((rows, cols)).run(stepper)
        make_step((64, 128)).run(stepper, terms=3)
        make_step((32, 127)).run(stepper, terms=3)
        make_step((64, 127)).run(stepper, terms=3)
        make_step((64, 127), dtypes=(BF16, BF16, BF16), **on_device).run(stepper)
        make_step((64, 128), dtypes=(BF16, FLOAT, BF16), nesterov=False).run(stepper)
        kernels = device.kernels(fused_step.fused_step_kernel)
    assert len(kernels) == 9
    kind, instruction = {
        90: ("ptx", "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16"),
        100: ("ptx", "tcgen05.mma"),
        "gfx942": ("amdgcn", "v_mfma_f32_"),
    }.get(arch, ("ptx", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"))
    for kernel in kernels:
        assert spilled(kernel) == 0
        assert kernel.metadata.shared <= SHARED_BYTES[arch]
        assert instruction in kernel.asm[kind] or kernel.metadata.num_warps < 4


def test_flops() -> None:
    """A product of numbers of two or three terms is three or six of bf16."""
    assert configs.executed_flops(17, 65, 3, 3) == 6 * 2 * 32 * 32 * (2 * 96 + 9 * 32)
    assert configs.executed_flops(64, 64, 5, 2) == 3 * 2 * 64 * 64 * (2 * 64 + 17 * 64)
