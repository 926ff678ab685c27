"""The strategy "blocks", MuonBP's (arXiv 2510.16981): every rank orthogonalizes its own parts, as if they were wholes.

That needs no communication and is no longer Muon. So every `block_period` steps, the first among them, whole matrices
are orthogonalized, by owners. Both kinds of steps share the momentum. The paper has two learning rates, tied by the
update's RMS: the factor that `adjust_lr_fn` names is therefore that of the shape which is orthogonalized, the part's or
the whole's, and `block_lr_ratio` multiplies it in steps of parts. It reports 8 % more throughput at 8B parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...layout import Piece
from ..placement import Placement
from ..shards import shards_of


def steps_shards(group: Mapping[str, Any]) -> bool:
    """Whether the coming step of a group is one in which every rank orthogonalizes its own parts."""
    return group["strategy"] == "blocks" and bool(group.get("step", 0) % group["block_period"])


def shard_shapes(
    placement: Placement, flatten: bool | None, split: str | None
) -> Iterator[tuple[Piece | None, tuple[int, int, int]]]:
    """(piece, (batch, rows, cols)) of what this rank has of every kind of matrix of a parameter."""
    for piece, (batch, _, _), rectangles in shards_of(placement, flatten, split):
        shard = rectangles[placement.team.shard]
        if shard.elements:
            yield piece, (batch, shard.rows, shard.cols)
