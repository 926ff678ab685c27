"""Shapes of real models' hidden matrices, with multiplicity: (rows, cols, count).

A workload is what one optimizer step sees. Large models are cut to the layers that a two-core machine steps in seconds;
the shapes and their proportions stay.
"""

from __future__ import annotations

from muon_kernels.cli.verify import workloads
from muon_kernels.cli.verify.workloads import RAGGED, Shapes, gpt2


def llama(layers: int) -> Shapes:
    """Return shapes of Llama-style layers of width 2048: 32 query heads, 8 of keys and values, gated MLP of 5632."""
    return [(2048, 2048, 2 * layers), (512, 2048, 2 * layers), (5632, 2048, 2 * layers), (2048, 5632, layers)]


WORKLOADS: dict[str, Shapes] = {
    "GPT-2 124M, 2 of 12 layers": gpt2(2),
    "Llama-style, 1 layer": llama(1),
    "MoE, 32 experts 1024x384": [(1024, 384, 32)],
    "per head, 144 of 64x768": [(64, 768, 144)],
    "LoRA, 64 of 16x1024": [(16, 1024, 64)],
    "many, 256 of 64x64": [(64, 64, 256)],
    "ragged": RAGGED,
}
# On a GPU whole models, as many matrices as they have: of two layers, half of its multiprocessors would have nothing.
BY_DEVICE = {"cpu": WORKLOADS, "cuda": workloads.WORKLOADS}
