"""How matrices that are cut are orthogonalized, by name."""

from __future__ import annotations

from .exchange import CutRound
from .gram import GramRound

# How whole matrices go through: with "blocks", which is in blocks.py, only every few steps.
STRATEGIES: dict[str, type[CutRound]] = {"owner": CutRound, "gram": GramRound, "blocks": CutRound}
