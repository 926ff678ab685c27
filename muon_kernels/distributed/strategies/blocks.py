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

from ...layout import PieceShape, Window
from ..placement import Placement
from ..shards import shards_of
from ..slices import Rectangle


def steps_shards(group: Mapping[str, Any]) -> bool:
    """Whether the next step of a group is one in which every rank orthogonalizes its own shards."""
    return group["strategy"] == "blocks" and bool(group.get("step", 0) % group["block_period"])


def shard_shapes(
    placement: Placement, flatten: bool | None, split: str | None
) -> tuple[list[PieceShape], list[Window], int]:
    """Return what this rank holds of a parameter.

    Returns:
        (pieces, windows, before): the pieces of which it holds elements, where in the whole matrices these are, and the
        number of parts in pieces before the first.
    """
    found: list[PieceShape] = []
    windows: list[Window] = []
    before = 0
    for piece, (batch, *whole), rectangles, _ in shards_of(placement, flatten, split):
        held = rectangles[placement.team.shard]
        if held.elements:
            found.append((piece, (batch, held.rows, held.cols)))
            windows.append(_window(held, *whole))
        elif not found and piece is not None:
            before += piece.parts
    return found, windows, before


def _window(held: Rectangle, rows: int, cols: int) -> Window:
    """Return where in a whole matrix a shard is; both are transposed if taller than wide, each for itself."""
    turned = (held.rows > held.cols) != (rows > cols)
    return Window(held.left, held.top, rows, turned) if rows > cols else Window(held.top, held.left, cols, turned)
