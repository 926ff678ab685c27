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
import os
import sys
from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .display import CANNOT_TELL, STYLES, comparison, plot, progress, table
from .model import GPT, MLP, Block
from .text import BATCH, CONTEXT, batches, even_batches, parted, prose, source_code
from .training import BESIDE_MUON_OPTIONS, MUON_OPTIONS, OPTIMIZERS, Clock, Run, train

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BESIDE_MUON_OPTIONS",
    "CONTEXT",
    "GPT",
    "HEADS",
    "LAYERS",
    "MLP",
    "MUON_OPTIONS",
    "OPTIMIZERS",
    "STYLES",
    "WIDTH",
    "Block",
    "Run",
    "add_arguments",
    "batches",
    "even_batches",
    "parted",
    "prose",
    "run",
    "source_code",
]

WIDTH = 256
LAYERS = 4
HEADS = 4
STEPS = 160
# Share of the time that starting Python and drawing the picture takes.
OVERHEAD = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be chosen about the demonstration."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes",
        type=_minutes,
        help=f"time for {STEPS} training steps of each, or as many as it allows (default: 4, on one core 8)",
    )
    length.add_argument("--steps", type=_positive, help="training steps of each, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="seed of model and batches (default: 0)")
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
    parser.add_argument("--threads", type=_positive, help="threads of torch (default: its own choice)")
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


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"should be > 0 and finite but is: {value}")
    return value


def _spoken(minutes: float) -> str:
    return "1 minute" if minutes == 1 else f"{minutes:g} minutes"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be >= 1 but is: {value}")
    return value


def _run(args: argparse.Namespace, names: Sequence[str]) -> int:
    """Do what `run` does, with the optimizers `names`, on every rank if there are several."""
    from rich.console import Console

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    console = Console(quiet=rank != 0)
    minutes = inf if args.steps else args.minutes or (4.0 if torch.get_num_threads() * ranks > 1 else 8.0)
    clock = Clock(60 * minutes * (1 - OVERHEAD))
    torch.manual_seed(args.seed)
    text, held_out = parted(prose() + source_code())
    model = GPT(WIDTH, LAYERS, HEADS, CONTEXT)
    steps = args.steps or STEPS
    runs = [Run(name, model, steps, args.fsdp) for name in dict.fromkeys(names)]
    # The first pass of a process sets things up, which should count in no run's times.
    model(next(batches(text, 1))).backward()
    shared = f", {ranks} ranks" if args.fsdp else ""
    limit = f", in {_spoken(minutes)} at most" if minutes < inf else ""
    console.print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, "
        f"{len(text) / 1e6:.1f} MB of text, {torch.get_num_threads()} threads{shared}, "
        f"{steps} steps of {BATCH} x {CONTEXT} bytes{limit}"
    )

    try:
        with progress(runs, steps, console) as show, clock.stopped_by_ctrl_c():
            train(runs, batches(text, steps), clock, show)
        interrupted = clock.left() == -inf
    except KeyboardInterrupt:
        if args.fsdp:  # the ranks are at different places and cannot measure anything together
            raise
        interrupted = True
    done = _cut_to_whole_turns(runs)
    if done:
        interrupted |= not _evaluated(runs, even_batches(held_out), console)
        console.print(table(runs))
        console.print(CANNOT_TELL)
        why = "stopped by Ctrl-C" if clock.left() == -inf else f"all that fits in {_spoken(minutes)}"
        _explain(runs, f"{done} of {steps} steps, {why}" if done < steps else "", console)
        if rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / "muon_demo.png"
            plot(runs, path)
            console.print(f"loss curves: {path}", soft_wrap=True)
    return 130 if interrupted else 0


def _cut_to_whole_turns(runs: Sequence[Run]) -> int:
    """Drop the steps of a turn that not every run has done; return how many turns are left."""
    going = [run for run in runs if not run.stopped]
    done = min(len(run.optimizer_seconds) for run in going)
    for run in going:
        for series in (run.losses, run.step_seconds, run.optimizer_seconds):
            del series[done:]
    return done


def _evaluated(runs: Sequence[Run], held_out: Iterable[Tensor], console: Console) -> bool:
    """Measure the held-out losses; return whether Ctrl-C left time for all of them."""
    try:
        with console.status("measuring the held-out loss (Ctrl-C skips it)"):
            texts = list(held_out)
            for run in runs:
                if not run.stopped:
                    run.evaluate(texts)
    except KeyboardInterrupt:
        return False
    return True


def _explain(runs: Sequence[Run], fewer: str, console: Console) -> None:
    """Print which runs were too slow, why there are fewer steps if there are, and how the two Muons compare."""
    for run in runs:
        if run.stopped:
            console.print(f"{run.name} was too slow: stopped after {len(run.losses)} steps of {run.cost():.1f} s")
    if fewer:
        console.print(fewer)
    if sentence := comparison(runs):
        console.print(sentence, highlight=False)
