"""Messages between ranks, and what is raised where one stays away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .placement import Team


class Failed(RuntimeError):
    """A collective that did not end."""


class Pending:
    """A collective under way; `what` it does is said if it fails."""

    def __init__(self, what: str, begin: Callable[[], Any]) -> None:
        self._what = what
        self._work = self._do(begin)

    def wait(self) -> None:
        """Until it has ended."""
        self._do(self._work.wait)

    def _do(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            raise Failed(f"{self._what}: {error}") from error


# By its name since torch 2.13, and the one that it has there no more without a warning.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(into: Tensor, share: Tensor, team: Team, of: str) -> Pending:
    """Begin to write what every replica has to all of them; `of` names it in an error."""
    return Pending(
        f"gathering the results of {of}",
        lambda: _all_gather(into, share, group=team.replicas, async_op=True),
    )
