"""`orthogonalize(backend="cuda")` against the float64 spectral truth."""

from __future__ import annotations

from checks.accuracy import *  # noqa: F403
