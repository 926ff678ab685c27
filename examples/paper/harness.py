"""Training of a small byte-level GPT from a `Config`, and a file of the trainings that are done.

The model and the text are those of `python -m muon_kernels demo`, with a mixture of experts besides. A config is all
that a training depends on, but for the machine and the Python whose library is the text: equal configs have equal
results.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import muon_kernels
from muon_kernels import backends, spectra
from muon_kernels.cli import demo
from muon_kernels.optimizers.paper import PAPER
from muon_kernels.split import equal

CONTEXT = 64
BATCH = 16
TOKENS = CONTEXT * BATCH  # of a step
BETAS = (0.9, 0.95)
CURVE = 24  # points of a loss curve
HELD_OUT = 32  # batches of the final loss
SPECTRA = ("step", "name", "index", "group", "tensor", "svd_entropy")
# Learning rate of all that is no matrix, in the second paper's comparison. Its 3e-4 is for a thousand times more steps.
VECTOR_LR = 3e-3


@dataclass(frozen=True)
class Config:
    """Description of a training.

    Args:
        optimizer: "adamw", "muon" or a name of `muon_kernels.paper_optimizer`.
        lr: largest learning rate; it rises over the first twentieth of the steps and falls to 0 along a cosine.
        steps: number of steps, each on BATCH x CONTEXT bytes.
        weight_decay: decoupled decay of all parameters, as the first paper has it.
        width: width of the model; heads are 32 wide.
        layers: number of layers.
        experts: number of routed experts in each layer, of which each byte goes to two; 0 for a plain MLP.
        text: "prose", "code", or "both".
        seed: seed of the model and of the batches.
        start: training whose model is trained on here, with a fresh optimizer; None starts with a new model.
        record_every: record spectra of the layers' weights every so many steps; 0 records none.
        tau: record the largest attention logits, and if tau is above 0, hold them at tau by QK-Clip; None does neither.
    """

    optimizer: str
    lr: float
    steps: int
    weight_decay: float = 0.0
    width: int = 64
    layers: int = 2
    experts: int = 0
    text: str = "both"
    seed: int = 0
    start: Config | None = None
    record_every: int = 0
    tau: float | None = None


Result = dict[str, Any]
Run = Callable[[Config], Result]


class Mixture(nn.Module):
    """Mixture of experts: a shared one, and for each byte the two routed ones that the router scores highest.

    For a byte it computes as much as the demo's MLP of the same width, not counting the router and unused results:
    every routed expert sees every byte, which is faster at this size.
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.shared_up = nn.Linear(width, 2 * width, bias=False)
        self.shared_down = nn.Linear(2 * width, width, bias=False)
        self.up = nn.Parameter(torch.empty(experts, width, width).uniform_(-1, 1) / width**0.5)  # (expert, out, in)
        self.down = nn.Parameter(torch.empty(experts, width, width).uniform_(-1, 1) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        bytes_ = x.flatten(0, -2)
        chosen = self.router(bytes_).topk(2)
        gates = torch.zeros(len(bytes_), len(self.up)).scatter(1, chosen.indices, chosen.values.softmax(-1))
        routed = F.gelu(bytes_ @ self.up.mT) @ self.down.mT  # (expert, byte, width)
        shared = self.shared_down(F.gelu(self.shared_up(bytes_)))
        return (shared + torch.einsum("be,ebw->bw", gates, routed)).view_as(x)


def model(config: Config) -> demo.GPT:
    """Make a new model."""
    torch.manual_seed(config.seed)
    mlp = (lambda width: Mixture(width, config.experts)) if config.experts else demo.MLP
    return demo.GPT(config.width, config.layers, max(1, config.width // 32), CONTEXT, mlp)


def active(of: nn.Module) -> int:
    """Count the parameters of the layers that a byte meets, with two routed experts: N of the scaling law."""
    layers = of.get_submodule("layers")
    idle = sum(p.numel() // len(p) * (len(p) - 2) for p in layers.parameters() if p.ndim == 3)
    return sum(p.numel() for p in layers.parameters()) - idle


@cache
def text(name: str) -> tuple[Tensor, Tensor]:
    """Return the bytes to train on and those held out."""
    documents = {"prose": demo.prose, "code": demo.source_code, "both": lambda: demo.prose() + demo.source_code()}
    return demo.parted(documents[name]())


def windows(of: Tensor, starts: Tensor) -> Tensor:
    """Return the CONTEXT + 1 bytes from each start on."""
    return of[starts[:, None] + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def held_out_loss(of: nn.Module, name: str) -> float:
    """Measure the held-out loss in nats per byte, over windows that are spread evenly."""
    held_out = text(name)[1]
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, HELD_OUT * BATCH).long().view(HELD_OUT, BATCH)
    return torch.stack([of(windows(held_out, row)) for row in starts]).mean().item()


def optimizers(config: Config, of: nn.Module) -> list[Optimizer]:
    """Make the optimizers that train the model."""
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adamw":
        return [AdamW(of.parameters(), lr=lr, betas=BETAS, weight_decay=decay, fused=True)]
    if config.optimizer == "muon":
        groups = muon_kernels.param_groups(of, split={"*.qkv.weight": equal(3)})
        ours = {"lr": lr, "weight_decay": decay}
        return [
            muon_kernels.MuonAdamW(
                groups,
                muon_options={**ours, "adjust_lr_fn": "match_rms_adamw"},
                adamw_options={**ours, "betas": BETAS},
            )
        ]
    if config.optimizer not in PAPER:
        raise ValueError(f"optimizer should be adamw, muon or one of {', '.join(PAPER)} but is: {config.optimizer!r}")
    # As in the paper, embeddings and the head are matrices too, and a fused projection is three.
    named = dict(of.named_parameters())
    matrices: list[dict[str, Any]] = [
        {"params": [p for name, p in named.items() if p.ndim >= 2 and "qkv" not in name]},
        {"params": [p for name, p in named.items() if "qkv" in name], "split": equal(3)},
    ]
    vectors = [p for p in named.values() if p.ndim < 2]
    return [
        muon_kernels.paper_optimizer(config.optimizer, matrices, lr, weight_decay=decay),
        AdamW(vectors, lr=VECTOR_LR, betas=BETAS, weight_decay=decay, fused=True),
    ]


class Logits:
    """Recorder of the largest attention logit of each head in the last forward pass, and QK-Clip by them."""

    def __init__(self, of: demo.GPT) -> None:
        self._seen: dict[demo.Block, Tensor] = {}
        for block in of.layers:
            assert isinstance(block, demo.Block)
            block.qkv.register_forward_hook(partial(self._look, block))

    def _look(self, block: demo.Block, _: nn.Module, __: object, qkv: Tensor) -> None:
        q, k, _v = qkv.unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        self._seen[block] = muon_kernels.max_logits(q, k, causal=True)

    def largest(self) -> float:
        """Return the largest logit of all heads and layers."""
        return max(logits.max().item() for logits in self._seen.values())

    def clip(self, tau: float) -> None:
        """Clip the weights of queries and keys. Call it after the step that the forward pass was for."""
        for block, logits in self._seen.items():
            weight, width = block.qkv.weight, block.qkv.in_features
            muon_kernels.qk_clip_(weight[:width], weight[width : 2 * width], logits, tau)


def machine() -> str:
    """Describe the machine that seconds are of, and the Python whose library is the text."""
    python, threads = platform.python_version(), torch.get_num_threads()
    kind = f"{platform.machine()} with {os.cpu_count()} cores ({backends.get('cpu').describe()}), {threads} used"
    return f"{kind}; torch {torch.__version__}, Python {python}"


def train(config: Config) -> Result:
    """Train a model.

    Returns:
        A dictionary that JSON can hold: config; active_parameters; curve, pairs of a step and the mean training loss
        since the last pair; loss, held out, None if it is not finite; weight_rms, mean over the layers' matrices, None
        likewise; seconds; machine; spectra, the SPECTRA of the rows of `spectra.Recorder`; logits, with a tau pairs of
        a step and the largest attention logit since the last pair.
    """
    return _trained(config)[1]


@cache  # since several trainings may start from one
def _trained(config: Config) -> tuple[demo.GPT, Result]:
    began = time.perf_counter()
    of = model(config)
    if config.start:
        of.load_state_dict(_trained(config.start)[0].state_dict())
    used = optimizers(config, of)
    warmup = max(1, config.steps // 20)

    def schedule(step: int) -> float:
        falling = (step - warmup) / max(1, config.steps - warmup)
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0.0, falling)))

    schedules = [LambdaLR(optimizer, schedule) for optimizer in used]
    recorder = None
    if config.record_every:
        options: dict[str, Any] = {"every": config.record_every, "names": "layers.*", "tensors": "weight"}
        recorder = spectra.Recorder(used[0], of.named_parameters(), **options)
        recorder.record()

    logits = None if config.tau is None else Logits(of)
    train_text = text(config.text)[0]
    # A generator of its own, so that batches are the same however many numbers the model took.
    generator = torch.Generator().manual_seed(config.seed + 1)
    points = {round((n + 1) * config.steps / CURVE) for n in range(CURVE)}
    curve: list[tuple[int, float]] = []
    since: list[float] = []
    largest: list[tuple[int, float]] = []
    since_then: list[float] = []
    for step in range(1, config.steps + 1):
        starts = torch.randint(len(train_text) - CONTEXT, (BATCH,), generator=generator)
        loss = of(windows(train_text, starts))
        since.append(loss.item())
        if not math.isfinite(since[-1]):
            break
        if logits is not None:
            since_then.append(logits.largest())
        loss.backward()
        nn.utils.clip_grad_norm_(of.parameters(), 1.0)
        for optimizer, scheduler in zip(used, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if logits is not None and config.tau:
            logits.clip(config.tau)
        if step in points:
            curve.append((step, sum(since) / len(since)))
            since = []
            largest += [(step, max(since_then))] if since_then else []
            since_then = []
    final = held_out_loss(of, config.text)
    matrices = [p for p in of.layers.parameters() if p.ndim >= 2]
    weight_rms = sum(spectra.rms(p).mean().item() for p in matrices) / len(matrices)
    return of, {
        "config": asdict(config),
        "active_parameters": active(of),
        "curve": curve,
        "loss": _finite(final),
        "weight_rms": _finite(weight_rms),
        "seconds": time.perf_counter() - began,
        "machine": machine(),
        "spectra": [{key: row[key] for key in SPECTRA} for row in recorder.rows] if recorder else [],
        "logits": largest,
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON has neither infinity nor NaN


class Results:
    """Results in a file of JSON lines, a training a line. One that is missing is trained and appended.

    Args:
        path: path of the file, which need not exist yet.
        learn: train what is missing; else raise LookupError.
        say: called with a line of text for each training that is done.
    """

    def __init__(self, path: Path, learn: bool = True, say: Callable[[str], object] = print) -> None:
        self.path = path
        self.learn = learn
        self.say = say
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # An interruption in the midst of a line leaves half of it.
        if lines and not lines[-1].endswith("\n"):
            path.write_text("".join(lines[:-1]))
            del lines[-1]
        self._done = {self._key(result["config"]): result for result in map(json.loads, lines)}

    @staticmethod
    def _key(config: Result) -> str:
        return json.dumps(config, sort_keys=True)

    def __call__(self, config: Config) -> Result:
        """Return the result of a config."""
        key = self._key(asdict(config))
        if key not in self._done:
            if not self.learn:
                raise LookupError(f"{self.path} should have every training but lacks: {config}; run.py makes it")
            result = json.loads(json.dumps(train(config)))
            with self.path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            self._done[key] = result
            self.say(
                f"{config.optimizer:<7} lr {config.lr:<8.3g} width {config.width} steps {config.steps}: "
                f"loss {result['loss'] or math.inf:.4f}, {result['seconds']:.1f} s"
            )
        return self._done[key]


def loss(result: Result) -> float:
    """Return the held-out loss of a result, infinite if the training diverged."""
    return math.inf if result["loss"] is None else float(result["loss"])


def best(results: Sequence[Result]) -> Result:
    """Return the result with the smallest held-out loss."""
    return min(results, key=loss)
