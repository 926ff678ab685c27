"""Messages between ranks, and the error for a rank that does not answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .placement import Team


class Failed(RuntimeError):
    """A collective that did not complete."""


class Pending:
    """A collective under way. If it fails, `what` tells in the error what it was doing."""

    def __init__(self, what: str, begin: Callable[[], Any]) -> None:
        self._what = what
        self._work = self._do(begin)

    def wait(self) -> None:
        """Wait until the collective has completed; raise Failed if it does not."""
        self._do(self._work.wait)

    def _do(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            raise Failed(f"{self._what}: {error}") from error


# The name since torch 2.13, which warns of the older name; earlier versions have the older name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(into: Tensor, share: Tensor, team: Team, of: str) -> Pending:
    """Begin to gather the `share` of every replica in `into`, on all of them; `of` names the matrices in an error."""
    return Pending(
        f"gathering the results of {of}",
        lambda: _all_gather(into, share, group=team.replicas, async_op=True),
    )
