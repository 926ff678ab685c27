"""The table of options, beside what it is about."""

import inspect
from dataclasses import fields

from muon_kernels import Muon
from muon_kernels.distributed.strategies import STRATEGIES
from muon_kernels.options import OPTIONS, PREPARED_OPTIONS
from muon_kernels.options import STRATEGIES as NAMES
from muon_kernels.stages import STAGES
from muon_kernels.step.options import StepOptions


def test_the_table_has_every_argument_in_its_order() -> None:
    assert list(inspect.signature(Muon).parameters.keys() - {"params", "process_group"} ^ OPTIONS.keys()) == []
    arguments = [name for name in inspect.signature(Muon).parameters if name in OPTIONS]
    assert arguments == list(OPTIONS), "the order of a group's keys"


def test_every_strategy_has_a_name() -> None:
    assert tuple(STRATEGIES) == NAMES


def test_what_prepare_is_told_makes_it_prepare_anew() -> None:
    """`schedule` comes of three options, and `momentum` of the optimizer."""
    told = {field.name for field in fields(StepOptions)} - {"schedule", "stages", "momentum"}
    told |= {stage.option for stage in STAGES}
    assert told | {"ns_coefficients", "ns_steps"} <= set(PREPARED_OPTIONS)
