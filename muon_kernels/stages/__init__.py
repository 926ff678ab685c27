"""Stages: what options do around the iteration, a class for each, and the table of them."""

from __future__ import annotations

from typing import Protocol

from .packed import EightBitMomentum, MasterWeights
from .second_moment import SecondMoment
from .signs import Signs
from .stage import Stage

__all__ = ["Stage", "stages_of"]


class StageOptions(Protocol):
    """The options that have a stage; see `Muon`."""

    @property
    def sign_momentum(self) -> bool:
        """Whether the signs of directions are orthogonalized."""
        ...

    @property
    def second_moment(self) -> str | None:
        """The form of the second moment that results are divided by, or None."""
        ...

    @property
    def master_weights(self) -> bool:
        """Whether parameters are the upper halves of fp32 ones."""
        ...


def stages_of(options: StageOptions, int8_momentum: bool = False) -> tuple[Stage, ...]:
    """Return the stages that a group's options ask for. Their order here is not the order in which they act."""
    wanted = [
        Signs() if options.sign_momentum else None,
        EightBitMomentum() if int8_momentum else None,
        MasterWeights() if options.master_weights else None,
        SecondMoment(options.second_moment) if options.second_moment is not None else None,
    ]
    return tuple(filter(None, wanted))
