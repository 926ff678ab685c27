"""Training of a model from a `Config`."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from configs import SPECTRA, Config, Result, active, schedule, tokens
from models import Logits, Output, loads, model, weight_rms
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import muon_kernels
from muon_kernels import backends, spectra
from muon_kernels.cli import demo
from muon_kernels.optimizers.paper import PAPER
from muon_kernels.split import equal

BETAS = (0.9, 0.95)
CURVE = 24  # points of a curve
# Learning rate of all that is no matrix, in the second paper's comparison. Its 3e-4 is for a thousand times more steps.
VECTOR_LR = 3e-3
# Of prose every third document is held out: the tenth of `demo.parted` would be 11 kB.
HELD_OUT_PROSE = 3


@cache
def text(name: str) -> tuple[Tensor, Tensor]:
    """Return the bytes to train on and those held out, uint8; of a file the last tenth is."""
    if name == "prose":
        documents = demo.prose()
        held_out = b"".join(documents[HELD_OUT_PROSE - 1 :: HELD_OUT_PROSE])
        rest = b"".join(x for n, x in enumerate(documents) if n % HELD_OUT_PROSE != HELD_OUT_PROSE - 1)
        return tuple(torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (rest, held_out))  # type: ignore[return-value]
    if name in ("code", "both"):
        train, held = demo.parted(demo.source_code() + (demo.prose() if name == "both" else []))
        return train.to(torch.uint8), held.to(torch.uint8)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f'text should be "prose", "code", "both" or the path of a file but is: {name!r}')
    size = path.stat().st_size
    whole = torch.from_file(name, shared=False, size=size, dtype=torch.uint8)  # maps it: it may exceed the memory
    return whole[: size - size // 10], whole[size - size // 10 :]


@cache
def digest(name: str) -> str:
    """Return sixteen hexadecimal digits that tell a text, and what is held out of it, from all others."""
    hashed = hashlib.sha256()
    for part in text(name):
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part.numpy())
    return hashed.hexdigest()[:16]


def windows(of: Tensor, starts: Tensor, context: int) -> Tensor:
    """Return the context + 1 bytes from each start on, as integers."""
    return of[starts[:, None] + torch.arange(context + 1)].long()


@torch.no_grad()
def held_out_loss(of: nn.Module, name: str, config: Config, device: str) -> float:
    """Measure the held-out loss in nats per byte, over windows that are spread evenly, config.held_out bytes or more.

    Raises:
        ValueError: the held-out text is shorter than a window.
    """
    held_out, size = text(name)[1], config.context * config.batch
    if len(held_out) <= config.context:
        raise ValueError(f"held-out text should have more than {config.context} bytes but has: {len(held_out)}")
    count = -(-config.held_out // size)
    starts = torch.linspace(0, len(held_out) - config.context - 1, count * config.batch).long()
    rows = starts.view(count, config.batch)
    return torch.stack([of(windows(held_out, row, config.context).to(device)) for row in rows]).double().mean().item()


# Option adjust_lr_fn, whether the norm is made exact, and what lr is multiplied by, from the width.
RMS_RULES: dict[str, tuple[str, bool, Any]] = {
    "adjusted": ("match_rms_adamw", False, lambda width: 1.0),  # by a matrix's shape: "Adjusted LR" of [1]
    "exact": ("match_rms_adamw", True, lambda width: 1.0),  # every update has the RMS: "Update Norm" of [1]
    "width": ("none", False, lambda width: 0.2 * math.sqrt(width)),  # one factor for all: "Baseline" of [1]
}


def _muon(config: Config, of: nn.Module) -> list[Optimizer]:
    if config.rms not in RMS_RULES:
        raise ValueError(f"rms should be one of {', '.join(RMS_RULES)} but is: {config.rms!r}")
    rule, exact, factor = RMS_RULES[config.rms]
    scale = config.target_rms / 0.2 * factor(config.width)
    groups = muon_kernels.param_groups(of, split={"*.qkv.weight": equal(3)})
    rest = config.lr if config.rest_lr is None else config.rest_lr
    return [
        muon_kernels.MuonAdamW(
            groups,
            muon_options={
                "lr": config.lr * scale,
                "weight_decay": config.weight_decay / scale,  # their product decays, whatever the target is
                "adjust_lr_fn": rule,
                "exact_rms": exact,
            },
            adamw_options={"lr": rest, "weight_decay": config.weight_decay, "betas": BETAS},
        )
    ]


def optimizers(config: Config, of: nn.Module) -> list[Optimizer]:
    """Make the optimizers that train the model."""
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "muon":
        return _muon(config, of)
    if config.optimizer == "adamw":
        # The rest has a rate of its own where Muon's has: the same parameters.
        matrices, rest = muon_kernels.param_groups(of)
        rest_lr = lr if config.rest_lr is None else config.rest_lr
        groups = [{"params": matrices["params"], "lr": lr}, {"params": rest["params"], "lr": rest_lr}]
        return [AdamW(groups, betas=BETAS, weight_decay=decay, fused=True)]
    if config.optimizer not in PAPER:
        raise ValueError(f"optimizer should be adamw, muon or one of {', '.join(PAPER)} but is: {config.optimizer!r}")
    # As in the paper, embeddings and the head are matrices too, and a fused projection is three.
    named = dict(of.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if p.ndim >= 2 and "qkv" not in name]},
        {"params": [p for name, p in named.items() if "qkv" in name], "split": equal(3)},
    ]
    vectors = [p for p in named.values() if p.ndim < 2]
    return [
        muon_kernels.paper_optimizer(config.optimizer, groups, lr, weight_decay=decay),
        AdamW(vectors, lr=VECTOR_LR, betas=BETAS, weight_decay=decay, fused=True),
    ]


def machine(device: str) -> str:
    """Describe the machine that seconds are of, and the Python whose library is the text."""
    if device == "cuda":
        kind = torch.cuda.get_device_name()
    else:
        of = f"{platform.machine()} with {os.cpu_count()} cores ({backends.get('cpu').describe()})"
        kind = f"{of}, {torch.get_num_threads()} used"
    return f"{kind}; torch {torch.__version__}, Python {platform.python_version()}"


class Training:
    """A training that is going on.

    Attributes:
        model: the model.
        optimizers: what steps it.
        curve: pairs of a step and the mean training loss since the last pair, CURVE of them at the end.
        sizes: threes of a step, the mean RMS of the layers' matrices and the RMS of what the last layer puts out.
        logits: with a tau, pairs of a step and the largest attention logit since the last pair.
    """

    def __init__(self, config: Config, device: str = "cpu") -> None:
        self.config, self.device = config, device
        self.model = model(config)
        if config.start:
            self.model.load_state_dict(trained(config.start, device)[0].state_dict())
        self.model.to(device)
        self.optimizers = optimizers(config, self.model)
        self._schedulers = [LambdaLR(each, lambda step: schedule(config.steps, step)) for each in self.optimizers]
        self.recorder: spectra.Recorder | None = None
        if config.record_every:
            options: dict[str, Any] = {"every": config.record_every, "names": "layers.*", "tensors": config.record}
            self.recorder = spectra.Recorder(self.optimizers[0], self.model.named_parameters(), **options)
            self.recorder.record()
        self._output = Output(self.model)
        self._logits = None if config.tau is None else Logits(self.model)
        # A generator of its own, so that batches are the same however many numbers the model took.
        self._generator = torch.Generator().manual_seed(config.seed + 1)
        self.curve: list[tuple[int, float]] = []
        self.sizes: list[tuple[int, float, float]] = []
        self.logits: list[tuple[int, float]] = []

    def batch(self) -> Tensor:
        """Draw the next bytes to train on."""
        of, context = text(self.config.text)[0], self.config.context
        starts = torch.randint(len(of) - context, (self.config.batch,), generator=self._generator)
        return windows(of, starts, context).to(self.device)

    def steps(self) -> Iterator[int]:
        """Train, and yield the number of every step that is done. It ends at a loss that is not finite."""
        points = {round((n + 1) * self.config.steps / CURVE) for n in range(CURVE)}
        since: list[float] = []
        largest: list[float] = []
        for step in range(1, self.config.steps + 1):
            if step in points:
                self._output.listen()
            loss = self.model(self.batch())
            since.append(loss.item())
            if not math.isfinite(since[-1]):
                return
            if self._logits is not None:
                largest.append(self._logits.largest())
            loss.backward()
            self._update()
            if step in points:
                self.curve.append((step, sum(since) / len(since)))
                self.sizes.append((step, weight_rms(self.model), self._output.rms))
                self.logits += [(step, max(largest))] if largest else []
                since, largest = [], []
            yield step

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, scheduler in zip(self.optimizers, self._schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if self._logits is not None and self.config.tau:
            self._logits.clip(self.config.tau)


def train(config: Config, device: str = "cpu") -> Result:
    """Train a model.

    Returns:
        A dictionary that JSON can hold: config; active_parameters; bytes, seen, and passes over the text; curve, sizes
        and logits of `Training`, where what is not finite is None; loss, held out, by text where the training goes on
        from another, which is also of the text that was left; texts, the `digest` of each; seconds; machine; spectra,
        the SPECTRA of the rows of `spectra.Recorder`; loads, shares of the experts' choices for the held-out text, by
        layer.
    """
    return trained(config, device)[1]


@lru_cache(maxsize=32)  # since several trainings may start from one
def trained(config: Config, device: str) -> tuple[demo.GPT, Result]:
    """Do what `train` does; return the model, too."""
    began = time.perf_counter()
    going = Training(config, device)
    for _ in going.steps():
        pass
    of = going.model
    losses: dict[str, float | None] = {}

    def evaluate() -> None:
        for name in dict.fromkeys([config.text, *([config.start.text] if config.start else [])]):
            losses[name] = _finite(held_out_loss(of, name, config, device))

    shares = loads(of, evaluate)
    result = {
        "config": asdict(config),
        "active_parameters": active(config.width, config.layers, config.experts),
        "curve": [_rounded(point) for point in going.curve],
        "sizes": [_rounded(point) for point in going.sizes],
        "logits": [_rounded(point) for point in going.logits],
        "loss": losses[config.text],
        "losses": losses,
        "loads": [_rounded(layer) for layer in shares],
        "texts": {name: digest(name) for name in losses},
        "seconds": time.perf_counter() - began,
        "machine": machine(device),
        "spectra": [_row(row) for row in going.recorder.rows] if going.recorder else [],
    }
    result["passes"] = tokens(asdict(config)) / len(text(config.text)[0])
    return of, result


def _row(row: Any) -> dict[str, Any]:
    return {key: _rounded([row[key]])[0] for key in SPECTRA}


def _rounded(numbers: Any) -> list[Any]:
    """Return numbers to six digits, which is what a curve shows; JSON has neither infinity nor NaN."""
    return [_finite(float(f"{x:.6g}")) if isinstance(x, float) else x for x in numbers]


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
