"""torch.distributed.checkpoint's state dicts of an optimizer, with every option, and its checkpoints on disk."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import World
from tiny import CASES, assert_same, assert_same_training, build, gathered, loss_of, parameters, through_disk, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

FLAGS = (
    "full_state_dict",
    "cpu_offload",
    "ignore_frozen_params",
    "keep_submodule_prefixes",
    "strict",
    "flatten_optimizer_state_dict",
)
COMBINATIONS = [dict(zip(FLAGS, flags, strict=True)) for flags in itertools.product((False, True), repeat=len(FLAGS))]


def loadable(options: dict[str, bool]) -> dict[str, bool]:
    """torch cannot set what is full and flat, see below; where nothing is sharded, full may be left out."""
    full_and_flat = options["full_state_dict"] and options["flatten_optimizer_state_dict"]
    return {**options, "full_state_dict": False} if full_and_flat else options


def test_torch_cannot_set_what_is_full_and_flat() -> None:
    """Not of its own AdamW either: once this fails, `loadable` can go."""
    model, _ = build("Muon")
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
    with pytest.raises(KeyError, match="param_groups"):
        set_optimizer_state_dict(
            model, optimizer, get_optimizer_state_dict(model, optimizer, options=options), options=options
        )


@pytest.mark.filterwarnings("ignore:.*keep_submodule_prefixes")
@pytest.mark.parametrize(
    "options", COMBINATIONS, ids=lambda options: "-".join(k for k in FLAGS if options[k]) or "none"
)
@pytest.mark.parametrize("case", CASES)
def test_every_option_in_one_process(case: str, options: dict[str, bool]) -> None:
    whole, optimizer = build(case)
    train(whole, optimizer, range(2))
    saved = through_disk(get_optimizer_state_dict(whole, optimizer, options=StateDictOptions(**options)))
    model, again = build(case, seed=1)
    model.load_state_dict(whole.state_dict())
    before = parameters(model)
    set_optimizer_state_dict(model, again, saved, options=StateDictOptions(**loadable(options)))
    assert_same(parameters(model), before, "weights moved by loading the optimizer")
    train(whole, optimizer, range(2, 4))
    train(model, again, range(2, 4))
    assert_same_training(model, again, whole, optimizer)


@pytest.mark.parametrize("form", ["decoupled", "independent", "scheduled"])
def test_asking_a_fresh_optimizer_moves_no_weight(form: str) -> None:
    """torch makes the state of a fresh optimizer by a step with lr = 0."""
    for case in CASES:
        model, optimizer = build(case)
        for group in optimizer.param_groups:
            if "weight_decay_form" in group:
                group["weight_decay_form"] = form
        before = parameters(model)
        get_optimizer_state_dict(model, optimizer)
        assert_same(parameters(model), before)


@pytest.mark.parametrize("case", CASES)
def test_template_before_the_first_step(case: str, tmp_path: Path) -> None:
    """`init_state()` makes every key that a checkpoint has; dcp.load fills in such a state_dict() to the bit."""
    whole, optimizer = build(case)
    train(whole, optimizer, range(2))
    dcp.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path, no_dist=True)

    model, again = build(case, seed=1)
    again.init_state()
    template = {"model": model.state_dict(), "optimizer": again.state_dict()}
    assert {i: kept.keys() for i, kept in template["optimizer"]["state"].items()} == {
        i: kept.keys() for i, kept in optimizer.state_dict()["state"].items()
    }
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(template["model"])
    again.load_state_dict(template["optimizer"])
    train(whole, optimizer, range(2, 4))
    train(model, again, range(2, 4))
    assert_same_training(model, again, whole, optimizer)


@pytest.mark.parametrize("case", CASES)
def test_init_state_is_no_step(case: str) -> None:
    """The first step after it is the first step without."""
    (model, optimizer), (plain, own) = build(case), build(case)
    before = parameters(model)
    optimizer.init_state()
    assert_same(parameters(model), before)
    train(model, optimizer, range(2))
    train(plain, own, range(2))
    assert_same_training(model, optimizer, plain, own)


@pytest.mark.parametrize("case", CASES)
def test_dcp_by_get_and_set(case: str, tmp_path: Path) -> None:
    whole, optimizer = build(case)
    train(whole, optimizer, range(2))
    weights, state = get_state_dict(whole, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    model, again = build(case, seed=1)
    weights, state = get_state_dict(model, again)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(model, again, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(whole, optimizer, range(2, 4))
    train(model, again, range(2, 4))
    assert_same_training(model, again, whole, optimizer)


# On two ranks.


def sharded(case: str, seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    make_model, make_optimizer = CASES[case]
    model = make_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, make_optimizer(model)


def resumed_on_ranks(case: str, flags: dict[str, bool], broadcast: bool) -> None:
    model, optimizer = sharded(case)
    train(model, optimizer, range(2))
    options = StateDictOptions(**flags)
    weights = get_model_state_dict(model, options=options)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    if not flags["full_state_dict"] and not flags["cpu_offload"]:
        assert any(isinstance(v, DTensor) for v in _leaves(saved))
    if flags["full_state_dict"] and flags["cpu_offload"] and dist.get_rank() > 0:
        assert not saved  # torch gives rank 0 everything, and the others nothing
    saved, weights = copy.deepcopy((saved, weights))
    train(model, optimizer, range(2, 4))

    again, own = sharded(case, seed=1)
    options = StateDictOptions(**flags, broadcast_from_rank0=broadcast)
    set_model_state_dict(again, weights, options=options)
    before = gathered(parameters(again))
    set_optimizer_state_dict(again, own, saved, options=options)
    assert_same(gathered(parameters(again)), before)
    train(again, own, range(2, 4))
    assert_same(gathered(parameters(again)), gathered(parameters(model)))
    assert_same(gathered(own.state_dict()), gathered(optimizer.state_dict()))


def _leaves(value: Any) -> list[Any]:
    return [x for v in value.values() for x in _leaves(v)] if isinstance(value, dict) else [value]


ON_RANKS = [
    (full, offload, flat, broadcast)
    for full, offload, flat in itertools.product((False, True), repeat=3)
    for broadcast in (False, True)
    # torch broadcasts full ones only, gives full and offloaded ones to rank 0 only, and cannot set full and flat ones.
    if (full if broadcast else not (full and offload)) and not (full and flat)
]


@pytest.mark.parametrize("full, offload, flat, broadcast", ON_RANKS)
@pytest.mark.parametrize("case", CASES)
def test_every_option_on_two_ranks(
    case: str, full: bool, offload: bool, flat: bool, broadcast: bool, ranks: World
) -> None:
    flags = {"full_state_dict": full, "cpu_offload": offload, "flatten_optimizer_state_dict": flat}
    ranks.run(2, resumed_on_ranks, case, flags, broadcast)


def template_on_ranks(case: str, folder: str) -> None:
    model, optimizer = sharded(case)
    train(model, optimizer, range(2))
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    train(model, optimizer, range(2, 4))
    again, own = sharded(case, seed=1)
    own.init_state()
    template = {"model": again.state_dict(), "optimizer": own.state_dict()}
    dcp.load(template, checkpoint_id=folder)
    again.load_state_dict(template["model"])
    own.load_state_dict(template["optimizer"])
    train(again, own, range(2, 4))
    assert_same(gathered(parameters(again)), gathered(parameters(model)))
    assert_same(gathered(own.state_dict()), gathered(optimizer.state_dict()))


@pytest.mark.parametrize("case", CASES)
def test_template_on_two_ranks(case: str, ranks: World, tmp_path: Path) -> None:
    ranks.run(2, template_on_ranks, case, str(tmp_path))


def sharded_training(case: str) -> tuple[Any, float]:
    model, optimizer = sharded(case)
    train(model, optimizer, range(3))
    return gathered(parameters(model)), loss_of(model, 3).item()


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_is_that_of_one_process(case: str, ranks: World) -> None:
    """Every rank has the same batch: gradients, and with them steps, are those of one process."""
    model, optimizer = build(case)
    train(model, optimizer, range(3))
    for found, _ in ranks.run(2, sharded_training, case):
        for name, p in parameters(model).items():
            torch.testing.assert_close(found[name], p, rtol=1e-3, atol=1e-3)
