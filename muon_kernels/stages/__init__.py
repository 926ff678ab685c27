"""What may stand around the iteration: a class for each option, and the table of them."""

from __future__ import annotations

from typing import Protocol

from .packed import EightBitMomentum, MasterWeights
from .second_moment import SecondMoment
from .signs import Signs
from .stage import Stage

__all__ = ["Stage", "stages_of"]


class StageOptions(Protocol):
    """The options that stages are of; see `Muon`."""

    @property
    def sign_momentum(self) -> bool:
        """See `Muon`."""
        ...

    @property
    def second_moment(self) -> str | None:
        """See `Muon`."""
        ...

    @property
    def master_weights(self) -> bool:
        """See `Muon`."""
        ...


def stages_of(options: StageOptions, int8_momentum: bool = False) -> tuple[Stage, ...]:
    """The stages that a group's options ask for, whatever the order in which a step comes to them."""
    wanted = [
        Signs() if options.sign_momentum else None,
        EightBitMomentum() if int8_momentum else None,
        MasterWeights() if options.master_weights else None,
        SecondMoment(options.second_moment) if options.second_moment is not None else None,
    ]
    return tuple(filter(None, wanted))
