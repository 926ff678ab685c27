"""`Muon(backend="triton")` from end to end: through Triton's launch code to its PTX, executed on the CPU; on a GPU, if
there is one, as well."""

from __future__ import annotations

from step_checks import *  # noqa: F403
