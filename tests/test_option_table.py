"""The table of options, beside what it is about."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_kernels import Muon, SpectralMomentum, options, stages
from muon_kernels.distributed.ranks import check_shared
from muon_kernels.distributed.strategies import STRATEGIES
from muon_kernels.optimizers import stage_options
from muon_kernels.options import OPTIONS, PREPARED_OPTIONS, check_together
from muon_kernels.options import STRATEGIES as NAMES
from muon_kernels.stages import STAGES, Stage, StageOptions
from muon_kernels.step.options import StepOptions


def test_the_table_has_every_argument_in_its_order() -> None:
    assert list(inspect.signature(Muon).parameters.keys() - {"params", "process_group"} ^ OPTIONS.keys()) == []
    arguments = [name for name in inspect.signature(Muon).parameters if name in OPTIONS]
    assert arguments == list(OPTIONS), "the order of a group's keys"


def test_stages_are_asked_for_by_switches_or_names() -> None:
    for stage in STAGES:
        first, *others = stage.choices
        assert (first, others) == (False, [True]) or (first is None and all(isinstance(c, str) for c in others)), stage


def test_type_checkers_know_the_options_that_no_signature_has() -> None:
    code = Muon.__init__.__code__
    written = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    others = StageOptions.__annotations__.keys()
    assert others == {stage.option for stage in STAGES} - {*written}
    assert all(bool(stage.help) == (stage.option in others) for stage in STAGES)


class Doubled(Stage):
    """The stage of docs/design/adding-an-option.md."""

    option = "doubled"
    help = "double every update."

    def orthogonalized(self, X: Tensor, scratch: Tensor) -> None:
        """Double the results."""
        X.mul_(2.0)


class DoubledLate(Doubled):
    """The same where parameters are updated."""

    orthogonalized = Stage.orthogonalized

    def after(
        self, X: Tensor, moments: Sequence[Tensor], scalars: Any, ratios: array[float], scratch: Tensor
    ) -> array[float]:
        """Double the ratios."""
        return array("d", (2.0 * ratio for ratio in ratios))


@pytest.mark.parametrize("stage", [Doubled, DoubledLate])
def test_a_stage_is_added_by_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch, stage: type[Stage]) -> None:
    """Checks, steps and what ranks refuse follow from it."""
    for module in (stages, options, stage_options):
        monkeypatch.setattr(module, "STAGES", (*STAGES, stage))
    monkeypatch.setitem(OPTIONS, "doubled", options.Option(options._choice_of(stage.choices), prepared=True))
    updates = []
    for doubled in (False, True):
        p = nn.Parameter(torch.zeros(8, 12))
        p.grad = torch.ones(8, 12)
        muon = Muon([p], lr=1.0, weight_decay=0.0, doubled=doubled)  # type: ignore[call-arg]
        muon.step()
        updates.append(p.detach())
        assert muon.param_groups[0]["doubled"] is doubled
    torch.testing.assert_close(updates[1], 2 * updates[0], rtol=2**-8, atol=0)
    shared = check_shared if stage is DoubledLate else check_together
    wanted = "with a process_group" if stage is DoubledLate else "strategy='gram'"
    with pytest.raises(ValueError, match=f"doubled should be False for .*{wanted}"):
        shared({**muon.param_groups[0], "strategy": "gram"})


@pytest.mark.parametrize(
    ("written", "meant"),
    [("cautios", "cautious"), ("exact_rm", "exact_rms"), ("wd", "weight_decay"), ("process_grup", "process_group")],
)
def test_a_misspelt_argument_is_understood(written: str, meant: str) -> None:
    for kind in (Muon, SpectralMomentum):
        said = rf"{kind.__name__} got an unexpected keyword argument '{written}'. Did you mean '{meant}'\?"
        with pytest.raises(TypeError, match=said):
            kind([nn.Parameter(torch.ones(2, 2))], **{written: True})  # type: ignore[arg-type]


def test_every_strategy_has_a_name() -> None:
    assert tuple(STRATEGIES) == NAMES


def test_what_prepare_is_told_makes_it_prepare_anew() -> None:
    """`schedule` comes of three options, and `momentum` of the optimizer."""
    told = set(StepOptions._fields) - {"schedule", "stages", "momentum"}
    told |= {stage.option for stage in STAGES}
    assert told | {"ns_coefficients", "ns_steps"} <= set(PREPARED_OPTIONS)
