"""Stages: what options do around the iteration, a class for each, and the table of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from .exact_rms import ExactRms
from .packed import EightBitMomentum, MasterWeights
from .second_moment import SecondMoment
from .signs import Signs
from .stage import Stage

__all__ = [
    "STAGES",
    "EightBitMomentum",
    "ExactRms",
    "MasterWeights",
    "SecondMoment",
    "Signs",
    "Stage",
    "StageOptions",
    "stages_of",
]

# In the order in which plans name them. Options, their checks and what a step does follow from this table.
STAGES: tuple[type[Stage], ...] = (Signs, MasterWeights, SecondMoment, ExactRms)


class StageOptions(TypedDict, total=False):
    """Options that no written signature has, for type checkers."""

    exact_rms: bool


def stages_of(group: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return the stages that the options of a group ask for; those that it lacks are at their defaults."""
    found = (stage.of(group.get(stage.option, stage.choices[0])) for stage in STAGES)
    return tuple(filter(None, found))
