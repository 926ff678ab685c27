"""Train a small byte-level GPT with three optimizers side by side and compare them.

The text is what every Python brings along: the language reference that pydoc shows and the sources
of the standard library, every tenth document held out. The same initial model, batches and
schedule go to

  muon_kernels      muon_kernels.MuonAdamW
  torch.optim.Muon  torch.optim.Muon for the hidden matrices, torch.optim.AdamW for the rest
  AdamW             torch.optim.AdamW for everything

which take turns at every step, so whatever slows the machine slows them alike. The first two do the
same arithmetic up to rounding: their loss curves should lie on one another.

All of it takes four minutes at most, on one core eight (--minutes). The first steps show what fits: an
optimizer that is several times slower than the others, as torch.optim.Muon is where the processor has no
16-bit products, is stopped after them, and if need be all take fewer steps. --steps takes as many as it
says. Ctrl-C ends the training and shows what there is.

With --fsdp, started by torchrun on several ranks, the model is sharded by torch's fully_shard and each
rank reads its part of every batch; torch.optim.Muon, which takes no DTensors, is left out.
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, isnan
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..optimizers.muon_adamw import MuonAdamW
from ..optimizers.param_groups import param_groups

if TYPE_CHECKING:
    from rich.table import Table

BYTES = 256
CONTEXT = 128
BATCH = 8
WIDTH = 256
LAYERS = 4
HEADS = 4

STEPS = 160
# Before these are done, or half of the time is gone, nobody is judged.
TRIAL_STEPS = 3
# One that takes this many times as long for a step as the fastest is stopped before the others take fewer steps.
TOO_SLOW = 3.0
HELD_OUT_BATCHES = 32
# What they take in training steps: a forward pass is a third of a step at most.
HELD_OUT_STEPS = HELD_OUT_BATCHES / 3
# Of the time that a demonstration may take, what starting Python and drawing the picture takes.
OVERHEAD = 0.05

# `match_rms_adamw` scales Muon's update to the size of AdamW's, so one learning rate serves all
# parameters of a run. The best of a grid of powers of two, by held-out loss after 250 steps, seed 0:
# Muon 1.961 1.957 2.025 at 8, 16, 32e-3; AdamW 2.475 2.449 2.471 2.522 at 1, 2, 4, 8e-3.
ADAMW_OPTIONS = {"lr": 2e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "fused": True}
MUON_OPTIONS = {"lr": 16e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
BESIDE_MUON_OPTIONS = {**ADAMW_OPTIONS, "lr": MUON_OPTIONS["lr"]}


class MLP(nn.Module):
    """What follows attention in a layer: GELU between two matrices."""

    def __init__(self, width: int) -> None:
        """Initialise as torch does by default."""
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result


class Block(nn.Module):
    """A pre-norm transformer layer: causal attention with fused QKV, then an MLP."""

    def __init__(self, width: int, heads: int, mlp: Callable[[int], nn.Module] = MLP) -> None:
        """Initialise as torch does by default."""
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (3, batch, heads, length, width / heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        mlp: Tensor = self.mlp(self.mlp_norm(x))
        return x + mlp


class GPT(nn.Module):
    """A byte-level language model.

    Args:
        width: of the residual stream.
        layers: how many.
        heads: of each; they divide `width`.
        context: the most bytes that it reads at once.
        mlp: makes what follows attention in a layer, from `width`.
    """

    def __init__(
        self, width: int, layers: int, heads: int, context: int, mlp: Callable[[int], nn.Module] = MLP
    ) -> None:
        """Initialise as torch does by default."""
        super().__init__()
        self.byte_embedding = nn.Embedding(BYTES, width)
        self.position_embedding = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Block(width, heads, mlp) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats, of every byte of `text` but the first.

        Args:
            text: bytes as integers, (batch, at most context + 1).
        """
        context, target = text[:, :-1], text[:, 1:]
        x = self.byte_embedding(context) + self.position_embedding.weight[: context.shape[1]]
        logits = self.head(self.norm(self.layers(x)))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def _muon_kernels(model: nn.Module) -> list[Optimizer]:
    groups = param_groups(model)
    return [MuonAdamW(groups, muon_options=MUON_OPTIONS, adamw_options=BESIDE_MUON_OPTIONS)]


def _torch_muon(model: nn.Module) -> list[Optimizer]:
    matrices, rest = param_groups(model, muon_options=MUON_OPTIONS, adamw_options=BESIDE_MUON_OPTIONS)
    return [torch.optim.Muon([matrices]), AdamW([rest])]


