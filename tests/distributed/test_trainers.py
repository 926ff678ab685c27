"""Loops as trainers have them, on several ranks: where one process goes, and on from a checkpoint to the bit.

One after torchtitan's (parallelized on the meta device, mixed precision, clipped, torch.distributed.checkpoint), one
after nanochat's (replicas that average gradients themselves, options that change in every step), one of a pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks import needs
from ranks import World
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.lr_scheduler import LambdaLR

from muon_kernels import MuonAdamW, param_groups
from muon_kernels.distributed import ZeroMuonAdamW

WIDTH, WORDS = 24, 32
SEQUENCES, LENGTH = 24, 8  # of all ranks: one, two, three and four share them
HALF, STEPS = 2, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def fresh() -> Model:
    torch.manual_seed(0)
    return Model()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of all ranks."""
    generator = torch.Generator().manual_seed(100 + step)
    return tuple(torch.randint(WORDS, (SEQUENCES, LENGTH), generator=generator) for _ in range(2))  # type: ignore[return-value]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def warm_up(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))


def optimizer_of(model: nn.Module) -> MuonAdamW:
    return MuonAdamW(
        param_groups(model),
        muon_options={"lr": 0.05, "backend": "cpu"},
        adamw_options={"lr": 0.01, "weight_decay": 0.1},
    )


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], most: float) -> None:
    """Of the way that each parameter has gone."""
    begin = parameters(fresh())
    assert found.keys() == expected.keys() == begin.keys()
    for name, p in expected.items():
        apart, way = (found[name] - p).norm(), (p - begin[name]).norm()
        assert way > 0 and apart <= most * way, (name, float(apart / way))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        assert torch.equal(found[name], p), name


# ------------------------------------------------------------------------------------------------------ torchtitan


def parallelized(dp: int, tp: int) -> nn.Module:
    """A model whose parameters are made where they belong: tensor-parallel ones, cut again by FSDP2, in bf16."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        model = Model()
    # All parameters, as clipping takes the norm of tensors on one mesh.
    words = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tp"], words)
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    model.to_empty(device="cpu")
    set_model_state_dict(model, fresh().state_dict(), options=StateDictOptions(full_state_dict=True))
    return model


def titan(start: int, stop: int, folder: str, dp: int, tp: int) -> dict[str, Tensor]:
    """Parameters after steps start..stop, from the checkpoint in `folder` unless they are the first."""
    model = parallelized(dp, tp)
    optimizer = optimizer_of(model)
    schedule = warm_up(optimizer)

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {"model": get_model_state_dict(model), "schedule": schedule.state_dict()}
        return {**found, "optimizer": get_optimizer_state_dict(model, optimizer)}

    if start:
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder)
        set_model_state_dict(model, loaded["model"])
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
        schedule.load_state_dict(loaded["schedule"])
    for step in range(start, stop):
        tokens, targets = (t.chunk(dp)[dist.get_rank() // tp] for t in batch(step))
        loss_of(model(tokens), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if stop < STEPS:
        dcp.save(state(), checkpoint_id=folder)
    return parameters(model)


def in_one_process(parts: int) -> dict[str, Tensor]:
    """The same in one process, which computes in bf16 what each of `parts` ranks has of the data."""
    model = fresh()
    optimizer = optimizer_of(model)
    schedule = warm_up(optimizer)
    for step in range(STEPS):
        for tokens, targets in zip(*(t.chunk(parts) for t in batch(step)), strict=True):
            rounded = {name: p.bfloat16() for name, p in model.named_parameters()}
            logits = torch.func.functional_call(model, rounded, (tokens,))
            (loss_of(logits, targets) / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return parameters(model)


@needs.cpu_kernels
def test_torchtitans(ranks: World, tmp_path: Path) -> None:
    """On from a checkpoint of four ranks; then on two, three and one, whose sums of gradients are in another order."""
    expected = in_one_process(2)
    whole = ranks.run(4, titan, 0, STEPS, "", 2, 2)
    for found in whole:
        assert_near(found, expected, 0.08)
    ranks.run(4, titan, 0, HALF, str(tmp_path), 2, 2)
    for found in ranks.run(4, titan, HALF, STEPS, str(tmp_path), 2, 2):
        assert_same(found, whole[0])
    for dp, tp in ((4, 1), (1, 2), (2, 1), (3, 1), (1, 1)):
        for found in ranks.run(dp * tp, titan, HALF, STEPS, str(tmp_path), dp, tp):
            assert_near(found, whole[0], 0.08)


# -------------------------------------------------------------------------------------------------------- nanochat


def chat_groups(model: Model) -> list[dict[str, Any]]:
    """Matrices to Muon, the rest to AdamW with rates of their own."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    groups = [
        {"params": matrices, "use_muon": True, "lr": 0.05},
        {"params": [model.embed.weight], "use_muon": False, "lr": 0.05},
        {"params": [model.lm_head.weight], "use_muon": False, "lr": 0.004},
        {"params": [p for p in model.layers.parameters() if p.ndim == 1], "use_muon": False, "lr": 0.02},
    ]
    return [{**group, "initial_lr": group["lr"]} for group in groups]


def chat_steps(
    model: Model, optimizer: Any, steps: Iterable[int], mine: Callable[[Tensor], Tensor], average: bool
) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / (2 * STEPS))
            if group["use_muon"]:
                group["momentum"] = 0.85 + 0.1 * min(1.0, step / 3)
                group["weight_decay"] = 0.2 * (1 - step / STEPS)
        tokens, targets = map(mine, batch(step))
        loss_of(model(tokens), targets).backward()
        if average:
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad.div_(dist.get_world_size())  # type: ignore[union-attr]
        optimizer.step()
        model.zero_grad(set_to_none=True)


