"""Text of the demo: what every Python brings along, a tenth of its documents held out."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

CONTEXT = 128
BATCH = 8
HELD_OUT_BATCHES = 32


def prose() -> list[bytes]:
    """Return the language reference that pydoc shows, a document a topic, in a fixed order."""
    from pydoc_data.topics import topics

    return [text.encode() for _, text in sorted(topics.items())]


def source_code() -> list[bytes]:
    """Return the sources of the standard library, a document a file, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    # Installed packages and tests differ between machines, and encodings holds tables of numbers.
    skipped = {"site-packages", "dist-packages", "test", "encodings", "pydoc_data"}
    paths = sorted([*library.glob("*.py"), *library.glob("*/*.py")])
    return [path.read_bytes() for path in paths if path.parent.name not in skipped]


def parted(documents: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Return the bytes to train on and those held out, which share no document, as integers."""
    held_out = documents[9::10]
    train = [document for number, document in enumerate(documents) if number % 10 != 9]
    return _as_tensor(train), _as_tensor(held_out)


def _as_tensor(documents: Iterable[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).long()


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """Return the CONTEXT + 1 bytes of `text` from each of `starts`."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def batches(text: Tensor, count: int) -> Iterator[Tensor]:
    """Draw `count` random batches, (BATCH, CONTEXT + 1)."""
    for _ in range(count):
        yield windows(text, torch.randint(len(text) - CONTEXT, (BATCH,)))


def even_batches(text: Tensor, count: int = HELD_OUT_BATCHES) -> Iterator[Tensor]:
    """Spread `count` batches, (BATCH, CONTEXT + 1), evenly over `text`."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, count * BATCH).long()
    for row in starts.view(count, BATCH):
        yield windows(text, row)
