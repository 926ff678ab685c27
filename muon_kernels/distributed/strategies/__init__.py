"""Strategies: how sharded matrices are orthogonalized, by name."""

from __future__ import annotations

from .gram import GramRound
from .owner import OwnerRound

# The class of the rounds in which whole matrices are stepped; with "blocks", see blocks.py, only every few steps.
STRATEGIES: dict[str, type[OwnerRound]] = {"owner": OwnerRound, "gram": GramRound, "blocks": OwnerRound}
