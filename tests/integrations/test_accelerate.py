"""accelerate in one process, and its FSDP2 on two ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from tiny import CASES, another_accelerator, assert_near, assert_same, build, gathered, loss_of, matrices, parameters
from torch import nn
from torch.optim import Optimizer

from muon_kernels import Muon

pytest.importorskip("accelerate")


def accelerator(**options: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True, **options)


def run(accelerator: Any, model: nn.Module, optimizer: Any, steps: range, clip: float = 0.05) -> None:
    for step in steps:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


def by_hand(model: nn.Module, optimizer: Optimizer, steps: range, accumulate: int, clip: float = 0.05) -> None:
    for first in range(steps.start, steps.stop, accumulate):
        for step in range(first, first + accumulate):
            (loss_of(model, step) / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_by_hand(case: str, accumulate: int) -> None:
    a = accelerator(gradient_accumulation_steps=accumulate)
    model, optimizer = build(case)
    prepared = a.prepare(model, optimizer)
    run(a, *prepared, range(4))
    plain, own = build(case)
    by_hand(plain, own, range(4), accumulate)
    assert_same(parameters(model), parameters(plain))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_is_that_of_torchs_muon(precision: str) -> None:
    models = []
    for optimizer in (Muon, torch.optim.Muon):
        another_accelerator()
        a = accelerator(mixed_precision=precision, gradient_accumulation_steps=2)
        model, made = matrices(optimizer)
        run(a, *a.prepare(model, made), range(6))
        models.append(model)
    assert_near(*models, matrices(Muon)[0], most=0.03 if precision == "no" else 0.06)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_save_state_and_load_state(case: str, precision: str, tmp_path: Path) -> None:
    a = accelerator(mixed_precision=precision)
    model, inner = build(case)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(inner, 10)
    prepared, optimizer, schedule = a.prepare(model, inner, scheduler)

    def advance(steps: range) -> None:
        for step in steps:
            run(a, prepared, optimizer, range(step, step + 1))
            schedule.step()

    advance(range(2))
    a.save_state(str(tmp_path))
    advance(range(2, 4))
    expected, state = parameters(model), inner.state_dict()
    rates = [group["lr"] for group in inner.param_groups]

    another_accelerator()
    a = accelerator(mixed_precision=precision)
    model, inner = build(case, seed=1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(inner, 10)
    prepared, optimizer, schedule = a.prepare(model, inner, scheduler)
    a.load_state(str(tmp_path))
    advance(range(2, 4))
    assert_same(parameters(model), expected)
    assert_same(inner.state_dict(), state)
    assert [group["lr"] for group in inner.param_groups] == rates


# On two ranks.


def sharding(kind: str) -> Any:
    """An Accelerator of FSDP2; it asks for a GPU, and only its name is needed."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import DistributedType, PartialState

    another_accelerator()
    os.environ.update(
        RANK=str(dist.get_rank()),
        LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
    )
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        state_dict_type=kind,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def prepared(case: str, kind: str, seed: int = 0) -> tuple[Any, nn.Module, Any]:
    a = sharding(kind)
    model, optimizer = build(case, seed)
    model, optimizer = a.prepare(model, optimizer)
    return a, model, optimizer


def sharded(case: str, kind: str, folder: str) -> dict[str, torch.Tensor]:
    a, model, optimizer = prepared(case, kind)
    run(a, model, optimizer, range(2))
    a.save_state(folder)
    run(a, model, optimizer, range(2, 4))
    a2, again, own = prepared(case, kind, seed=1)
    a2.load_state(folder)
    run(a2, again, own, range(2, 4))
    assert_same(gathered(parameters(again)), gathered(parameters(model)))
    assert_same(gathered(own.optimizer.state_dict()["state"]), gathered(optimizer.optimizer.state_dict()["state"]))
    return gathered(parameters(model))


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
@pytest.mark.parametrize("case", CASES)
def test_fsdp2(case: str, kind: str, ranks: World, tmp_path: Path) -> None:
    """Resumed to the bit from either kind of checkpoint, and where one process goes."""
    plain, own = build(case)
    by_hand(plain, own, range(4), 1)
    for found in ranks.run(2, sharded, case, kind, str(tmp_path)):
        for name, p in parameters(plain).items():
            torch.testing.assert_close(found[name], p, rtol=1e-2, atol=1e-3)
