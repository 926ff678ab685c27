from collections.abc import Iterator

import pytest
from ranks import World, world


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    """Four processes; torch keeps groups that are gone in mind, so not the same for all files."""
    with world(4) as started:
        yield started
