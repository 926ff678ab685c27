"""The strategy "blocks", MuonBP's (arXiv 2510.16981): every rank orthogonalizes its own shards, as if they were whole.

That needs no communication and is no longer Muon. So every `block_period` steps, the first among them, whole matrices
are orthogonalized, by owners. Both kinds of steps share the momentum. The paper has two learning rates, tied by the
update's RMS: the factor that `adjust_lr_fn` names is therefore that of the shape which is orthogonalized, the shard's
or the whole matrix's, and `block_lr_ratio` multiplies it in steps of shards. The paper reports 8 % more throughput at
8B parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...layout import PieceShape
from ..placement import Placement
from ..shards import pieces_held


def steps_shards(group: Mapping[str, Any]) -> bool:
    """Whether the next step of a group is one in which every rank orthogonalizes its own shards."""
    return group["strategy"] == "blocks" and bool(group.get("step", 0) % group["block_period"])


def shard_shapes(
    shard: Tensor, placement: Placement, flatten: bool | None, split: str | None
) -> tuple[list[PieceShape], int]:
    """Return what this rank holds of every piece of a parameter, and the number of parts in pieces before the first."""
    found: list[PieceShape] = []
    before = 0
    for piece, (batch, rows, cols) in pieces_held(shard, placement, flatten, split):
        if rows * cols:
            found.append((piece, (batch, rows, cols)))
        elif not found and piece is not None:
            before += piece.parts
    return found, before
