"""Train the same model three times on several ranks, which differ in who keeps what state of the optimizer.

    torchrun --nproc-per-node 2 examples/zero.py

    DDP          every rank steps everything and keeps all state
    DDP, shared  each rank steps a share of the matrices and keeps the momentum of that: `process_group=`
    ZeRO-1       each rank keeps an equal slice of all state, AdamW's too, and averages the gradients itself

All three see the same tokens. The first two agree to the bit on a CPU. ZeRO-1 rounds Muon's direction to bf16 a step
earlier, so its losses differ in the third or fourth digit. There is no clipping here: before its step, ZeRO-1 has
gradients of this rank alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from common import ranks
from common.arguments import count, rate, seed
from common.gpt import GPT, TINY, loss_of
from common.tokens import read_folder
from prepare_tokens import standard_library
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import muon_kernels
from muon_kernels.distributed import ZeroMuonAdamW
from muon_kernels.split import equal

WAYS = ("DDP", "DDP, shared", "ZeRO-1")


def build(way: str, args: argparse.Namespace, here: ranks.Ranks) -> tuple[nn.Module, Optimizer]:
    """Return the model as this way trains it, and its optimizer. Weights are the same for all ways and ranks."""
    torch.manual_seed(args.seed)
    model = GPT(TINY).to(here.device)
    groups = muon_kernels.param_groups(model, split={"*.c_attn.weight": equal(3)})
    muon = {"lr": args.lr, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    adamw = {"lr": args.lr, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    if way == "ZeRO-1":
        # Not in DistributedDataParallel, which would average gradients once more.
        return model, ZeroMuonAdamW(groups, muon_options=muon, adamw_options=adamw)
    group = dist.group.WORLD if way == "DDP, shared" else None
    optimizer = muon_kernels.MuonAdamW(groups, muon_options={**muon, "process_group": group}, adamw_options=adamw)
    return DistributedDataParallel(model), optimizer


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of state that this rank keeps."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def train(args: argparse.Namespace, here: ranks.Ranks) -> dict[str, tuple[list[float], list[int]]]:
    """Train all ways; return, by way, the mean loss of each step and the bytes of state on each rank."""
    if args.batch_size % here.count:
        raise ValueError(
            f"--batch-size should be a multiple of the {here.count} ranks, which share it, but is: {args.batch_size}"
        )
    data = Path("runs/python-bytes")
    if here.first:
        standard_library(data)
    here.wait()
    results = {}
    for way in WAYS:
        batches, _ = read_folder(data, TINY, here.count, args.seed, here)
        model, optimizer = build(way, args, here)
        losses = []
        for _ in track(range(args.steps), way, console=Console(quiet=not here.first)):
            loss = loss_of(model, batches.draw(args.batch_size, here.rank, here.count).to(here.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(here.mean(loss))
        sizes: list[int] = [0] * here.count
        dist.all_gather_object(sizes, state_bytes(optimizer))
        results[way] = losses, sizes
    return results


def show(results: dict[str, tuple[list[float], list[int]]]) -> None:
    """Print losses and bytes side by side."""
    losses = Table(title="loss, nats per byte")
    for heading in ("step", *results):
        losses.add_column(heading, justify="right")
    steps = len(results[WAYS[0]][0])
    for step in sorted({*range(0, steps, max(1, steps // 10)), steps - 1}):
        losses.add_row(str(step + 1), *(f"{found[step]:.4f}" for found, _ in results.values()))
    sizes = Table(title="state of the optimizer, MB")
    for heading in ("rank", *results):
        sizes.add_column(heading, justify="right")
    for rank in range(len(results[WAYS[0]][1])):
        sizes.add_row(str(rank), *(f"{found[rank] / 1e6:.2f}" for _, found in results.values()))
    Console().print(losses, sizes)


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[list[float], list[int]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=30, help="default: 30")
    parser.add_argument("--batch-size", type=count, default=16, help="windows of all ranks together (default: 16)")
    parser.add_argument("--lr", type=rate, default=4e-3, help="default: 0.004")
    parser.add_argument("--seed", type=seed, default=0, help="of the weights and the batches (default: 0)")
    args = parser.parse_args(argv)
    with ranks.started() as here:
        if not dist.is_initialized():
            raise SystemExit("this example needs ranks: torchrun --nproc-per-node 2 examples/zero.py")
        results = train(args, here)
        if here.first:
            show(results)
    return results


if __name__ == "__main__":
    main()
