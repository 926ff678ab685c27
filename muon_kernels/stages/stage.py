"""The base class of stages: what an option does around the iteration, beside what every step does."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Stage:
    """Share of an option in a step. No step that has one is fused. A plan counts it by these figures.

    Attributes:
        note: sentence about it in a plan.
        launches: in a pass through the workspace, one for each time that it is gone over.
        visits: how often an element of the workspace is read or written.
        state_bytes: read and written of an element's state, or of the fp32 memory that stands for it.
        packed: 1 if parameters or momentum go through fp32 memory, see packed.py.
    """

    note = ""
    launches = 0
    visits = 0
    state_bytes = 0
    packed = 0

    def floats(self, m: int, n: int, device: torch.device) -> int:
        """Return the fp32 numbers of scratch for every m x n matrix, a multiple of 16."""
        return 0

    def before(
        self, X: Tensor, scale: Tensor | None, margin: float, norms: Tensor | None, scratch: Tensor
    ) -> Tensor | None:
        """Change the directions in X before the iteration and return their scale; see `momentum_update`."""
        return scale

    def after(
        self, X: Tensor, moments: Sequence[Tensor], scalars: Any, ratios: array[float], scratch: Tensor
    ) -> array[float]:
        """Change the results in X after the iteration and return the ratios of their learning rates."""
        return ratios


def floats_for(stages: Sequence[Stage], m: int, n: int, device: torch.device) -> int:
    """Return the fp32 numbers of scratch that `stages` need for every m x n matrix. They use it one after the other."""
    return max((stage.floats(m, n, device) for stage in stages), default=0)
