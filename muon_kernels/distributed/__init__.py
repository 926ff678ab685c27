"""Steps that several ranks take together."""

from __future__ import annotations

from typing import Any

__all__ = ["ZeroMuon", "ZeroMuonAdamW"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: `Muon` imports this package, and should not load what is built on it."""
    if name in __all__:
        from . import zero

        return getattr(zero, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
