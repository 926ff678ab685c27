"""The processes of a training: one, or as many as torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


class Ranks(NamedTuple):
    """This process among all: its number, how many there are, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def mean(self, value: Tensor) -> float:
        """Return the mean of a number over the ranks."""
        value = value.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(value)
        return value.item() / self.count

    def wait(self) -> None:
        """Wait for all ranks."""
        if dist.is_initialized():
            dist.barrier()


ALONE = Ranks(0, 1, torch.device("cpu"))


@contextmanager
def started(parallel: str | None = None) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, if it has, and leave them in the end.

    Args:
        parallel: what the user asks for, which needs torchrun; None where one process will do.
    """
    found = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if found else torch.device("cpu")
    if found:
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by a program that calls this one
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    if "RANK" not in os.environ:
        if parallel:
            raise SystemExit(
                f"--parallel {parallel} needs processes, which torchrun starts: torchrun --nproc-per-node 2 SCRIPT ..."
            )
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if found else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def whole(value: Tensor) -> Tensor:
    """Return a number that FSDP2 keeps in parts, such as the norm of gradients, as a plain tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard(model: nn.Module, layers: Any) -> None:
    """Shard a model over all ranks by FSDP2, in place: each layer by itself, and the rest together."""
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)


@contextmanager
def summed(net: nn.Module, last: bool) -> Iterator[None]:
    """Average gradients over the ranks in the last backward pass of a step only, where they are several."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(last)
    with net.no_sync() if isinstance(net, DistributedDataParallel) and not last else nullcontext():
        yield
