"""Verify on this machine that results are right, and measure on its GPU how fast they are, in ten minutes.

In this order: facts; the rates that this GPU reaches at best; products of every tile and steps, against float64; what a
tile and a launch cost; which backend is faster from which size on; steps of real models, beside torch.optim.Muon, eager
and compiled, a compiled loop over stacks, and peers that are installed; the gaps between kernels; passes over memory;
NVIDIA's checker and profiler, where they are installed.

If products or steps are wrong, nothing is timed, unless --anyway is given. The JSON is complete after every stage;
Ctrl-C shows what there is. Without a GPU, the kernels of this processor are checked. --emulated executes the CUDA
kernels on the processor, in the source tree: a few, on tiny matrices; what would time them is tried as well, and what
it says thrown away.

Exit status: 0; 1 if anything is wrong or failed; 2 for arguments that cannot be; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from contextlib import AbstractContextManager, nullcontext
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ... import backends
from ..._version import __version__

if TYPE_CHECKING:
    from .stage import Place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the time, the file and the executor."""
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="time for all stages together (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that is found there, after every stage")
    parser.add_argument("--emulated", action="store_true", help="execute the CUDA kernels on this processor")
    parser.add_argument("--anyway", action="store_true", help="measure times even if results are wrong")


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < inf:
        raise argparse.ArgumentTypeError(f"should be a number of minutes > 0 but is: {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the stages, print the tables; return the exit status."""
    from . import emulation

    if args.emulated and (reason := emulation.missing()):
        print(reason, file=sys.stderr)
        return 2
    context = emulation.place() if args.emulated else _here()
    with context as place:
        return _run(args, place)


def _here() -> AbstractContextManager[Place]:
    """Return the GPU as a place for stages, or the processor."""
    from .stage import Graph, Place

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in backends.BACKENDS if backends.unavailable(name) is None]
    own = [n for n in names if backends.get(n).refuses(torch.device(device), [torch.float32], torch.bfloat16) is None]
    if device == "cpu":
        return nullcontext(Place("cpu", "cpu", tuple(own)))

    def graph() -> Graph:
        made = torch.cuda.CUDAGraph()
        return Graph(lambda: torch.cuda.graph(made), made.replay)

    return nullcontext(Place("gpu", "cuda", tuple(own), graph))


def _run(args: argparse.Namespace, place: Place) -> int:
    from . import report, workloads
    from .runner import Runner
    from .stages import STAGES

    sizes = {"gpu": workloads.FULL, "cpu": workloads.CPU, "executor": workloads.TINY}[place.kind]
    when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    about = {"muon_kernels": __version__, "when": when, "minutes": args.minutes, "place": place.kind}
    said = lambda record: print(report.line(record), flush=True)
    runner = Runner(STAGES, place, sizes, 60 * args.minutes, args.json, said, about, args.anyway)
    try:
        runner.write()
    except OSError as error:
        what = f"--json should be a file that can be written, in a folder that is there, but is: {args.json}"
        print(f"{what} ({error.strerror})", file=sys.stderr)
        return 2
    if place.kind == "cpu":
        print("there is no GPU here: what runs on this processor is checked, and nothing is timed\n")
    interrupted = runner.run()
    print()
    report.show(runner.records)
    if args.json:
        print(f"all of it: {args.json}")
    return 130 if interrupted else int(runner.bad)
