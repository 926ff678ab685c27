"""What fused_step must do, whoever wrote the kernel: a whole Muon step of small matrices in one launch.

A module that imports these tests has a fixture `stepper` of the protocol below; tests of one implementation alone are
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from checks.vast import far_apart
from muon_kernels.checks.matrices import SPECTRA, factors, spectral_truth
from muon_kernels.checks.yardsticks import bf16_loop, newton_schulz, relative_error
from muon_kernels.coefficients import COEFFICIENTS, Schedule, resolve

POISON = float("nan")
RESTART_FREE = [name for name in COEFFICIENTS if name != "deepseek_v4"]


def shape_id(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


class Stepper(Protocol):
    """One implementation."""

    rows: int  # at most

    def step(self, step: Step, **options: Any) -> list[int]:
        """The grids of its launches; fails if the executor warns."""


@dataclass
class Step:
    """One call: tensors are (rows, cols) views of any strides, updated in place."""

    grads: Sequence[Tensor]
    momenta: Sequence[Tensor] | None
    params: Sequence[Tensor]
    schedule: Schedule = field(default_factory=lambda: resolve("keller", 3))  # gentle: errors stay tiny
    eps: float = 1e-7
    grad_scale: float = 1.0
    mu: float = 0.95
    nesterov: bool = True
    dampened: bool = True
    lr: float = 0.5
    weight_decay: float = 0.25
    ratio: float | Sequence[float] = 0.75  # one for all, or one a matrix
    device_lr: Tensor | None = None
    device_weight_decay: Tensor | None = None
    cautious: bool = False
    stochastic_rounding: bool = False

    def ratio_of(self, i: int) -> float:
        return self.ratio if isinstance(self.ratio, float) else self.ratio[i]

    def run(self, stepper: Stepper, **options: Any) -> list[int]:
        """The grids of its launches."""
        return stepper.step(self, **options)

    def clone(self, **changes: Any) -> Step:
        copy = replace(self, **changes)
        copy.grads = [like(t) for t in self.grads]
        copy.momenta = None if self.momenta is None else [like(t) for t in self.momenta]
        copy.params = [like(t) for t in self.params]
        return copy


def like(t: Tensor) -> Tensor:
    """A copy with the same strides and the same place in a storage of the same size."""
    base = torch.tensor([], dtype=t.dtype).set_(t.untyped_storage().clone())
    return base.as_strided(t.shape, t.stride(), t.storage_offset())


LAYOUTS = ["rows", "columns", "padded", "odd", "both"]


def place(values: Tensor, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values in memory of that layout, in the middle of a storage of NaN."""
    rows, cols = values.shape
    strides, offset = {
        "rows": ((cols, 1), 16),
        "columns": ((1, rows), 16),
        "padded": ((cols + 12 - cols % 4, 1), 8),
        "odd": ((cols + 3, 1), 7),
        "both": ((2 * cols + 1, 2), 3),
    }[layout]
    size = offset + (rows - 1) * strides[0] + (cols - 1) * strides[1] + 9
    to = torch.full((size,), POISON, dtype=dtype).as_strided((rows, cols), strides, offset)
    return to.copy_(values)


def untouched(before: Tensor, after: Tensor) -> bool:
    """Whether nothing but the view has changed in the storage."""
    storage = torch.tensor([], dtype=after.dtype).set_(after.untyped_storage())
    rest = torch.ones_like(storage, dtype=torch.bool)
    rest.as_strided(after.shape, after.stride(), after.storage_offset()).fill_(False)
    assert before.stride() == after.stride()
    return bool(storage[rest].isnan().all())


