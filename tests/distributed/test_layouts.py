"""The demo's GPT on several ranks, in every layout that torch has for it, steps as in one process, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import needs
from ranks import World
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from muon_kernels import MuonAdamW, param_groups
from muon_kernels.cli.demo import GPT

CONTEXT = 16


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def mesh(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("a", "b")[: len(sizes)])


def ddp(model: GPT) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: GPT) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh(dist.get_world_size()))
    return fully_shard(model, mesh=mesh(dist.get_world_size()))


def hsdp(model: GPT) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh(2, dist.get_world_size() // 2))
    return fully_shard(model, mesh=mesh(2, dist.get_world_size() // 2))


def tp(model: GPT, on: DeviceMesh | None = None) -> nn.Module:
    plan = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, on or mesh(dist.get_world_size()), plan)
    return model


def fsdp_and_tp(model: GPT) -> nn.Module:
    both = mesh(2, dist.get_world_size() // 2)
    tp(model, both["b"])
    for layer in model.layers:
        fully_shard(layer, mesh=both["a"])
    return fully_shard(model, mesh=both["a"])


LAYOUTS: dict[str, Callable[[GPT], nn.Module]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tp": tp,
    "fsdp and tp": fsdp_and_tp,
}


def groups_of(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    return param_groups(model, muon_options={"lr": 0.02, **options}, adamw_options={"lr": 1e-3})


def train(layout: str, width: int, steps: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Steps of `layout`, each followed by the same step on whole tensors with the same gradients."""
    torch.manual_seed(0)
    model = GPT(width, 2, 4, CONTEXT).to(dtype)
    alone = copy.deepcopy(model)
    trained = LAYOUTS[layout](model)
    shared = {"process_group": dist.group.WORLD} if layout == "ddp" else {}
    optimizer = MuonAdamW(groups_of(trained, **options), muon_options=shared)
    reference = MuonAdamW(groups_of(alone, **options))
    different, state = [], 0
    for step in range(steps):
        torch.manual_seed(100 + 10 * step + dist.get_rank())
        for _ in range(2):  # accumulated
            trained(torch.randint(256, (2, CONTEXT + 1))).backward()
        if layout in ("ddp", "fsdp", "hsdp"):  # of tensors on different meshes torch takes no norm
            nn.utils.clip_grad_norm_(trained.parameters(), 0.5)
        for p, q in zip(trained.parameters(), alone.parameters(), strict=True):
            q.grad = None if p.grad is None else full(p.grad).clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        for (name, p), q in zip(trained.named_parameters(), alone.parameters(), strict=True):
            got, expected = full(p.detach()), q.detach()
            # torch's AdamW rounds a vector's tail otherwise, and a part of a vector has another.
            by_muon = p.ndim == 2 and name.startswith("layers")
            same = torch.equal(got, expected) if by_muon else torch.allclose(got, expected, atol=1e-7)
            if not same:
                different.append((step, name, float((got - expected).abs().max())))
    for group in optimizer.param_groups:
        if group["use_muon"]:
            momenta = [optimizer.state[p].get("momentum_buffer") for p in group["params"]]
            held = [m.to_local() if isinstance(m, DTensor) else m for m in momenta if m is not None]
            state += sum(m.numel() for m in held)
    return {
        "different": different,
        "state": state,
        "all": sum(p.numel() for p in alone.layers.parameters() if p.ndim == 2),
    }


SIZES = {"ddp": (1, 2, 3, 4), "fsdp": (1, 2, 3, 4), "hsdp": (2, 4), "tp": (2, 4), "fsdp and tp": (4,)}


@pytest.mark.parametrize(("layout", "size"), [(layout, size) for layout, sizes in SIZES.items() for size in sizes])
def test_as_in_one_process(ranks: World, layout: str, size: int) -> None:
    """Widths that three ranks cut unevenly; each rank its own batch."""
    found = ranks.run(size, train, layout, 40, 3, torch.float32, {})
    for rank in found:
        assert not rank["different"]
    cut = {"ddp": size, "fsdp": size, "hsdp": size / 2, "tp": None, "fsdp and tp": None}[layout]
    if cut:  # what a rank keeps is its share of all momenta, give or take a matrix
        for rank in found:
            assert abs(rank["state"] - rank["all"] / cut) <= 4 * 40 * 40


def pipelined() -> list[float]:
    """Differences from one process after three steps of a pipeline of two stages, each sharded over two ranks."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    index = both.get_local_rank("stage")
    torch.manual_seed(index)
    # Stages have other matrices, and another number of them.
    layers = [nn.Linear(24, 32)] if index == 0 else [nn.Linear(32, 32), nn.Linear(32, 40)]
    model = nn.Sequential(*layers, nn.ReLU())
    alone = copy.deepcopy(model)
    fully_shard(model, mesh=both["data"])
    stage = PipelineStage(model, index, 2, torch.device("cpu"), group=both["stage"].get_group())
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    groups = [[{"params": [p], "use_muon": p.ndim == 2} for p in each.parameters()] for each in (model, alone)]
    optimizer, reference = (MuonAdamW(each, muon_options={"lr": 0.05, "backend": "cpu"}) for each in groups)
    for step in range(3):
        torch.manual_seed(10 * step + both.get_local_rank("data"))
        batch, targets = torch.randn(4, 24), torch.randn(4, 40)
        if index == 0:
            schedule.step(batch)
        else:
            schedule.step(target=targets, losses=[])
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.grad = full(p.grad).clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return [float((full(p.detach()) - q.detach()).abs().max()) for p, q in pairs if p.ndim == 2]


@needs.cpu_kernels
def test_stages_of_a_pipeline(ranks: World) -> None:
    """Ranks of one stage step together, whatever those of the other do."""
    found = ranks.run(4, pipelined)
    assert [len(matrices) for matrices in found] == [1, 1, 2, 2]
    assert not any(difference for matrices in found for difference in matrices)
