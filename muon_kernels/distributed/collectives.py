"""Messages between ranks, and the error for a rank that does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from .missing import missing
from .placement import Team


class Failed(RuntimeError):
    """A collective that did not complete."""


@contextmanager
def doing(what: str, group: dist.ProcessGroup, since: float | None = None) -> Iterator[float]:
    """Raise Failed where a collective fails: with `what` it was doing, and the ranks that are missing.

    Args:
        what: begins the error.
        group: the ranks of the collective.
        since: when this rank came to it, in seconds since the epoch, which is yielded; None for now.
    """
    since = time.time() if since is None else since
    try:
        yield since
    except Exception as error:
        raise Failed(f"{what}: {error}{missing(group, since)}") from error


class Pending:
    """A collective of a group under way. If it fails, `what` tells in the error what it was doing."""

    def __init__(self, what: str, group: dist.ProcessGroup | None, begin: Callable[[], Any]) -> None:
        assert group is not None
        with doing(what, group) as since:
            self._work = begin()
        self._doing = what, group, since

    def wait(self) -> None:
        """Wait until the collective has completed; raise Failed if it does not."""
        with doing(*self._doing):
            self._work.wait()


# The names since torch 2.13, which warns of the older names; earlier versions have the older names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(into: Tensor, share: Tensor, team: Team, of: str) -> Pending:
    """Begin to gather the `share` of every replica in `into`, on all of them; `of` names the matrices in an error."""
    return Pending(
        f"gathering the results of {of}",
        team.replicas,
        lambda: _all_gather(into, share, group=team.replicas, async_op=True),
    )


def reduce_scatter(into: Tensor, everything: Tensor, group: dist.ProcessGroup, of: str) -> Pending:
    """Begin to sum `everything` over the ranks of a group, of which each gets a share `into`; `of` is for an error."""
    return Pending(f"reducing {of}", group, lambda: _reduce_scatter(into, everything, group=group, async_op=True))


T = TypeVar("T")


def on_all(group: dist.ProcessGroup, check: Callable[[], T]) -> T:
    """Return what a check returns on this rank; all ranks have to call this.

    Raises:
        RuntimeError: the check raised on another rank. The rank where it raised raises the same again.
    """
    error: Exception | None = None
    try:
        found = check()
    except Exception as refusal:  # to be raised when the others know
        error = refusal
    said: list[Any] = [None] * group.size()
    dist.all_gather_object(said, None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise error
    for rank, text in enumerate(said):
        if text is not None:
            raise RuntimeError(f"nothing has been changed on this rank, as rank {rank} of the process group got {text}")
    return found
