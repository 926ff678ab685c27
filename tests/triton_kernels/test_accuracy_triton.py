"""`orthogonalize(backend="triton")` against the float64 spectral truth, on sm_90, where TMA copies and wgmma
multiplies.

On sm_80 it is held to the same by test_cross_check.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from checks.accuracy import *  # noqa: F403
from checks.step import Gpu
from places import running


@pytest.fixture(params=[90, "gpu"], ids=str)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    yield from running(request)
