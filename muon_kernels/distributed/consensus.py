"""Questions of ranks to one another outside of steps: for the same parameters, and for each other's state."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensors import is_dtensor
from .placement import Placement, Team


def teams_of(placements: Mapping[Tensor, Placement]) -> dict[Team, list[Tensor]]:
    """Return every team with the parameters that it steps together, in their order."""
    teams: dict[Team, list[Tensor]] = {}
    for p, placement in placements.items():
        teams.setdefault(placement.team, []).append(p)
    return teams


# Where ranks share state, all have to ask for a checkpoint. One that asks alone gets an error after this time.
_PATIENCE = timedelta(seconds=60)


def gathered(
    owned: Mapping[Tensor, Placement], state: Mapping[Tensor, Mapping[str, Any]], to: int | None = None
) -> dict[Tensor, dict[str, Any]]:
    """Gather the state of all parameters that have an owner. Every rank of the teams has to call this.

    Args:
        owned: the parameters that have an owner.
        state: this rank's state.
        to: rank of the team that gets it; None for all.

    Returns:
        The state on ranks that get it, and nothing on others.

    Raises:
        RuntimeError: some rank does not call it.
    """
    found: dict[Tensor, dict[str, Any]] = {}
    teams = teams_of(owned)
    for team, params in teams.items():
        group = team.replicas
        assert group is not None
        here = dist.all_reduce(torch.zeros(1, dtype=torch.int32, device=params[0].device), group=group, async_op=True)
        try:
            here.wait(_PATIENCE)
        except Exception as error:
            raise RuntimeError(
                f"state_dict() should be called on every rank of the process group, which share the state, but some "
                f"did not within {_PATIENCE.seconds} s: {error}; where only one rank saves, have all ranks call "
                "consolidate_state_dict() before"
            ) from error
        own = [{key: (t.shape, t.dtype) for key, t in state.get(p, {}).items()} for p in params]
        everybody: list[Any] = [None] * group.size()
        dist.all_gather_object(everybody, own, group=group)
        for i, p in enumerate(params):
            owner = owned[p].owner
            assert owner is not None
            for key, (shape, dtype) in everybody[owner][i].items():
                mine = owner == team.rank
                if to is not None and team.rank not in (owner, to):
                    continue
                sent = state[p][key].contiguous() if mine else torch.empty(shape, dtype=dtype, device=p.device)
                if to is None:
                    dist.broadcast(sent, group_src=owner, group=group)
                elif mine and to != team.rank:
                    dist.send(sent, group_dst=to, group=group)
                elif not mine:
                    dist.recv(sent, group_src=owner, group=group)
                if to in (None, team.rank):
                    # One rank may have no room on its device for what all others keep.
                    found.setdefault(p, {})[key] = state[p][key] if mine else sent if to is None else sent.cpu()
    return found


def check_alike(placements: Mapping[Tensor, Placement], group: Mapping[str, Any], also: Team | None = None) -> None:
    """Raise ValueError, on every rank, unless all ranks of a team gave the same parameters and options.

    Args:
        placements: of the parameters of a group.
        group: the group.
        also: a team that compares what it was given even where this rank has no parameter of it.
    """
    names = dict(zip(group["params"], group.get("param_names", ()), strict=False))
    options = {
        key: getattr(value, "__qualname__", None) or repr(value)
        for key, value in sorted(group.items())
        if key not in ("params", "param_names")
    }
    none: dict[Team, list[Tensor]] = {} if also is None else {also: []}
    teams = none | teams_of(placements)
    for team, params in teams.items():
        own = [f"{key}={value}" for key, value in options.items()]
        for i, p in enumerate(params):
            where = f", placements {p.placements}" if is_dtensor(p) else ""
            own.append(f"parameter {names.get(p, i)} of size {tuple(p.shape)} and {p.dtype}{where}")
        for process_group in team.groups:
            everybody: list[Any] = [None] * process_group.size()
            dist.all_gather_object(everybody, own, group=process_group)
            for rank, other in enumerate(everybody):
                _compare(rank, everybody[0], other)


def check_counts(group: dist.ProcessGroup, count: int) -> None:
    """Raise ValueError, on every rank, unless all ranks of a process group give an optimizer as many param groups."""
    counts: list[Any] = [None] * group.size()
    dist.all_gather_object(counts, count, group=group)
    for rank, other in enumerate(counts):
        if other != counts[0]:
            raise ValueError(
                f"all ranks should give the optimizer as many param groups but rank {rank} of the process group gave "
                f"{other} where rank 0 gave {counts[0]}"
            )


def _compare(rank: int, first: list[str], other: list[str]) -> None:
    if other == first:
        return
    n = next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
    a, b = (items[n] if n < len(items) else "nothing more" for items in (first, other))
    raise ValueError(
        f"all ranks should give the optimizer the same parameters, in the same order, and options but rank {rank} of "
        f"the process group gave {b} where rank 0 gave {a}"
    )
