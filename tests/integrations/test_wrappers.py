"""Wrappers of torch.distributed.optim around these optimizers, on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import ADAMW, CASES, MUON, assert_same, build, matrices, parameters, through_disk, train
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from world import World

from muon_kernels import Muon, MuonAdamW, param_groups


def redundant(case: str, view: bool) -> tuple[DistributedDataParallel, ZeroRedundancyOptimizer]:
    torch.manual_seed(0)
    model = CASES[case][0]()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
    if case == "Muon":
        return wrapped, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Muon, **MUON)
    groups = param_groups(model, muon_options=MUON, adamw_options=ADAMW)
    return wrapped, ZeroRedundancyOptimizer(groups, optimizer_class=MuonAdamW)


def with_zero(case: str, view: bool) -> tuple[dict[str, Tensor], Any]:
    model, optimizer = redundant(case, view)
    train(model, optimizer, range(2))
    optimizer.consolidate_state_dict(to=0)
    state = optimizer.state_dict() if dist.get_rank() == 0 else None
    state = dist_object(state)
    again, own = redundant(case, view)
    again.load_state_dict(model.state_dict())
    own.load_state_dict(state)
    train(model, optimizer, range(2, 4))
    train(again, own, range(2, 4))
    assert_same(parameters(again), parameters(model))
    return parameters(model.module), state


def dist_object(value: Any) -> Any:
    """Rank 0's, on every rank, as from a file."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return through_disk(values[0])


@pytest.mark.parametrize("view", [False, True], ids=["copied", "view"])
@pytest.mark.parametrize("case", CASES)
def test_zero_redundancy(case: str, view: bool, ranks: World) -> None:
    """Each rank steps a part of the parameters: the same weights and state as one process, also when resumed."""
    model, optimizer = build(case)
    train(model, optimizer, range(2))
    state = through_disk(optimizer.state_dict())["state"]
    train(model, optimizer, range(2, 4))
    for weights, consolidated in ranks.run(2, with_zero, case, view):
        assert_same(weights, parameters(model))
        assert_same(consolidated["state"], state)


def zero_with_options_for_both() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = CASES["MuonAdamW"][0]()
    optimizer = ZeroRedundancyOptimizer(
        param_groups(model), optimizer_class=MuonAdamW, muon_options=MUON, adamw_options=ADAMW
    )
    train(model, optimizer, range(2))
    return parameters(model)


def test_zero_redundancy_passes_options_of_both_halves(ranks: World) -> None:
    model, optimizer = build("MuonAdamW")
    train(model, optimizer, range(2))
    for weights in ranks.run(2, zero_with_options_for_both):
        assert_same(weights, parameters(model))


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
