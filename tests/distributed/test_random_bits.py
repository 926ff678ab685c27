"""Random bits of stochastic rounding on every layout and by every strategy, against one process, to the bit.

Gradients are zeros and so are updates, whoever orthogonalizes what: parameters decay, and random bits round them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import Parameter

from muon_kernels import Muon, backends
from muon_kernels.split import blocks, equal
from muon_kernels.tensors import local

# Wide, tall and square ones with even and odd sides, fewer rows than ranks, equal ones, stacks.
MATRICES = [(8, 24), (7, 26), (24, 8), (26, 7), (13, 13), (12, 12), (2, 30), (30, 1), (8, 24), (9, 15)]
STACKS = [(5, 12, 10), (4, 7, 9), (2, 9, 6), (3, 2, 5, 9)]
# One step of Newton-Schulz, as there is nothing to iterate on.
DECAY = {"lr": 0.5, "weight_decay": 0.02, "stochastic_rounding": True, "block_period": 2, "ns_steps": 1}

# Parameters and options; what splits do not cut is cut anywhere.
CASES: dict[str, tuple[list[tuple[int, ...]], dict[str, Any]]] = {
    "matrices": (MATRICES, {}),
    "stacks": (STACKS, {"flatten": False}),
    "parts of matrices": ([(24, 9), (12, 25), (36, 10)], {"split": equal(3)}),
    "parts of stacks": ([(5, 12, 10), (4, 6, 9)], {"split": equal(2)}),
    "columns of stacks": ([(5, 10, 12), (4, 9, 6)], {"split": equal(3, dim=1)}),
    "heads and the rest": ([(24, 9), (24, 25)], {"split": blocks(6, 6, 12)}),
    "interleaved": ([(5, 12, 9), (5, 12, 26)], {"split": blocks(1, 1, interleaved=True), "flatten": False}),
    "small workspace": (MATRICES + STACKS, {"max_workspace_bytes": 3000, "flatten": False}),
    "convolutions": ([(9, 3, 2, 2), (4, 5, 3, 3), (5, 3, 3)], {"flatten": True}),
}


def nested(dim: int) -> list[Any]:
    """Sharded by the second dimension of the mesh, and what comes of it by the first, as FSDP2 does it."""
    return [_StridedShard(dim, split_factor=2), Shard(dim)]


def placements(size: int) -> dict[str, tuple[DeviceMesh, list[Any]]]:
    """Return what shards and copies a matrix; dimensions are those of a stack, from behind."""
    line = init_device_mesh("cpu", (size,))
    found: dict[str, tuple[DeviceMesh, list[Any]]] = {
        "rows": (line, [Shard(-2)]),
        "columns": (line, [Shard(-1)]),
        "copies": (line, [Replicate()]),
        "experts": (line, [Shard(0)]),
        "experts of experts' stacks": (line, [Shard(-3)]),
    }
    if size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found |= {
            "copies of rows": (square, [Replicate(), Shard(-2)]),
            "copies of columns": (square, [Replicate(), Shard(-1)]),
            "columns of rows": (square, [Shard(-2), Shard(-1)]),
            "rows of rows": (square, nested(-2)),
            "columns of columns": (square, nested(-1)),
            "rows of experts": (square, [Shard(0), Shard(-2)]),
            "experts of columns": (square, [Shard(-1), Shard(0)]),
            "experts of experts": (square, nested(0)),
            "copies of experts": (square, [Replicate(), Shard(0)]),
        }
    return found


def refused(shape: Sequence[int], where: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether such parameters cannot be cut like that."""
    if any(at.dim < -len(shape) for at in where if not at.is_replicate()):
        return True
    dims = {at.dim % len(shape) for at in where if not at.is_replicate()}
    if options.get("flatten"):
        return bool(dims - {0})
    return "interleaved" in options.get("split", "") and len(shape) - 2 in dims


def decayed(
    shapes: Sequence[tuple[int, ...]], place: Callable[[Tensor], Tensor], options: dict[str, Any]
) -> list[Tensor]:
    """Three steps, the second without the gradient of the first parameter."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(place(torch.rand(shape, generator=generator).bfloat16())) for shape in shapes]
    optimizer = Muon(params, **{**DECAY, **options})
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = None if step == 1 and i == 0 else torch.zeros_like(p)
        optimizer.step()
    return [p.detach() for p in params]


def compare(backend: str, strategy: str) -> tuple[int, list[str]]:
    """Return how many elements were compared, and where they differ from one process's."""
    size = dist.get_world_size()
    compared, different = 0, []
    everywhere: dict[str, tuple[DeviceMesh, list[Any]] | None] = {**placements(size), "group": None}
    for case, (shapes, own) in CASES.items():
        options = {**own, "backend": backend}
        expected = decayed(shapes, lambda t: t, options)
        for layout, place in everywhere.items():
            if place is None:
                put, more = (lambda t: t), {"process_group": dist.group.WORLD}
            else:
                mesh, where = place
                if any(refused(shape, where, own) for shape in shapes):
                    continue
                put, more = (lambda t, m=mesh, w=where: distribute_tensor(t, m, w, src_data_rank=None)), {}
            found = decayed(shapes, put, {**options, "strategy": strategy, **more})
            for i, (p, q) in enumerate(zip(found, map(put, expected), strict=True)):
                # Not full_tensor, which torch 2.13 puts together wrongly where dimensions of a mesh cut rows unevenly.
                here, wanted = local(p), local(q)
                compared += here.numel()
                if not torch.equal(here, wanted):
                    different.append(f"{case}, {layout}, parameter {i} of {tuple(q.shape)}")
    return compared, different


# All strategies on two ranks, where cuts have even and odd places; meshes of two dimensions on four.
RUNS = ["2-cpu-owner", "2-cpu-gram", "2-cpu-blocks", "4-cpu-owner", "4-cpu-gram", "3-eager-owner", "3-eager-blocks"]


@pytest.mark.parametrize("run", RUNS)
def test_as_in_one_process(ranks: World, run: str) -> None:
    size, backend, strategy = run.split("-")
    if reason := backends.unavailable(backend):
        pytest.skip(reason)
    for compared, different in ranks.run(int(size), compare, backend, strategy):
        assert not different
        assert compared > 5_000
