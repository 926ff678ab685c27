"""Token files as nanoGPT writes them, one uint16 a token and nothing else, and batches of windows of them."""

from __future__ import annotations

import codecs
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .gpt import GPTConfig
from .ranks import ALONE, Ranks

# First bytes of files that are often taken for token files.
OTHER_FORMATS = {
    b"\x93NUMPY": "a numpy file; write numpy.load(path).astype('uint16').tofile(new)",
    b"\x88\xd8\x34\x01": "llm.c's and modded-nanogpt's format with a header; drop it: tail -c +1025 old > new",
    b"PK\x03\x04": "a zip archive, as numpy.savez and torch.save write; unpack it and write uint16 by tofile",
    b"\x1f\x8b\x08": "compressed by gzip; unpack it: gunzip",
}
CHUNK = 1 << 24


def _is_text(start: bytes) -> bool:
    """Whether the first bytes of a file are text. Small tokens have zero bytes, and many large ones are no UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # that may end within a character
    except UnicodeDecodeError:
        return False
    return 0 not in start


def open_tokens(path: Path, vocab_size: int, block_size: int) -> np.memmap:
    """Return the tokens of a file, which stay on disk, after reading all of it once.

    Args:
        path: of the file.
        vocab_size: of the model; every token has to be below it.
        block_size: of the model; the file has to hold one window of block_size + 1 tokens at least.

    Raises:
        FileNotFoundError, ValueError: no such file, or another format, or tokens that do not fit the model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} should be a token file but is not there; examples/prepare_tokens.py makes one")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4096)
    for magic, what in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise ValueError(f"{path} should hold uint16 tokens and nothing else but is {what}")
    if start and _is_text(start):
        raise ValueError(
            f"{path} should hold uint16 tokens and nothing else but is text; "
            f"make tokens of it: python examples/prepare_tokens.py {path} --out FOLDER"
        )
    if size % 2:
        raise ValueError(f"{path} should hold tokens of 2 bytes but has an odd number of bytes: {size}; is it cut off?")
    if size // 2 < block_size + 1:
        raise ValueError(
            f"{path} should hold at least block_size + 1 = {block_size + 1} tokens but holds {size // 2}; "
            "give more text or a smaller --block-size"
        )
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    if tokens[:CHUNK:2].any() and not tokens[1:CHUNK:2].any():
        kind, width = ("int32", 4) if tokens[2:CHUNK:4].any() else ("int64", 8)
        raise ValueError(
            f"{path} should hold tokens of 2 bytes but has zeros between them, as if they had {width}; "
            f"write numpy.fromfile(path, '{kind}').astype('uint16').tofile(new)"
        )
    for first in range(0, len(tokens), CHUNK):
        chunk = tokens[first : first + CHUNK]
        if (largest := int(chunk.max())) >= vocab_size:
            at = first + int(chunk.argmax())
            raise ValueError(
                f"tokens of {path} should be below the vocabulary's size, {vocab_size}, but token {at} is {largest}; "
                "give a larger --vocab-size, or tokens of the right tokenizer"
            )
    return tokens


class Batches:
    """Windows of block_size + 1 tokens in random order, every window once before any comes again.

    Neighbouring windows share one token: the last target of one is the first input of the next.

    Attributes:
        position: number of windows that have been drawn. With the seed this is all that a checkpoint needs.
        tokens: number of tokens.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, seed: int = 0) -> None:
        self.position, self.tokens = 0, len(tokens)
        self._tokens, self._length, self._seed = tokens, block_size + 1, seed
        self._windows = (len(tokens) - 1) // block_size
        self._epoch = -1

    def draw(self, count: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """Draw `count` windows for all ranks; return this rank's of them, (count / ranks, block_size + 1), int64."""
        drawn = range(self.position + rank, self.position + count, ranks)
        self.position += count
        return torch.stack([self._window(self._shuffled(n)) for n in drawn])

    def evenly(self, count: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """Return this rank's part of `count` windows that are spread evenly over the tokens; the same at every call."""
        starts = np.linspace(0, len(self._tokens) - self._length, count).astype(int)
        return torch.stack([self._window(start) for start in starts[rank::ranks]])

    def _shuffled(self, n: int) -> int:
        """Return where the nth window that is drawn starts."""
        epoch, index = divmod(n, self._windows)
        if epoch != self._epoch:
            # An order of its own for every epoch, which needs no other epoch's: so one can begin anywhere.
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order, self._epoch = torch.randperm(self._windows, generator=generator), epoch
        return int(self._order[index]) * (self._length - 1)

    def _window(self, start: int) -> Tensor:
        return torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))


def read_folder(
    folder: Path, config: GPTConfig, held_out: int, seed: int, here: Ranks = ALONE
) -> tuple[Batches, Tensor]:
    """Return the batches of train.bin, and this rank's part of `held_out` windows of val.bin.

    Raises:
        FileNotFoundError, ValueError: as `open_tokens`.
    """
    train, val = (
        open_tokens(folder / f"{name}.bin", config.vocab_size, config.block_size) for name in ("train", "val")
    )
    evenly = Batches(val, config.block_size).evenly(held_out, here.rank, here.count)
    return Batches(train, config.block_size, seed), evenly
