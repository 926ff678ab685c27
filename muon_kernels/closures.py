"""The part of an optimizer's `step` that is the same for all: a closure is asked for the loss, and steps are timed."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import overload

import torch
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports dynamo when called only
from torch.optim.optimizer import Optimizer


class ClosureOptimizer(Optimizer):
    """torch's Optimizer with a `step` that evaluates a closure and then calls `_update`, which subclasses have."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError, TypeError: an option, a gradient or state that cannot be used; nothing has been written then.
            RuntimeError: a backend or memory that is missing, in which case nothing has been written; or a rank that
                does not answer, in which case the message says whether anything has been written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        begun = perf_counter()
        self._update()
        self.__dict__.setdefault("_durations", deque(maxlen=32)).append(perf_counter() - begun)
        return loss

    @property
    def host_seconds(self) -> float | None:
        """Median of the seconds that the last 32 steps of this object took the host; see `Plan.host_seconds`."""
        durations = self.__dict__.get("_durations")
        return median(durations) if durations else None

    @abstractmethod
    def _update(self) -> None:
        """Step every parameter that has a gradient."""