def chat(how: str, start: int, stop: int, folder: str) -> dict[str, Tensor]:
    """As `titan`; gradients are averaged by the optimizer, or by the loop."""
    model, file = fresh(), Path(folder, "on-rank-0.pt")
    muon, adamw = {"backend": "cpu"}, {"betas": (0.8, 0.95), "weight_decay": 0.01}
    optimizer: Any
    if how == "ZeRO-1":
        optimizer = ZeroMuonAdamW(chat_groups(model), muon_options=muon, adamw_options=adamw)
    else:
        shared = {**muon, "process_group": dist.group.WORLD}
        optimizer = MuonAdamW(chat_groups(model), muon_options=shared, adamw_options=adamw)
    if start and how == "ZeRO-1":
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    elif start:
        state = torch.load(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    mine = lambda t: t.chunk(dist.get_world_size())[dist.get_rank()]
    chat_steps(model, optimizer, range(start, stop), mine, how != "ZeRO-1")
    if stop < STEPS and how == "ZeRO-1":
        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    elif stop < STEPS:
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return parameters(model)


@needs.cpu_kernels
@pytest.mark.parametrize("how", ["ZeRO-1", "all_reduce"])
def test_nanochats(ranks: World, how: str, tmp_path: Path) -> None:
    """Rates, momentum and decay of groups change in every step. From three ranks' checkpoint also on four and two."""
    alone = fresh()
    optimizer = MuonAdamW(
        chat_groups(alone),
        muon_options={"backend": "cpu"},
        adamw_options={"betas": (0.8, 0.95), "weight_decay": 0.01},
    )
    chat_steps(alone, optimizer, range(STEPS), lambda t: t, False)
    whole = ranks.run(3, chat, how, 0, STEPS, str(tmp_path))
    for found in whole:
        assert_same(found, whole[0])
        assert_near(found, parameters(alone), 0.03)
    ranks.run(3, chat, how, 0, HALF, str(tmp_path))
    for found in ranks.run(3, chat, how, HALF, STEPS, str(tmp_path)):
        assert_same(found, whole[0])
    for size in (4, 2):
        for found in ranks.run(size, chat, how, HALF, STEPS, str(tmp_path)):
            assert_near(found, whole[0], 0.03)


# -------------------------------------------------------------------------------------------------------- pipeline


class Stage(nn.Module):
    """The embedding and a layer, or a layer and the head, under the names that they have in the model."""

    def __init__(self, model: Model, index: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): model.layers[index]})
        self.embed, self.lm_head = (model.embed, None) if index == 0 else (None, model.lm_head)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.lm_head is None else self.lm_head(x)


def clip(model: nn.Module, most: float, group: dist.ProcessGroup | None = None) -> None:
    """By the norm over all stages."""
    norms = [full(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    squares = torch.stack(norms).square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    for p in model.parameters():
        p.grad.mul_(min(1.0, most / float(squares.sqrt())))  # type: ignore[union-attr]


def piped(start: int, stop: int, folder: str) -> dict[str, Tensor]:
    """As `titan`, two stages of two ranks each; returns the parameters of this rank's stage."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    index, data, stages = both.get_local_rank("stage"), both.get_local_rank("data"), both["stage"].get_group()
    model = Stage(fresh(), index)
    fully_shard(model, mesh=both["data"])
    optimizer = optimizer_of(model)
    scheduled = warm_up(optimizer)
    stage = PipelineStage(model, index, 2, torch.device("cpu"), group=stages)
    pipeline = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_of)
    # Lists of groups, which both stages have, would be saved under one name.
    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def state() -> dict[str, Any]:
        found = get_optimizer_state_dict(model, optimizer, options=flat)
        return {"model": get_model_state_dict(model), "optimizer": found}

    if start:
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder)
        set_model_state_dict(model, loaded["model"])
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=flat)
        scheduled = LambdaLR(optimizer, scheduled.lr_lambdas, last_epoch=start - 1)
    for step in range(start, stop):
        tokens, targets = (t.chunk(2)[data] for t in batch(step))
        if index == 0:
            pipeline.step(tokens)
        else:
            pipeline.step(target=targets, losses=[])
        clip(model, 0.5, stages)
        optimizer.step()
        scheduled.step()
        optimizer.zero_grad()
    if stop < STEPS:
        dcp.save(state(), checkpoint_id=folder)
    return parameters(model)


@needs.cpu_kernels
def test_a_pipelines(ranks: World, tmp_path: Path) -> None:
    """Each stage has an optimizer of its own; names are those of the model, so checkpoints are."""
    alone = fresh()
    optimizer = optimizer_of(alone)
    schedule = warm_up(optimizer)
    for step in range(STEPS):
        tokens, targets = batch(step)
        loss_of(alone(tokens), targets).backward()
        clip(alone, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    whole = ranks.run(4, piped, 0, STEPS, "")
    together = copy.copy(whole[0]) | whole[2]
    assert_near(together, parameters(alone), 0.03)
    ranks.run(4, piped, 0, HALF, str(tmp_path))
    for found, expected in zip(ranks.run(4, piped, HALF, STEPS, str(tmp_path)), whole, strict=True):
        assert_same(found, expected)
