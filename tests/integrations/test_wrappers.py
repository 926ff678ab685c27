"""Wrappers of torch.distributed.optim around these optimizers, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from tiny import ADAMW, CASES, MUON, assert_same, build, matrices, parameters, through_disk, train
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, param_groups


def replicated(case: str) -> tuple[DistributedDataParallel, Optimizer]:
    model, optimizer = build(case)
    return DistributedDataParallel(model), optimizer


def redundant(case: str, view: bool) -> tuple[DistributedDataParallel, ZeroRedundancyOptimizer]:
    model, _ = build(case)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    if case == "Muon":
        return wrapped, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Muon, **MUON)
    groups = param_groups(model, muon_options=MUON, adamw_options=ADAMW)
    return wrapped, ZeroRedundancyOptimizer(groups, optimizer_class=MuonAdamW)


def with_zero(case: str, view: bool) -> None:
    plain, whole = replicated(case)
    train(plain, whole, range(2))
    model, optimizer = redundant(case, view)
    train(model, optimizer, range(2))
    assert_same(parameters(model), parameters(plain))

    optimizer.consolidate_state_dict(to=0)
    state = from_first(optimizer.state_dict() if dist.get_rank() == 0 else None)
    assert_same(state["state"], whole.state_dict()["state"])
    again, own = redundant(case, view)
    again.load_state_dict(model.state_dict())
    own.load_state_dict(state)
    train(plain, whole, range(2, 4))
    train(again, own, range(2, 4))
    assert_same(parameters(again), parameters(plain))


def from_first(value: Any) -> Any:
    """Rank 0's, on every rank, as from a file."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return through_disk(values[0])


@pytest.mark.parametrize("view", [False, True], ids=["copied", "view"])
@pytest.mark.parametrize("case", CASES)
def test_zero_redundancy(case: str, view: bool, ranks: World) -> None:
    """Each rank steps a part of the parameters: weights and state are those of an optimizer that steps all."""
    ranks.run(2, with_zero, case, view)


def zero_with_options_for_both() -> None:
    plain, whole = replicated("MuonAdamW")
    model = CASES["MuonAdamW"][0]()
    model.load_state_dict(plain.module.state_dict())
    optimizer = ZeroRedundancyOptimizer(
        param_groups(model), optimizer_class=MuonAdamW, muon_options=MUON, adamw_options=ADAMW
    )
    train(plain, whole, range(2))
    train(model, optimizer, range(2))
    assert_same(parameters(model), parameters(plain.module))


def test_zero_redundancy_passes_options_of_both_halves(ranks: World) -> None:
    ranks.run(2, zero_with_options_for_both)


def averaged(case: str, by_hand: bool) -> dict[str, Tensor]:
    """Every rank trains on batches of its own; their weights are averaged every second step."""
    model, optimizer = build(case)
    if not by_hand:
        averager = PeriodicModelAverager(period=2, warmup_steps=0)
        optimizer = PostLocalSGDOptimizer(optimizer, averager)
    for step in range(5):
        train(model, optimizer, [2 * step + dist.get_rank()])
        if by_hand and step % 2 == 0:
            for p in model.parameters():
                dist.all_reduce(p.data.div_(dist.get_world_size()))
        if step == 2 and not by_hand:
            optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    return parameters(model)


@pytest.mark.parametrize("case", CASES)
def test_post_local_sgd(case: str, ranks: World) -> None:
    for found, expected in zip(ranks.run(2, averaged, case, False), ranks.run(2, averaged, case, True), strict=True):
        assert_same(found, expected)


def data_parallel(optimizer_class: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = matrices(optimizer_class)
    before = parameters(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for step in range(3):
        train(wrapped, optimizer, [2 * step + dist.get_rank()])
    return before, parameters(model)


def test_data_parallel_is_that_of_torchs_muon(ranks: World) -> None:
    ours, theirs = ranks.run(2, data_parallel, Muon), ranks.run(2, data_parallel, torch.optim.Muon)
    assert_same(ours[0], ours[1])
    for name, start in ours[0][0].items():
        found, expected = ours[0][1][name], theirs[0][1][name]
        assert (found - expected).norm() <= 0.03 * (expected - start).norm()
