"""momentum_update and apply_update in Triton: what it compiles, run on the CPU, against the formulas in float64."""

from __future__ import annotations

import pytest
from elementwise_suite import *  # noqa: F403
from elementwise_triton import Verbs


@pytest.fixture
def verbs(place: int) -> Verbs:
    return Verbs(place)
