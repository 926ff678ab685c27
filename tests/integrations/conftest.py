import os
import sys
from collections.abc import Iterator

# Before a library reads them: nothing here may be downloaded, and a second pool of threads would wait for the cores.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import pytest
import torchvision_operators
from ranks import World, world
from tiny import another_accelerator

torchvision_operators.declare()


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    yield
    if "accelerate" in sys.modules:
        another_accelerator()


@pytest.fixture(scope="session")
def ranks() -> Iterator[World]:
    """Two processes; to import what tests import takes them seconds."""
    with world(2) as started:
        yield started
