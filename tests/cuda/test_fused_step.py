"""`fused_step`, compiled by nvcc and executed on the CPU: a whole Muon step of small matrices in one launch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from checks import fused
from checks.fused import *  # noqa: F403
from checks.fused import (
    BF16,
    FLOAT,
    HALF,
    RESTART_FREE,
    Step,
    accuracy,
    check,
    direction,
    make_step,
    newton_schulz,
    relative_error,
    shape_id,
)
from ptx.profile import Profile
from torch import Tensor

from muon_kernels.backends import cuda, native
from muon_kernels.backends.terms import terms_needed
from muon_kernels.coefficients import resolve
from muon_kernels.verbs import ApplyOptions

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: kernels cannot be compiled")


def refs(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([[t.data_ptr(), *t.stride()] for t in tensors], dtype=torch.int64)


class Compiled:
    """The module built on the stand-in runtime."""

    rows = max(cuda.FUSED_ROWS.values())
    parts = 1  # unless a test says otherwise

    def __init__(self, module: ModuleType, runtime: Any) -> None:
        self.module, self.runtime = module, runtime

    def step(self, step: Step, *, terms: int | None = None, parts: int | None = None, **options: Any) -> list[int]:
        """The first sides of its launches' grids; `terms`: None for as many as the backend takes."""
        module, runtime, parts = self.module, self.runtime, self.parts if parts is None else parts
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
        chosen, _ = native.apply_options(module, ApplyOptions(step.cautious, step.stochastic_rounding), *address)
        coefficients = [x for triple in step.schedule.triples for x in triple]
        terms = terms or terms_needed(step.schedule.triples, step.schedule.margin)
        partials = self.partials(len(step.grads) * min(max(parts, 0), 9) * module.cuda.fused_partial_bytes(rows) // 4)
        with runtime.options(**options):
            runtime.register(*tensors, *scalars, partials)
            try:
                module.cuda.fused_step(
                    len(step.grads), rows, cols, momentum, apply, coefficients, terms, parts,
                    partials.data_ptr() if parts > 1 else 0, chosen, 0,
                )  # fmt: skip
            except RuntimeError as error:
                raise AssertionError([*map(str, runtime.failures), *runtime.build_errors]) from error
            finally:
                runtime.forget_memory()
            assert not any(entry.warnings for entry in runtime.log), runtime.log
            self.profiles: list[Profile] = [*runtime.profiles.values()]
            assert all(entry.grid[1] == parts for entry in runtime.log)
            return [entry.grid[0] for entry in runtime.log][:: min(parts, 2)]

    def partials(self, floats: int) -> Tensor:
        """Memory of exactly that size at 32 bytes, all NaN."""
        memory = torch.full((floats + 8,), float("nan"))
        return memory[-memory.data_ptr() % 32 // 4 :][:floats]


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


# --- In parts of the columns, each with a block, in two launches ---


@pytest.fixture
def divided(stepper: Compiled) -> Compiled:
    """In two parts."""
    stepper.parts = 2
    return stepper


@pytest.mark.parametrize(
    ("shape", "parts", "layout", "dtypes"),
    [
        ((3, 97), 4, "rows", (FLOAT, FLOAT, FLOAT)),  # a part has one column
        ((9, 160), 3, "columns", (BF16, FLOAT, BF16)),  # two tiles, two and one
        ((16, 225), 2, "odd", (HALF, HALF, FLOAT)),
        ((16, 160), 5, "both", (FLOAT, BF16, HALF)),
        ((29, 101), 2, "columns", (FLOAT, FLOAT, FLOAT)),
        ((64, 129), 3, "padded", (BF16, BF16, BF16)),
        ((65, 70), 2, "rows", (FLOAT, FLOAT, FLOAT)),
    ],
    ids=str,
)
def test_parts(
    stepper: Compiled, shape: tuple[int, int], parts: int, layout: str, dtypes: Sequence[torch.dtype]
) -> None:
    """Against float64, three matrices of sizes ten times apart; momenta are those of one block to the bit."""
    step = make_step(shape, 3, layout, dtypes, ratio=[0.5, 1.0, 1.5])
    for i, (grad, momentum) in enumerate(zip(step.grads, step.momenta or (), strict=True)):
        grad.mul_(10.0 ** (i - 1)), momentum.mul_(10.0 ** (i - 1))
    whole = step.clone()
    check(step, stepper, tolerance=2e-3 if dtypes == (FLOAT,) * 3 else 1e-2, parts=parts)
    whole.run(stepper)
    assert whole.momenta and step.momenta and all(map(torch.equal, whole.momenta, step.momenta))


@pytest.mark.parametrize(
    ("name", "shape", "parts"),
    [("keller", (16, 160), 3), ("you6", (16, 160), 5), ("polar_express", (16, 129), 2), ("keller", (128, 200), 2)],
)
def test_accuracy_in_parts(stepper: Compiled, name: str, shape: tuple[int, int], parts: int) -> None:
    stepper.parts = parts
    assert not accuracy(stepper, name, shape)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_scale_does_not_matter_to_parts(divided: Compiled, layout: str) -> None:
    fused.test_scale_does_not_matter(divided, layout)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("parts", [2, 6])
def test_a_quiet_part_is_not_lost_among_parts(stepper: Compiled, parts: int, backwards: bool) -> None:
    """A part's power of two is its own: of columns of 1e-25, of zeros, of columns 64 times as small as others."""
    stepper.parts = parts
    fused.test_a_quiet_part_is_not_lost(stepper, 192, backwards)


def test_parts_far_apart(divided: Compiled) -> None:
    """Parts 2^200 apart: what is left of the smaller one is nothing, and no NaN of an exponent out of range."""
    values = torch.randn(7, 64)
    values[:, :32] *= 2.0**-100
    values[:, 32:] *= 2.0**100
    step = Step([values], None, [torch.zeros(7, 64)], lr=-1.0, ratio=1.0, weight_decay=0.0)
    step.run(divided)
    assert relative_error(step.params[0], newton_schulz(values, step.schedule)) < 2e-3


@pytest.mark.parametrize("place", [0, 39])
def test_zero_nan_and_infinity_in_a_part(divided: Compiled, place: int) -> None:
    """What one part has spoils all of that matrix and nothing of another."""
    fused.test_zero_nan_and_infinity(divided)
    step = make_step((12, 40), 2)
    step.grads[0][5, place] = float("nan")
    step.run(divided)
    assert step.params[0].isnan().all() and step.params[1].isfinite().all()


def test_options_of_parts(divided: Compiled) -> None:
    fused.test_layouts_may_differ(divided)
    for changes in (
        {"nesterov": False, "dampened": False},
        {"momentum": False, "grad_scale": -3.0},
        {"device_lr": torch.tensor(0.125), "lr": float("nan"), "cautious": True},
    ):
        fused.test_options(divided, changes)


def test_parts_give_the_same_bits_in_every_order(divided: Compiled) -> None:
    fused.test_every_order_gives_the_same_bits(divided, (17, 70))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_no_races_between_parts(divided: Compiled, layout: str) -> None:
    fused.test_no_races(divided, layout)


def test_parts_of_more_matrices_than_a_launch_takes(divided: Compiled) -> None:
    many = make_step((2, 33), cuda.FUSED_CAPACITY + 1, seed=3)
    last = make_step((2, 33))
    last.grads, last.momenta, last.params = many.grads[-1:], many.momenta[-1:], many.params[-1:]  # type: ignore[index]
    before = last.clone()
    assert many.run(divided) == [cuda.FUSED_CAPACITY, 1]
    fused.compare(before, last)


@pytest.mark.parametrize("parts", [0, -1, 3, 4, 2**31 - 1])
def test_parts_that_have_no_columns_are_refused(stepper: Compiled, parts: int) -> None:
    step = make_step((8, 40))
    before = step.clone()
    stepper.parts = parts
    with pytest.raises(ValueError, match="fused_step"):
        step.run(stepper)
    assert torch.equal(step.params[0], before.params[0])


def test_parts_that_have_no_place_are_refused(divided: Compiled) -> None:
    step = make_step((8, 40))
    before = step.clone()
    divided.partials = lambda floats: torch.empty(0)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="fused_step"):
        step.run(divided)
    assert torch.equal(step.params[0], before.params[0])


def test_parts_leave_what_the_plan_says(stepper: Compiled) -> None:
    for rows in (1, 16, 17, 32, 33, 64, 65, 128):
        assert stepper.module.cuda.fused_partial_bytes(rows) == cuda.partial_bytes(rows)
