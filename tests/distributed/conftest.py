from collections.abc import Iterator

import pytest
from world import World, world


@pytest.fixture(scope="session")
def ranks() -> Iterator[World]:
    """Four processes for all tests."""
    with world(4) as started:
        yield started
