"""How matrices that are cut are orthogonalized, by name."""

from __future__ import annotations

from .gram import GramRound
from .owner import CutRound

# How whole matrices go through: with "blocks", which is in blocks.py, only every few steps.
STRATEGIES: dict[str, type[CutRound]] = {"owner": CutRound, "gram": GramRound, "blocks": CutRound}
