"""What the tests of examples share. Each script runs as a user runs it, for two steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before a library reads them: nothing is downloaded here, and threads that spin for each other would take minutes.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pytest
import torchvision_operators
from ranks import World, world

torchvision_operators.declare()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def processes() -> Iterator[World]:
    """Two processes that wait to be ranks, as torchrun would start them."""
    with world(2) as started:
        yield started


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Token files of 97 kinds of bytes: words in random order, from a few that repeat."""
    folder, generator = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    words = generator.integers(97, size=(20, 8))
    for name, count in (("train", 500), ("val", 100)):
        words[generator.integers(20, size=count)].astype(np.uint16).tofile(folder / f"{name}.bin")
    return folder
