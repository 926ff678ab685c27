"""The base class of stages: what an option does around the iteration, beside what every step does."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class Stage:
    """The part that an option has in a step. No step with one is fused; a plan counts it by these figures.

    Attributes:
        option: name of the option in groups.
        choices: values of the option, the default first, which asks for no stage: False and True, or None and strings.
        help: description of the option for users, unless the optimizer's docstring has it.
        normalizes: whether it needs updates of a known norm, which those of a power above 0 have not.
        note: sentence of a plan on it.
        launches: in a pass through the workspace, one for each time that it is gone over.
        visits: how often an element of the workspace is read or written.
        state_bytes: read and written of an element's state, or of the fp32 memory that stands for it.
        packed: 1 if parameters or momentum go through fp32 memory, see packed.py.
    """

    option: ClassVar[str]
    choices: ClassVar[tuple[Any, ...]] = (False, True)
    help: ClassVar[str] = ""
    normalizes: ClassVar[bool] = False
    note = ""
    launches = 0
    visits = 0
    state_bytes = 0
    packed = 0

    @classmethod
    def of(cls, value: Any) -> Stage | None:
        """Return the stage that a value of the option asks for."""
        return cls() if value else None

    @classmethod
    def needs_whole(cls) -> bool:
        """Whether it changes directions or results as wholes, which no rank has with strategy="gram"."""
        return cls.before is not Stage.before or cls.orthogonalized is not Stage.orthogonalized

    def floats(self, m: int, n: int, device: torch.device) -> int:
        """Return the fp32 numbers of scratch for every m x n matrix, a multiple of 16."""
        return 0

    def before(
        self, X: Tensor, scale: Tensor | None, margin: float, norms: Tensor | None, scratch: Tensor
    ) -> Tensor | None:
        """Change the directions in X before the iteration and return their scale; see `momentum_update`.

        X is (batch, m, n) of 16 bits, m ≤ n: a matrix taller than wide is there as its transpose.
        """
        return scale

    def orthogonalized(self, X: Tensor, scratch: Tensor) -> None:
        """Change the results in X, where whole matrices are."""

    def after(
        self, X: Tensor, moments: Sequence[Tensor], scalars: Any, ratios: array[float], scratch: Tensor
    ) -> array[float]:
        """Change the results in X where parameters are updated, and return the ratios of their learning rates.

        Only `SecondMoment` is known to steps that several ranks share: they raise for another stage that has this.
        """
        return ratios


def floats_for(stages: Sequence[Stage], m: int, n: int, device: torch.device) -> int:
    """Return the fp32 numbers of scratch that `stages` need for every m x n matrix. They use it one after the other."""
    return max((stage.floats(m, n, device) for stage in stages), default=0)
