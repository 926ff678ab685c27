"""`fused_step`, compiled by nvcc and executed on the CPU: a whole Muon step of small matrices in one launch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from checks.fused import *  # noqa: F403
from checks.fused import BF16, FLOAT, RESTART_FREE, Step, accuracy, direction, make_step, newton_schulz, shape_id
from ptx.profile import Profile
from torch import Tensor

from muon_kernels.backends import cuda
from muon_kernels.backends.terms import terms_needed
from muon_kernels.coefficients import resolve

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: kernels cannot be compiled")


def refs(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([[t.data_ptr(), *t.stride()] for t in tensors], dtype=torch.int64)


class Compiled:
    """The module built on the stand-in runtime."""

    rows = max(cuda.FUSED_ROWS.values())

    def __init__(self, module: ModuleType, runtime: Any) -> None:
        self.module, self.runtime = module, runtime

    def step(self, step: Step, *, terms: int | None = None, **options: Any) -> list[int]:
        """The grids of its launches; `terms`: None for as many as the backend takes."""
        module, runtime = self.module, self.runtime
        rows, cols = step.grads[0].shape
        tensors = [*step.grads, *(step.momenta or ()), *step.params]
        scalars = [t for t in (step.device_lr, step.device_weight_decay) if t is not None]
        dtypes = {torch.float32: module.DType.f32, torch.bfloat16: module.DType.bf16, torch.float16: module.DType.f16}
        grads, params = refs(step.grads), refs(step.params)
        momenta = refs(step.momenta) if step.momenta is not None else None
        ratio = torch.tensor([step.ratio_of(i) for i in range(len(step.grads))], dtype=torch.float64)
        stack = (0, len(step.grads), rows, cols, rows * cols, cols)
        momentum = module.MomentumUpdate(
            grads.data_ptr(), dtypes[step.grads[0].dtype], 0 if momenta is None else momenta.data_ptr(),
            dtypes[step.momenta[0].dtype] if step.momenta else module.DType.f32, stack, 0, 0, step.eps,
            step.schedule.margin, step.grad_scale, step.mu, step.nesterov, step.dampened,
        )  # fmt: skip
        apply = module.ApplyUpdate(
            params.data_ptr(), dtypes[step.params[0].dtype], stack, step.lr, step.weight_decay, ratio.data_ptr()
        )
        address = [0 if t is None else t.data_ptr() for t in (step.device_lr, step.device_weight_decay)]
        chosen = module.ApplyOptions(*address, step.cautious, step.stochastic_rounding, 0, 0)
        coefficients = [x for triple in step.schedule.triples for x in triple]
        terms = terms or terms_needed(step.schedule.triples, step.schedule.margin)
        with runtime.options(**options):
            runtime.register(*tensors, *scalars)
            try:
                module.cuda.fused_step(len(step.grads), rows, cols, momentum, apply, coefficients, terms, chosen, 0)
            except RuntimeError as error:
                raise AssertionError([*map(str, runtime.failures), *runtime.build_errors]) from error
            finally:
                runtime.forget_memory()
            assert not any(entry.warnings for entry in runtime.log), runtime.log
            self.profiles: list[Profile] = [*runtime.profiles.values()]
            return [entry.grid[0] for entry in runtime.log]


@pytest.fixture
def stepper(built: tuple[ModuleType, Any]) -> Compiled:
    return Compiled(*built)


@pytest.mark.parametrize("shape", [(8, 8), (16, 160), (64, 129)], ids=shape_id)
@pytest.mark.parametrize("name", RESTART_FREE)
def test_accuracy(stepper: Compiled, name: str, shape: tuple[int, int]) -> None:
    assert not accuracy(stepper, name, shape)


@pytest.mark.parametrize("name", ["keller", "polar_express", "cans"])
def test_accuracy_of_the_largest(stepper: Compiled, name: str) -> None:
    assert not accuracy(stepper, name, (128, 200))


def test_what_needs_a_restart_goes_another_way() -> None:
    for schedule in (resolve("deepseek_v4"), resolve("keller", 12), resolve((0.0, 0.0, 0.0)), resolve((1e30, 1, 1))):
        assert cuda.fused_plan(8, 40, 1, schedule) is None
    for schedule in (resolve("you6"), resolve("polar_express", 7)):  # three terms
        assert cuda.fused_plan(64, 70, 1, schedule) is not None
        assert cuda.fused_plan(65, 70, 1, schedule) is None
    assert cuda.fused_plan(128, 200, 1, resolve("keller")) is not None
    assert cuda.fused_plan(129, 200, 1, resolve("keller")) is None
    assert cuda.fused_plan(8, 2**31, 1, resolve("keller")) is None


@pytest.mark.parametrize(
    ("shape", "stochastic_rounding", "terms"),
    [
        ((8, 40), True, None),
        ((8, 40), False, 1),
        ((8, 40), False, 4),
        ((65, 70), False, 3),
        ((129, 200), False, None),
        ((20, 10), False, None),
    ],
    ids=str,
)
def test_what_there_is_no_kernel_for(
    stepper: Compiled, shape: tuple[int, int], stochastic_rounding: bool, terms: int | None
) -> None:
    step = make_step(shape, stochastic_rounding=stochastic_rounding)
    before = step.clone()
    with pytest.raises(ValueError, match="fused_step"):
        step.run(stepper, terms=terms)
    assert torch.equal(step.params[0], before.params[0])


def test_counts(stepper: Compiled) -> None:
    step = make_step((4, 32), 3)
    empty = step.clone()
    empty.grads, empty.momenta, empty.params = [torch.empty(4, 32)], [torch.empty(4, 32)], [torch.empty(4, 32)]
    many = make_step((2, 5), 500, seed=3, ratio=[1.0 + i % 5 for i in range(500)])
    before = many.clone()
    grids = many.run(stepper)
    assert sum(grids) == 500 and len(grids) == 2, "a launch takes what its parameters hold"
    for i in (0, 1, grids[0] - 1, grids[0], 499):
        d, _ = direction(before, before.grads[i], before.momenta[i])
        update = newton_schulz(d, many.schedule)
        expected = before.params[i].double() * (1 - many.lr * many.weight_decay) - many.lr * many.ratio_of(i) * update
        torch.testing.assert_close(many.params[i].double(), expected, rtol=0, atol=2e-3 * many.ratio_of(i))


def test_old_devices_are_refused(stepper: Compiled) -> None:
    stepper.runtime.device.major = 7
    try:
        with pytest.raises(ValueError, match="capability is below"):
            make_step((4, 32)).run(stepper)
    finally:
        stepper.runtime.device.major = 8


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("shape", [(16, 160), (32, 96)], ids=shape_id)
def test_memory_traffic(stepper: Compiled, shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """Least: gradient and momentum read twice, momentum written, parameter read and written."""
    make_step(shape, 1, layout, (dtype,) * 3).run(stepper, profile=True)
    (profile,) = stepper.profiles
    least = 7 * shape[0] * shape[1] * torch.finfo(dtype).bits // 8
    assert profile.sector_efficiency >= 0.95, profile.table()
    assert profile.global_bytes <= 1.02 * least, profile.table()
    conflicts = {row.op for row in profile.rows if row.conflicts}
    # With 16 rows, two columns of the update lie in 32 banks however they are padded: its few reads meet.
    assert conflicts <= ({"ld.shared.v4.b32"} if shape[0] == 16 and layout == "columns" else set()), profile.table()