def direction(step: Step, grad: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(direction, new momentum) in float64; the momentum is rounded to its dtype where the kernel rounds it."""
    g = grad.double() * step.grad_scale
    if momentum is None:
        return g, None
    old = momentum.double()
    new = (step.mu * old + (1 - step.mu) * g) if step.dampened else step.mu * old + g
    stored = new.to(momentum.dtype).double()
    if not step.nesterov:
        return stored, new
    return ((1 - step.mu) * g + step.mu * stored) if step.dampened else g + step.mu * stored, new


def check(step: Step, stepper: Stepper, tolerance: float = 2e-3, **options: Any) -> None:
    """Runs it and compares everything with float64."""
    before = step.clone()
    assert step.run(stepper, **options) == [len(step.grads)]
    assert all(map(untouched, (*before.params, *(before.momenta or ())), (*step.params, *(step.momenta or ()))))
    compare(before, step, tolerance)


def compare(before: Step, step: Step, tolerance: float = 2e-3) -> None:
    """What a step was before it ran, and is now, by float64."""
    for i, param in enumerate(step.params):
        d, momentum = direction(before, before.grads[i], before.momenta[i] if before.momenta else None)
        if step.momenta is not None and momentum is not None:
            unit = max(2.0**-22, torch.finfo(step.momenta[i].dtype).eps)
            torch.testing.assert_close(step.momenta[i].double(), momentum, rtol=unit, atol=unit * float(d.abs().max()))
        assert torch.equal(step.grads[i], before.grads[i]), "gradient written to"
        update, old = newton_schulz(d, step.schedule), before.params[i].double()
        lr = step.lr if step.device_lr is None else float(step.device_lr)
        weight_decay = step.weight_decay if step.device_weight_decay is None else float(step.device_weight_decay)
        decay = 1 - lr * weight_decay * ((update * old >= 0) if step.cautious else 1)
        expected = old * decay - lr * step.ratio_of(i) * update
        unit = max(2.0**-22, torch.finfo(param.dtype).eps)
        error = (param.double() - expected).abs()
        if step.cautious:  # where the update is about 0 its sign is anybody's
            error = error[update.abs() > 1e-3]
        bound = tolerance * float(update.abs().max()) + unit * float(old.abs().max())
        assert not error.numel() or float(error.max()) <= bound, f"matrix {i}: {float(error.max())} > {bound}"


def make_step(
    shape: tuple[int, int],
    count: int = 1,
    layout: str = "rows",
    dtypes: Sequence[torch.dtype] = (torch.float32,) * 3,
    seed: int = 0,
    momentum: bool = True,
    **changes: Any,
) -> Step:
    g = torch.Generator().manual_seed(seed)

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [place(torch.randn(*shape, generator=g), layout, dtype) for _ in range(count)]

    return Step(
        tensors(dtypes[0]), tensors(dtypes[1]) if momentum else None, tensors(dtypes[2]), **changes
    )  # fmt: skip


SHAPES = [(1, 1), (3, 17), (16, 160), (29, 32), (64, 64), (64, 129), (65, 70), (128, 200)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_step(stepper: Stepper, shape: tuple[int, int], layout: str) -> None:
    if shape[0] > stepper.rows:
        pytest.skip(f"takes {stepper.rows} rows")
    check(make_step(shape, 2, layout), stepper)


FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "dtypes",
    [(FLOAT, FLOAT, BF16), (BF16, FLOAT, FLOAT), (BF16, BF16, BF16), (HALF, FLOAT, HALF), (FLOAT, HALF, HALF)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["rows", "columns", "odd"])
def test_dtypes(stepper: Stepper, layout: str, dtypes: Sequence[torch.dtype]) -> None:
    """In whole vectors, and with one to three elements left over."""
    for shape in ((24, 76), (21, 75), (22, 73), (23, 74)):
        check(make_step(shape, 1, layout, dtypes), stepper, tolerance=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": False},
        {"momentum": False, "grad_scale": -3.0},
        {"momentum": False, "nesterov": False},
        {"nesterov": False},
        {"nesterov": False, "dampened": False},
        {"dampened": False},
        {"mu": 0.3},
        {"ratio": [0.75, 1.5]},
        {"schedule": resolve("keller", 3)._replace(margin=1.5)},
        {"mu": 0.3, "dampened": False, "grad_scale": 0.5},
        {"cautious": True},
        {"device_lr": torch.tensor(0.125), "lr": float("nan")},
        {"device_weight_decay": torch.tensor(0.125), "weight_decay": float("nan"), "cautious": True},
    ],
    ids=str,
)
def test_options(stepper: Stepper, changes: dict[str, Any]) -> None:
    check(make_step((10, 70), 2, **changes), stepper)


def test_layouts_may_differ(stepper: Stepper) -> None:
    mixed = make_step((20, 52), 3)
    for i, layouts in enumerate(
        [("rows", "columns", "rows"), ("columns", "rows", "columns"), ("both", "odd", "padded")]
    ):
        mixed.grads[i], mixed.momenta[i], mixed.params[i] = (  # type: ignore[index]
            place(t[i], layout) for t, layout in zip((mixed.grads, mixed.momenta, mixed.params), layouts, strict=True)
        )
    check(mixed, stepper)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(4, 8), (3, 7)], ids=shape_id)
def test_offsets_have_64_bits(stepper: Stepper, shape: tuple[int, int], layout: str) -> None:
    """Lines 2^31 elements and more apart, in whole vectors and one by one."""
    strides = (2**31 + 8, 1) if layout == "rows" else (1, 2**31 + 8)
    before = make_step(shape, 2, layout)
    assert before.momenta is not None
    spread = [[far_apart(t, strides) for t in tensors] for tensors in (before.grads, before.momenta, before.params)]
    step = replace(before, grads=spread[0], momenta=spread[1], params=spread[2])
    step.run(stepper)
    compare(before, step)


@pytest.mark.parametrize("mu", [0.95, 0.3])
@pytest.mark.parametrize("dampened", [True, False])
def test_momentum_is_torchs_to_the_bit(stepper: Stepper, dampened: bool, mu: float) -> None:
    step = make_step((16, 64), dampened=dampened, mu=mu)
    expected, g = step.momenta[0].clone(), step.grads[0].contiguous()
    expected = expected.lerp_(g, 1 - step.mu) if dampened else torch.addcmul(g, expected, torch.tensor(step.mu))
    step.run(stepper)
    torch.testing.assert_close(step.momenta[0], expected, rtol=0 if dampened else 2e-7, atol=0)


def accuracy(stepper: Stepper, name: str, shape: tuple[int, int]) -> list[str]:
    """The spectra on which the accuracy rule is broken: 1.3 times torch's own error, or 2.5 % where that is below."""
    schedule, missed = resolve(name, None), []
    grads = [place((lambda U, s, V: (U * s) @ V.mT)(*factors(x, *shape)).float(), "rows") for x in SPECTRA]
    step = Step(grads, None, [torch.zeros(shape) for _ in grads], schedule, lr=-1.0, ratio=1.0, weight_decay=0.0)
    step.run(stepper)
    for spectrum, grad, result in zip(SPECTRA, grads, step.params, strict=True):
        if spectrum == "zero":
            assert not result.any()
            continue
        truth = spectral_truth(*factors(spectrum, *shape), schedule.triples, schedule.margin)
        ours, torchs = relative_error(result, truth), relative_error(bf16_loop(grad[None], schedule), truth)
        if not ours <= max(1.3 * torchs, 0.025):
            missed.append(f"{spectrum}: {ours:.4f}, torch {torchs:.4f}")
    return missed


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_scale_does_not_matter(stepper: Stepper, layout: str) -> None:
    """Not even one that grows over the columns: what comes first may have the wrong power of two."""
    scales = [1e-41, 1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 3e38]
    values = torch.randn(20, 100).clamp(-1, 1) * torch.logspace(-6, 0, 100)
    grads = [place((values.double() * s).float(), layout) for s in scales]
    step = Step(grads, None, [torch.zeros(20, 100) for _ in grads], lr=-1.0, ratio=1.0, weight_decay=0.0)
    step.run(stepper)
    for result, grad in zip(step.params, grads, strict=True):
        assert relative_error(result, newton_schulz(grad, step.schedule)) < 2e-3


@pytest.mark.parametrize(("columns", "backwards"), [(96, False), (192, False), (192, True)])
def test_a_quiet_part_is_not_lost(stepper: Stepper, columns: int, backwards: bool) -> None:
    """Columns of 1e-25 before columns of 1: R so far has to be scaled down, not thrown away with a NaN. Or after."""
    values = torch.randn(5, columns)
    values[:, :32] *= 1e-25
    values[:, 32:64] = 0
    values[:, 64:128] /= 64
    if backwards:
        values = values.flip(1).contiguous()
    step = Step([values], None, [torch.zeros(5, columns)], lr=-1.0, ratio=1.0, weight_decay=0.0)
    step.run(stepper)
    assert relative_error(step.params[0], newton_schulz(values, step.schedule)) < 2e-3


def test_zero_nan_and_infinity(stepper: Stepper) -> None:
    step = make_step((12, 40), 4, momentum=False)
    step.grads[0].zero_()
    step.grads[1][3, 7] = float("nan")
    step.grads[2][11, 39] = float("inf")
    before = step.clone()
    step.run(stepper)
    assert torch.equal(step.params[0], before.params[0] * (1 - step.lr * step.weight_decay))
    assert step.params[1].isnan().all() and step.params[2].isnan().all()
    assert step.params[3].isfinite().all()


@pytest.mark.parametrize("shape", [(17, 70), (64, 64)], ids=shape_id)
def test_every_order_gives_the_same_bits(stepper: Stepper, shape: tuple[int, int]) -> None:
    step = make_step(shape, 3)
    first = step.clone()
    first.run(stepper)
    for options in (
        {},
        {"order": "backward", "asynchrony": "late"},
        {"order": "random", "asynchrony": "random", "seed": 7},
    ):
        again = step.clone()
        again.run(stepper, **options)
        for one, other in zip(first.params, again.params, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_no_races(stepper: Stepper, layout: str) -> None:
    check(make_step((20, 70), 1, layout), stepper, races=True)
