"""Messages between ranks, and the error for a rank that does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .missing import missing, take_back
from .placement import Team

# What no other rank can be the cause of.
_OWN = (MemoryError, torch.OutOfMemoryError, TypeError, ValueError)


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
    except _OWN as error:
        raise Failed(f"{what}: {error}") from error
    except Exception as error:
        raise Failed(f"{what}: {error}{missing(group, since)}") from error
    take_back()


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


class _Each:
    """Collectives under way, of one group."""

    def __init__(self, works: Iterable[Any]) -> None:
        self._works = list(works)

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _gather(into: Tensor, share: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Any:
    """Begin to gather shares of these sizes; what differs between backends is here.

    NCCL gathers equal shares in a ring, and broadcasts unequal ones in one launch. Gloo takes no unequal shares; its
    gather of equal ones makes a copy of them all and takes longer than a broadcast of each.
    """
    views = torch.split(into, list(sizes))
    if _backend(group, into.device) == "nccl":
        if len({*sizes}) == 1:
            return _all_gather(into, share, group=group, async_op=True)
        return dist.all_gather(list(views), share, group=group, async_op=True)
    views[group.rank()].copy_(share)
    return _Each(
        dist.broadcast(view, dist.get_global_rank(group, rank), group=group, async_op=True)
        for rank, view in enumerate(views)
        if len(view)
    )


def _backend(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Return the name of the backend that sends tensors on this kind of device."""
    of_kinds = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return {kind: name for kind, name in of_kinds}.get(device.type)


def gather(into: Tensor, share: Tensor, sizes: Sequence[int], team: Team, of: str) -> Pending:
    """Begin to gather the `share` of every replica in `into`, one after the other, on all of them.

    Args:
        into: as long as all shares; written.
        share: this rank's, as long as `sizes` says.
        sizes: lengths of the shares of all replicas.
        team: the ranks.
        of: names what is gathered in an error.
    """
    assert team.replicas is not None
    group = team.replicas
    return Pending(f"gathering the results of {of}", group, lambda: _gather(into, share, sizes, group))


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
