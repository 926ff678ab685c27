"""How matrices that are cut are orthogonalized, by name."""

from __future__ import annotations

from .gram import GramRound
from .owner import OwnerRound

# How whole matrices go through: with "blocks", which is in blocks.py, only every few steps.
STRATEGIES: dict[str, type[OwnerRound]] = {"owner": OwnerRound, "gram": GramRound, "blocks": OwnerRound}
