"""Shapes of the hidden matrices of known models, by their published configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Shapes = Sequence[tuple[int, int, int]]  # (rows, columns, how many)


class Model(NamedTuple):
    """A model's matrices.

    Attributes:
        dense: of every token.
        experts: of a mixture; how many are a multiple of 64, so that 64 ranks can have them by whole ones.
        active: parameters that a token meets; None for all.
        source: of the shapes, and of `active`.
    """

    dense: Shapes
    experts: Shapes = ()
    active: float | None = None
    source: str = ""

    @property
    def shapes(self) -> Shapes:
        """List of all matrices."""
        return [*self.dense, *self.experts]


MODELS = {
    "gpt2": Model([(2304, 768, 12), (768, 768, 12), (3072, 768, 12), (768, 3072, 12)]),
    "heads": Model([(64, 768, 108)]),
    "llama-1b": Model([(2048, 2048, 32), (512, 2048, 32), (8192, 2048, 32), (2048, 8192, 16)]),
    "experts": Model([(1024, 384, 32)]),
    "llama-7b": Model([(4096, 4096, 128), (11008, 4096, 64), (4096, 11008, 32)]),
    "llama-70b": Model(
        [(8192, 8192, 160), (1024, 8192, 160), (28672, 8192, 160), (8192, 28672, 80)],
        source="config.json of meta-llama/Llama-2-70b: 80 layers, 8 heads of keys and values",
    ),
    "moonlight-16b": Model(
        [
            *[(3072, 2048, 27), (576, 2048, 27), (4096, 512, 27), (2048, 2048, 27)],  # q, kv down and up, o
            *[(11264, 2048, 2), (2048, 11264, 1)],  # the first layer's MLP
            (64, 2048, 26),  # routers of the others
            *[(2816, 2048, 26 * 2), (2048, 2816, 26)],  # and the two experts that all tokens share, as one
        ],
        experts=[(1408, 2048, 26 * 64 * 2), (2048, 1408, 26 * 64)],
        active=2.24e9,
        source="config.json of moonshotai/Moonlight-16B-A3B; 2.24 of 15.29 G without embeddings: arXiv 2502.16982",
    ),
    "deepseek-v3": Model(
        [
            *[(1536, 7168, 61), (24576, 1536, 61), (576, 7168, 61), (32768, 512, 61), (7168, 16384, 61)],
            *[(18432, 7168, 3 * 2), (7168, 18432, 3)],  # the first three layers' MLPs
            (256, 7168, 58),  # routers of the others
            *[(2048, 7168, 58 * 2), (7168, 2048, 58)],  # and the expert that all tokens share
        ],
        experts=[(2048, 7168, 58 * 256 * 2), (7168, 2048, 58 * 256)],
        active=37e9,
        source="inference/configs/config_671B.json of deepseek-ai/DeepSeek-V3; 37 of 671 G active: arXiv 2412.19437",
    ),
}
