"""fused_step in Triton: what it compiles, run on the CPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from elementwise_triton import matrices
from emulated_e import executed
from fused_suite import *  # noqa: F403
from fused_suite import RESTART_FREE, Step, accuracy, make_step

from muon_kernels.coefficients import resolve
from muon_kernels.triton_kernels import fused_step


class Compiled:
    """Triton's PTX, behind Triton's launch code."""

    rows = fused_step.FUSED_ROWS

    def __init__(self, place: int) -> None:
        self.place = place

    def step(self, step: Step, **options: Any) -> list[int]:
        on_device = [t for t in (step.device_lr, step.device_weight_decay) if t is not None]
        memory = [*step.grads, *(step.momenta or ()), *step.params, *on_device]
        with executed(self.place, memory, **options) as log:
            fused_step.fused_step(
                matrices(step.params),
                matrices(step.grads),
                None if step.momenta is None else matrices(step.momenta),
                torch.empty(0, *step.grads[0].shape),
                None,
                triples=step.schedule.triples,
                momentum=step.mu,
                nesterov=step.nesterov,
                dampened=step.dampened,
                grad_scale=step.grad_scale,
                eps=step.eps,
                margin=step.schedule.margin,
                lr=step.lr if step.device_lr is None else step.device_lr,
                weight_decay=step.weight_decay if step.device_weight_decay is None else step.device_weight_decay,
                ratios=[step.ratio] * len(step.grads),
                cautious=step.cautious,
            )
        assert not any(entry.result.warnings for entry in log), log
        return [entry.grid[0] for entry in log] if self.place else [len(step.grads)]


@pytest.fixture
def stepper(place: int) -> Compiled:
    return Compiled(place)


@pytest.mark.parametrize("name", RESTART_FREE)
def test_accuracy(stepper: Compiled, name: str) -> None:
    assert not accuracy(stepper, name, (16, 160))


@pytest.mark.parametrize("name", ["keller", "you6", "polar_express"])
def test_accuracy_of_the_largest(stepper: Compiled, name: str) -> None:
    assert not accuracy(stepper, name, (64, 129))


def test_what_needs_a_restart_is_refused(stepper: Compiled) -> None:
    """So that somebody else does it."""
    for schedule in (resolve("deepseek_v4"), resolve("keller", 12), resolve((0.0, 0.0, 0.0)), resolve((1e30, 1, 1))):
        with pytest.raises(ValueError, match="fused_step"):
            make_step((8, 40), schedule=schedule).run(stepper)
    for shape in ((65, 200), (20, 10)):
        with pytest.raises(ValueError, match="fused_step"):
            make_step(shape).run(stepper)