def _adamw(model: nn.Module) -> list[Optimizer]:
    return [AdamW([{"params": list(model.parameters()), **ADAMW_OPTIONS}])]


OPTIMIZERS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "muon_kernels": _muon_kernels,
    "torch.optim.Muon": _torch_muon,
    "AdamW": _adamw,
}
if not hasattr(torch.optim, "Muon"):  # new in torch 2.9
    del OPTIMIZERS["torch.optim.Muon"]

# Wide under narrow, so that curves on one another still show.
STYLES: dict[str, dict[str, Any]] = {
    "torch.optim.Muon": {"color": "#f2a541", "linewidth": 5.0},
    "muon_kernels": {"color": "#1f4e8c", "linewidth": 1.6},
    "AdamW": {"color": "#6b6b6b", "linewidth": 1.6, "linestyle": "--"},
}


class Run:
    """One model in training: its losses and how long the parts of every step took.

    `steps`, over which the rate decays to 0, may be lowered on the way; `stopped` says that this one was too slow to
    go on.
    """

    def __init__(self, name: str, model: GPT, steps: int, fsdp: bool = False) -> None:
        """Train a copy of `model` with `OPTIMIZERS[name]`."""

        def schedule(step: int) -> float:
            warmup = max(1, self.steps // 20)
            return min((step + 1) / warmup, (self.steps - step) / (self.steps - warmup + 1))

        self.name = name
        self.steps = steps
        self.stopped = False
        self.model = copy.deepcopy(model)
        if fsdp:
            _shard(self.model)
        self.optimizers = OPTIMIZERS[name](self.model)
        self.schedulers = [LambdaLR(optimizer, schedule) for optimizer in self.optimizers]
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.held_out_loss = float("nan")

    def step(self, text: Tensor) -> None:
        """Do one training step on `text`, (BATCH, CONTEXT + 1), and note loss and times."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        start = perf_counter()
        loss = self.model(text[rank::ranks])
        loss.backward()
        gradients = perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = perf_counter()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.zero_grad()
            scheduler.step()
        if ranks > 1:
            dist.all_reduce(loss.detach_().div_(ranks))
        self.losses.append(loss.item())
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - gradients)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor]) -> None:
        """Set `held_out_loss` to the mean loss over `batches`."""
        losses = torch.stack([self.model(text) for text in batches])
        self.held_out_loss = losses.mean().item()

    def cost(self) -> float:
        """Return the seconds that a step takes of late; the first one, which sets things up, counts if it is alone."""
        return median(self.step_seconds[1:][-9:] or self.step_seconds)

    def smoothed(self, steps: int | None = None) -> Tensor:
        """Return the running mean of the first losses over a window of steps, from the first full one."""
        losses = self.losses[:steps]
        window = max(1, len(losses) // 15)
        return torch.tensor(losses).unfold(0, window, 1).mean(-1)


class Clock:
    """The time that a demonstration has; once Ctrl-C is pressed it has none."""

    def __init__(self, seconds: float) -> None:
        """Have `seconds` from now."""
        self.seconds = seconds
        self._end = perf_counter() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - perf_counter()

    @contextmanager
    def stopped_by_ctrl_c(self) -> Iterator[None]:
        """Inside, Ctrl-C leaves no time instead of raising; another one raises.

        Within a second it is the same one: torchrun hands it on to ranks that the terminal has told already.
        """
        first = inf

        def stop(*_: object) -> None:
            nonlocal first
            now = perf_counter()
            if now > first + 1:
                raise KeyboardInterrupt
            self._end, first = -inf, min(first, now)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def fitting(costs: Sequence[float], steps: int, seconds: float) -> tuple[list[int], int]:
    """Choose who trains on, and for how long.

    Args:
        costs: the seconds that a step of each takes.
        steps: how many more are wanted of each.
        seconds: that are left for all of them and their evaluation.

    Returns:
        The indices of those that go on, and how many steps each of them has time for.
    """
    going = sorted(range(len(costs)), key=costs.__getitem__)
    while sum(costs[i] for i in going) * (steps + HELD_OUT_STEPS) > seconds and (
        costs[going[-1]] >= TOO_SLOW * costs[going[0]]
    ):
        going.pop()
    fit = seconds / sum(costs[i] for i in going) - HELD_OUT_STEPS
    return sorted(going), steps if fit >= steps else max(0, int(fit))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be chosen about the demonstration."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=_minutes,
        help=f"time for {STEPS} training steps of each, or as many as it allows (default: 4, on one core 8)",
    )
    length.add_argument("--steps", type=_positive, help="training steps of each, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="of model and batches (default: 0)")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=OPTIMIZERS,
        metavar="NAME",
        help="which of them to run (default: all)",
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help=f"shard the model over the ranks that torchrun starts, 2, 4 or {BATCH}: "
        "torchrun --nproc-per-node 2 -m muon_kernels demo --fsdp",
    )
    parser.add_argument("--threads", type=_positive, help="of torch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture (default: this one)")


def run(args: argparse.Namespace) -> int:
    """Train, print the table, write `muon_demo.png`; return the exit status."""
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        print(
            f"The demo needs {error.name}. Install it with: pip install 'muon-kernels[demo]'",
            file=sys.stderr,
        )
        return 1
    if not args.fsdp:
        return _run(args, args.optimizers or list(OPTIMIZERS))
    if "WORLD_SIZE" not in os.environ:
        print(
            "--fsdp needs ranks, which torchrun starts: torchrun --nproc-per-node 2 -m muon_kernels demo --fsdp",
            file=sys.stderr,
        )
        return 1
    names = args.optimizers or [name for name in OPTIMIZERS if name != "torch.optim.Muon"]
    if "torch.optim.Muon" in names:
        print("torch.optim.Muon takes no DTensors; leave it out with --fsdp", file=sys.stderr)
        return 1
    if BATCH % int(os.environ["WORLD_SIZE"]):
        print(f"--fsdp needs ranks that divide the batch of {BATCH}", file=sys.stderr)
        return 1
    dist.init_process_group("gloo")
    try:
        return _run(args, names)
    finally:
        dist.destroy_process_group()


def _shard(model: GPT) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _run(args: argparse.Namespace, names: Sequence[str]) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    minutes = inf if args.steps else args.minutes or (4.0 if torch.get_num_threads() * ranks > 1 else 8.0)
    clock = Clock(60 * minutes * (1 - OVERHEAD))
    first = not dist.is_initialized() or dist.get_rank() == 0
    torch.manual_seed(args.seed)
    train, held_out = parted(prose() + source_code())
    model = GPT(WIDTH, LAYERS, HEADS, CONTEXT)
    steps = args.steps or STEPS
    runs = [Run(name, model, steps, args.fsdp) for name in dict.fromkeys(names)]
    # What the first pass of a process sets up is nobody's step time.
    model(next(_batches(train, 1))).backward()
    console = Console(quiet=not first)
    shared = f", {ranks} ranks" if args.fsdp else ""
    limit = f", in {minutes:g} minutes at most" if minutes < inf else ""
    console.print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, "
        f"{len(train) / 1e6:.1f} MB of text, {torch.get_num_threads()} threads{shared}, "
        f"{steps} steps of {BATCH} x {CONTEXT} bytes{limit}"
    )

    status = 0
    columns = ("{task.description:<16}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}")
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress, clock.stopped_by_ctrl_c():
            tasks = {run.name: progress.add_task(run.name, total=steps, note="") for run in runs}

            def show(run: Run) -> None:
                note = "stopped, too slow" if run.stopped else f"loss {run.losses[-1]:.3f}"
                progress.update(tasks[run.name], completed=len(run.losses), total=run.steps, note=note)

            _train(runs, _batches(train, steps), clock, show)
            if clock.left() == -inf:
                status = 130
    except KeyboardInterrupt:
        if args.fsdp:  # the ranks are at different places and cannot measure anything together
            raise
        status = 130
    going = [run for run in runs if not run.stopped]
    done = min(len(run.optimizer_seconds) for run in going)
    if not done:
        return status
    for each in going:
        for series in (each.losses, each.step_seconds, each.optimizer_seconds):
            del series[done:]
    try:
        with console.status("measuring the held-out loss (Ctrl-C skips it)"):
            batches = list(_even_batches(held_out))
            for each in going:
                each.evaluate(batches)
    except KeyboardInterrupt:
        status = 130

    console.print(_table(runs))
    for each in runs:
        if each.stopped:
            console.print(f"{each.name} was too slow: stopped after {len(each.losses)} steps of {each.cost():.1f} s")
    if done < steps:
        why = "stopped by Ctrl-C" if clock.left() == -inf else f"all that {minutes:g} minutes allow"
        console.print(f"{done} of {steps} steps, {why}")
    if comparison := _comparison(runs):
        console.print(comparison, highlight=False)
    if not first:
        return status
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "muon_demo.png"
    _plot(runs, path)
    console.print(f"loss curves: {path}", soft_wrap=True)
    return status


def _train(runs: Sequence[Run], batches: Iterable[Tensor], clock: Clock, show: Callable[[Run], None]) -> None:
    """Step all runs in turns, once with each batch, for as long as the clock allows."""
    for turn, text in enumerate(batches):
        going = [run for run in runs if not run.stopped]
        for index in range(len(going)):
            run = going[(turn + index) % len(going)]
            run.step(text)
            show(run)
        done = turn + 1
        left, seconds, *costs = _of_first_rank([clock.left(), clock.seconds, *(run.cost() for run in going)])
        if left == -inf:
            return
        if done < TRIAL_STEPS and left > seconds / 2:
            continue
        chosen, more = fitting(costs, going[0].steps - done, left)
        for index, run in enumerate(going):
            run.stopped = index not in chosen
            run.steps = done if run.stopped else done + more
            show(run)
        if not more:
            return


def _of_first_rank(numbers: Sequence[float]) -> list[float]:
    """Return `numbers` of the first rank, so that all ranks decide alike."""
    shared = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(shared, 0)
    return list(shared.tolist())


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"should be > 0 and finite but is: {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be >= 1 but is: {value}")
    return value


def prose() -> list[bytes]:
    """The language reference by topic, in fixed order."""
    from pydoc_data.topics import topics

    return [text.encode() for _, text in sorted(topics.items())]


def source_code() -> list[bytes]:
    """The standard library by file, in fixed order."""
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


def _windows(text: Tensor, starts: Tensor) -> Tensor:
    """Return the CONTEXT + 1 bytes of `text` from each of `starts`."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def _batches(text: Tensor, count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield _windows(text, torch.randint(len(text) - CONTEXT, (BATCH,)))


def _even_batches(text: Tensor, count: int = HELD_OUT_BATCHES) -> Iterator[Tensor]:
    starts = torch.linspace(0, len(text) - CONTEXT - 1, count * BATCH).long()
    for row in starts.view(count, BATCH):
        yield _windows(text, row)


def _table(runs: Sequence[Run]) -> Table:
    from rich.table import Table

    table = Table(caption="losses in nats per byte; times are medians over the steps")
    table.add_column("", no_wrap=True)
    for heading in ("steps", "train loss", "held-out loss", "optimizer ms", "of the step"):
        table.add_column(heading, justify="right")
    for run in runs:
        optimizer, whole = median(run.optimizer_seconds), median(run.step_seconds)
        table.add_row(
            run.name,
            str(len(run.losses)),
            f"{run.smoothed()[-1]:.4f}",
            "" if isnan(run.held_out_loss) else f"{run.held_out_loss:.4f}",
            f"{1e3 * optimizer:.1f}",
            f"{optimizer / whole:.0%}",
        )
    return table


def _comparison(runs: Sequence[Run]) -> str:
    """Say how far apart the two Muons are; nothing unless both ran."""
    by_name = {run.name: run for run in runs}
    try:
        ours, torchs = by_name["muon_kernels"], by_name["torch.optim.Muon"]
    except KeyError:
        return ""
    steps = min(len(ours.losses), len(torchs.losses))
    gap = (ours.smoothed(steps) - torchs.smoothed(steps)).abs().max()
    held_out_gap = abs(ours.held_out_loss - torchs.held_out_loss)
    speedup = median(torchs.optimizer_seconds) / median(ours.optimizer_seconds)
    return (
        f"muon_kernels and torch.optim.Muon: smoothed training losses of {steps} steps at most {gap:.4f} apart, "
        + ("" if isnan(held_out_gap) else f"held-out losses {held_out_gap:.4f} apart; ")
        + f"optimizer step {speedup:.2f}x as fast"
    )


def _plot(runs: Sequence[Run], path: Path) -> None:
    """Write the smoothed loss curves, against steps and against time, as a PNG to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained", dpi=150)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for name, style in STYLES.items():
        for run in runs:
            if run.name == name:
                loss = run.smoothed()
                steps = torch.arange(len(run.losses) - len(loss), len(run.losses)) + 1
                # The sum of the times would show what else the machine was doing.
                seconds = steps * median(run.step_seconds)
                end = {"marker": "o", "markevery": [-1]} if run.stopped else {}
                label = f"{name}, {len(run.losses)} steps" if run.stopped else name
                by_step.plot(steps, loss, label=label, **style, **end)
                by_time.plot(seconds, loss, label=label, **style, **end)
    by_step.set(xlabel="step", ylabel="training loss, nats per byte (running mean)")
    by_time.set(xlabel="seconds, at the median time of a step")
    by_step.legend(frameon=False)
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
    figure.savefig(path)
