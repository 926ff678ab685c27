"""Placement of parameters on ranks: what a DTensor says, as ranges of every dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from ..layout import flattens
from ..tensors import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Range = tuple[int, int]  # (start, stop)


class Team:
    """The ranks that step a parameter together.

    Attributes:
        shards: the ranks that hold different shards of every matrix; None if each holds all.
        replicas: the ranks that hold the same shard; None if no other does.
        shard, shard_count, replica, replica_count: this rank's index in each of the two, and their sizes.
    """

    def __init__(self, shards: dist.ProcessGroup | None, replicas: dist.ProcessGroup | None) -> None:
        """Take the process groups of the shards and of the replicas, None for one that is this rank alone."""
        self.shards, self.replicas = shards, replicas
        self.shard, self.shard_count = (0, 1) if shards is None else (shards.rank(), shards.size())
        self.replica, self.replica_count = (0, 1) if replicas is None else (replicas.rank(), replicas.size())

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The process groups that there are. Reducing over each in turn reduces over all ranks."""
        return [group for group in (self.shards, self.replicas) if group is not None]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.shard_count * self.replica_count

    @property
    def rank(self) -> int:
        """Index of this rank among all of the team."""
        return self.replica * self.shard_count + self.shard


def team_of(process_group: Any) -> Team:
    """Return the team of ranks that have the same plain tensors.

    Raises:
        TypeError: it is no process group, or one that this rank is not in.
    """
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group should be a torch.distributed.ProcessGroup that this rank is in, such as "
            f"torch.distributed.group.WORLD or a mesh's get_group(), but is: {process_group!r}"
        )
    return Team(None, process_group)


class Placement(NamedTuple):
    """Place of a parameter on the ranks.

    Attributes:
        team: the ranks that step it.
        whole: size of what the team holds; of a stack that is sharded along its batch, this team's share.
        shards: for every rank of `team.shards`, what it holds: a range of each dimension.
        owner: rank that keeps the momentum and steps the parameter; None if every rank does.
    """

    team: Team
    whole: tuple[int, ...]
    shards: tuple[tuple[Range, ...], ...]
    owner: int | None = None


def _group(mesh: DeviceMesh, dims: tuple[int, ...]) -> dist.ProcessGroup | None:
    if not dims:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError(f"a DTensor that is cut or repeated along dimensions {dims} of its mesh needs mesh_dim_names")
    return mesh[tuple(names[dim] for dim in dims)]._flatten().get_group()


class Teams:
    """The teams of an optimizer, each made once."""

    def __init__(self) -> None:
        """Begin without any."""
        self._found: dict[tuple[DeviceMesh, tuple[int, ...], tuple[int, ...]], Team] = {}

    def get(self, mesh: DeviceMesh, shards: tuple[int, ...], replicas: tuple[int, ...]) -> Team:
        """Return the team of a DTensor that is sharded along mesh dimensions `shards`, repeated along `replicas`."""
        key = mesh, shards, replicas
        if key not in self._found:
            self._found[key] = Team(_group(mesh, shards), _group(mesh, replicas))
        return self._found[key]


def dim_of(shard: Any, shape: Sequence[int]) -> int:
    """Return the dimension that a placement shards, counted from 0."""
    dim: int = shard.dim
    return dim % len(shape)


def chunk(at: Range, count: int, index: int) -> Range:
    """Return chunk `index` of `count` of a range, as torch.chunk and DTensor divide it.

    All chunks but the last are equal, and some may be empty.
    """
    start, stop = at
    size = -(-(stop - start) // count)
    return min(start + index * size, stop), min(start + (index + 1) * size, stop)


def ranges_at(
    shape: Sequence[int], mesh: Sequence[int], placements: Sequence[Any], dims: Sequence[int], at: Sequence[int]
) -> tuple[Range, ...]:
    """Return what the rank holds that is at the coordinates `at` along dimensions `dims` of the mesh."""
    ranges = [(0, n) for n in shape]
    # FSDP shards what tensor parallelism has sharded before it, although its mesh dimension comes first.
    later = [(i, c) for i, c in zip(dims, at, strict=True) if type(placements[i]).__name__ == "_StridedShard"]
    first = [(i, c) for i, c in zip(dims, at, strict=True) if (i, c) not in later]
    for i, coordinate in (*first, *reversed(later)):
        dim = dim_of(placements[i], shape)
        ranges[dim] = chunk(ranges[dim], mesh[i], coordinate)
    return tuple(ranges)


def batch_ranges(t: DTensor, flatten: bool | None) -> tuple[Range, ...]:
    """Return what of every dimension of a DTensor this rank holds, but for cuts of its matrices."""
    mesh, shape, coordinate = t.device_mesh, tuple(t.shape), t.device_mesh.get_coordinate()
    assert coordinate is not None
    leading = range(0 if flattens(shape, flatten) else len(shape) - 2)
    cut = [i for i, at in enumerate(t.placements) if mesh.size(i) != 1 and not at.is_replicate()]
    dims = [i for i in cut if dim_of(t.placements[i], shape) in leading]
    return ranges_at(shape, tuple(mesh.shape), t.placements, dims, [coordinate[i] for i in dims])


def placement_of(t: DTensor, flatten: bool | None, teams: Teams) -> Placement | None:
    """Return where a DTensor is, or None if this rank has whole matrices of its own.

    Args:
        t: a parameter.
        flatten: see `Muon`.
        teams: the teams of the optimizer.

    Raises:
        ValueError: it is placed in a way that cannot be stepped.
    """
    mesh, placements, shape = t.device_mesh, t.placements, tuple(t.shape)
    matrix = range(len(shape)) if flattens(shape, flatten) else range(len(shape) - 2, len(shape))
    sharded, repeated = [], []
    for i, placement in enumerate(placements):
        if mesh.size(i) == 1:
            continue
        if placement.is_partial():
            raise ValueError(f"parameters should be sharded or replicated but one has placements: {placements}")
        if placement.is_replicate():
            repeated.append(i)
        elif dim_of(placement, shape) in matrix:
            sharded.append(i)
        if i in sharded and flattens(shape, flatten) and dim_of(placement, shape):
            raise ValueError(
                f"a parameter of {len(shape)} dimensions that is flattened to matrices should be sharded along "
                f"dimension 0 but has placements: {placements}"
            )
    if not sharded and not repeated:
        return None
    sizes = tuple(mesh.shape)
    whole = tuple(stop - start for start, stop in batch_ranges(t, flatten))
    team = teams.get(mesh, tuple(sharded), tuple(repeated))
    everywhere = product(*(range(sizes[i]) for i in sharded))
    shards = tuple(ranges_at(whole, sizes, placements, sharded, at) for at in everywhere)
    held = tuple(stop - start for start, stop in shards[team.shard])
    if held != tuple(local(t).shape):
        raise ValueError(
            f"a DTensor of size {shape} with placements {placements} should hold {held} on this rank but holds: "
            f"{tuple(local(t).shape)}"
        )
    return Placement(team, whole, shards)


def replicated(team: Team, shape: Sequence[int], owner: int) -> Placement:
    """Return the placement of a plain tensor that every rank has a copy of, and `owner` the momentum."""
    return Placement(team, tuple(shape), (tuple((0, n) for n in shape),), owner)


def elements(placement: Placement) -> int:
    """Return the number of elements that the team holds."""
    return math.prod(placement.whole)
