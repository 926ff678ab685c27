"""Steps that several ranks take together."""

from __future__ import annotations

from typing import Any

__all__ = ["ZeroMuon"]


def __getattr__(name: str) -> Any:
    """ZeroMuon, when somebody asks for it: `Muon` imports this package, and not what is built on it."""
    if name in __all__:
        from .zero import ZeroMuon

        return ZeroMuon
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
