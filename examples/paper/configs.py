"""Description of a training, and what follows from it without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]

BYTES = 256  # rows of the head

# Fields of the rows of spectra.
SPECTRA = ("step", "name", "index", "group", "tensor", "svd_entropy", "condition", "rms")


@dataclass(frozen=True)
class Config:
    """Description of a training: all that its result depends on, but for the machine and the text of its Python.

    Args:
        optimizer: "adamw", "muon" or a name of `muon_kernels.paper_optimizer`.
        lr: largest learning rate; it rises over the first twentieth of the steps and falls to 0 along a cosine.
        steps: number of steps, each on batch x context bytes.
        rest_lr: learning rate of embeddings, head and vectors, for "adamw" and "muon"; None takes `lr`.
        weight_decay: decoupled decay of all parameters, as the first paper has it.
        rms: how "muon" scales updates, by a name of `training.RMS_RULES`.
        target_rms: RMS of an update of lr 1 that the rule aims at.
        width: width of the model; heads are 32 wide, or the whole width where 32 does not divide it.
        layers: number of layers.
        experts: number of routed experts in each layer, of which each byte goes to two; 0 for a plain MLP.
        dtype: dtype of the parameters, "float32" or "bfloat16".
        context: bytes that the model reads at once.
        batch: contexts of a step.
        held_out: bytes of the held-out loss, at least.
        text: "prose", "code", "both" or the path of a file.
        seed: seed of the model and of the batches.
        start: training whose model is trained on here, with a fresh optimizer; None starts with a new model.
        record: tensors of the layers whose spectra are recorded, of "weight" and "update".
        record_every: record them every so many steps; 0 records none.
        tau: record the largest attention logits, and if tau is above 0, hold them at tau by QK-Clip; None does neither.
    """

    optimizer: str
    lr: float
    steps: int
    rest_lr: float | None = None
    weight_decay: float = 0.0
    rms: str = "adjusted"
    target_rms: float = 0.2
    width: int = 32
    layers: int = 2
    experts: int = 0
    dtype: str = "float32"
    context: int = 64
    batch: int = 16
    held_out: int = 102_400
    text: str = "both"
    seed: int = 0
    start: Config | None = None
    record: tuple[str, ...] = ("weight",)
    record_every: int = 0
    tau: float | None = None

    @property
    def cost(self) -> float:
        """The order in which trainings take time, in about the passes of 1024 bytes through a layer 32 wide."""
        started = 0.0 if self.start is None else self.start.cost
        size = self.layers * (1 + (self.width / 32) ** 2) * self.batch * self.context / 1024
        return self.steps * size + started

    def run(self, device: str) -> Result:
        """Train on a device; see `training.train`."""
        from training import train  # brings torch, which a report of kept results does not need

        return train(self, device)

    def __str__(self) -> str:
        """Name the training in a line."""
        return f"{self.optimizer:<7} lr {self.lr:<8.3g} width {self.width:<3} steps {self.steps} seed {self.seed}"


# Runs what is described, together where the machine can, and returns the results in order.
Run = Callable[[Sequence[Any]], list[Result]]


def schedule(steps: int, step: int) -> float:
    """Return the share of the learning rate that step 0, 1, ... of a training has."""
    warmup = max(1, steps // 20)
    falling = (step - warmup) / max(1, steps - warmup)
    return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0.0, falling)))


def heads(width: int) -> int:
    """Return the number of attention heads of a model."""
    return width // 32 if width % 32 == 0 else 1


def active(width: int, layers: int, experts: int = 0) -> int:
    """Count the parameters of the layers that a byte meets, with two routed experts: N of the scaling law."""
    # Attention and two norms; an MLP, or a shared expert of half of it, two routed ones of a quarter, and the router.
    return layers * (4 * width**2 + 4 * width + 8 * width**2 + experts * width)


def tokens(config: Result) -> int:
    """Count the bytes that a training sees, from the config of its result."""
    return int(config["steps"] * config["batch"] * config["context"])


def compute(config: Result) -> float:
    """Count the FLOP of a training, from the config of its result: 6 for each byte and parameter of layers and head.

    Muon's Newton-Schulz steps are in it. Products of queries and keys are not, as in scaling laws, and neither are
    other optimizers' powers.
    """
    parameters = active(config["width"], config["layers"], config["experts"]) + BYTES * config["width"]
    steps = config["steps"] * iterations(config) if config["optimizer"] == "muon" else 0.0
    return 6.0 * parameters * tokens(config) + steps


def iterations(config: Result) -> float:
    """Count the FLOP of the Newton-Schulz steps in a step of Muon, five for each matrix, as full products."""
    width, experts = config["width"], config["experts"]
    shapes = [(width, width)] * 4  # queries, keys and values are cut
    if experts:
        shapes += [(width, 2 * width)] * 2 + [(width, width)] * (2 * experts)
        shapes += [(min(width, experts), max(width, experts))]
    else:
        shapes += [(width, 4 * width)] * 2
    # Of an m x n matrix, m <= n, a step multiplies m n m, m m m and m m n.
    return float(config["layers"] * sum(5 * 2 * (2 * m * m * n + m**3) for m, n in shapes))


def loss(result: Result) -> float:
    """Return the held-out loss of a result, infinite if the training diverged."""
    return math.inf if result["loss"] is None else float(result["loss"])


def best(results: Sequence[Result]) -> Result:
    """Return the result with the smallest held-out loss."""
    return min(results, key=loss)
