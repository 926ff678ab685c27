"""`orthogonalize(backend="cuda")` against the float64 spectral truth."""

from __future__ import annotations

from accuracy_checks import *  # noqa: F403
