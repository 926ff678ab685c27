"""Gain of two ranks that share a step over one that steps alone, a thread each, over gloo.

Rounds take turns in one run: rank 0 steps alone while rank 1 sleeps, then both step together. Steps are timed by the
clock, from the barrier before to the last rank's end, and in processor time of the slower rank's process. Neighbours on
the machine disturb the latter less; it includes gloo's copies but not the waiting. The model has twelve layers in
proportion; with --layers others.

    python bench/bench_distributed.py            a Markdown table, for RESULTS.md
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from shapes import Shapes, gpt2, llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import muon_kernels

RANKS = 2


class Taken(NamedTuple):
    """Seconds of a step: by the clock; of the process; and the system's part of these, which copies to sockets."""

    clock: float
    processor: float
    system: float


def parameters(shapes: Shapes, place: Callable[[torch.Tensor], torch.Tensor]) -> list[nn.Parameter]:
    """Return parameters with gradients, the same on every rank."""
    torch.manual_seed(0)
    params = []
    for rows, cols, count in shapes:
        for _ in range(count):
            params.append(nn.Parameter(place(torch.randn(rows, cols) * 0.02)))
            params[-1].grad = place(torch.randn(rows, cols))
    return params


def timed(step: Callable[[], object]) -> Taken:
    """Time one step of this rank, which all ranks take part in."""
    import resource

    before, clock = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    step()
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - clock
    system = after.ru_stime - before.ru_stime
    return Taken(seconds, system + after.ru_utime - before.ru_utime, system)


def _rank(rank: int, store: str, shapes: Shapes, rounds: int, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    steps: dict[str, muon_kernels.Muon] = {}
    if rank == 0:
        steps["alone"] = muon_kernels.Muon(parameters(shapes, lambda t: t))
    steps["DDP replicas"] = muon_kernels.Muon(parameters(shapes, lambda t: t), process_group=dist.group.WORLD)
    steps["FSDP2, Shard(0)"] = muon_kernels.Muon(parameters(shapes, lambda t: distribute_tensor(t, mesh, [Shard(0)])))
    taken: dict[str, list[Taken]] = {name: [] for name in ("alone", "DDP replicas", "FSDP2, Shard(0)")}
    for i in range(rounds + 1):
        for name, own in taken.items():
            dist.barrier()
            if name in steps:
                one = timed(steps[name].step)
                if i:  # the first one allocates
                    own.append(one)
    sent = {name: muon.plan().bytes_sent for name, muon in steps.items()}
    torch.save((taken, sent), f"{results}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def measured(shapes: Shapes, rounds: int) -> list[tuple[dict[str, list[Taken]], dict[str, int]]]:
    """Return (times of its steps, bytes that a step sends) of every rank, each by name of the layout."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (f"{folder}/store", shapes, rounds, folder), nprocs=RANKS)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(RANKS)]


def table(workloads: dict[str, Shapes], rounds: int) -> str:
    """Return a table: medians of the slower rank, their share of the step alone, and its quartiles over the rounds."""
    lines = ["| workload | layout | clock, ms | of alone | quartiles | processor, ms | of alone | system | MB sent |"]
    lines.append("|---" * 9 + "|")
    for workload, shapes in workloads.items():
        ranks = measured(shapes, rounds)
        alone = ranks[0][0]["alone"]
        for name in ranks[0][0]:
            each: Sequence[Sequence[Taken]] = [taken[name] for taken, _ in ranks if taken[name]]
            slower = [Taken(*map(max, zip(*turn, strict=True))) for turn in zip(*each, strict=True)]
            clock, processor, system = (1e3 * statistics.median(part) for part in zip(*slower, strict=True))
            shares = [a.clock / b.clock for a, b in zip(slower, alone, strict=True)]
            low, middle, high = statistics.quantiles(shares, n=4)
            of = processor / 1e3 / statistics.median(t.processor for t in alone)
            lines.append(
                f"| {workload} | {name} | {clock:.0f} | **{middle:.2f}** | {low:.2f}–{high:.2f} | {processor:.0f} | "
                f"{of:.2f} | {system:.0f} | {max(sent.get(name, 0) for _, sent in ranks) / 1e6:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of GPT-2, default: 4")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {RANKS} ranks, a thread each, gloo; {arguments.rounds} rounds\n")
    chosen = {f"GPT-2, {arguments.layers} of 12 layers": gpt2(arguments.layers), "Llama-style, 1 layer": llama(1)}
    print(table(chosen, arguments.rounds))
