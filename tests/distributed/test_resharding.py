"""Training goes on from a checkpoint of other ranks, of one process, and back, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import World
from test_layouts import CONTEXT, LAYOUTS, full, groups_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muon_kernels import Muon, MuonAdamW, SpectralAdam
from muon_kernels.cli.demo import GPT


def build(layout: str, **options: Any) -> tuple[nn.Module, MuonAdamW]:
    torch.manual_seed(0)
    model: nn.Module = GPT(40, 1, 4, CONTEXT)
    if options.get("master_weights"):
        model = model.bfloat16()
    if layout != "one":
        model = LAYOUTS[layout](model)
    shared = {"process_group": dist.group.WORLD} if layout == "ddp" else {}
    return model, MuonAdamW(groups_of(model, **options), muon_options=shared)


def give(model: nn.Module, step: int) -> None:
    """The same gradients in every layout."""
    for i, p in enumerate(model.parameters()):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i)).to(p.dtype)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = grad


def train(layout: str, start: int, stop: int, folder: str, **options: Any) -> dict[str, Tensor]:
    """Steps start..stop; from the checkpoint in `folder` unless they are the first, to one there unless the last."""
    model, optimizer = build(layout, **options)
    if start:
        state: dict[str, Any] = {"model": get_model_state_dict(model)}
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for step in range(start, stop):
        give(model, step)
        optimizer.step()
    if stop < 4:
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder)
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    found = {name: full(p.detach()) for name, p in named.items() if name.startswith("layers") and p.ndim == 2}
    for name in list(found):
        if (lower := optimizer.state[named[name]].get("mantissa")) is not None:
            found[f"{name}'s mantissa"] = full(lower.int())  # gloo has no int16
    return found


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("fsdp", 4), ("fsdp", 2)),
        (("fsdp", 2), ("fsdp", 3)),
        (("fsdp", 2), ("one", 1)),
        (("one", 1), ("fsdp", 3)),
        (("hsdp", 4), ("ddp", 2)),
        (("ddp", 3), ("ddp", 2)),
        (("ddp", 2), ("one", 1)),
        (("one", 1), ("ddp", 2)),
        (("fsdp and tp", 4), ("tp", 2)),
        (("tp", 4), ("fsdp", 3)),
    ],
    ids=lambda what: f"{what[0]}-{what[1]}",
)
def test_resharding(ranks: World, saved: tuple[str, int], loaded: tuple[str, int], tmp_path: Path) -> None:
    ranks.run(saved[1], train, saved[0], 0, 2, str(tmp_path))
    expected = ranks.run(1, train, "one", 0, 4, str(tmp_path))[0]
    for found in ranks.run(loaded[1], train, loaded[0], 2, 4, str(tmp_path)):
        assert found.keys() == expected.keys() and len(found) == 4
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def train_masters(layout: str, start: int, stop: int, folder: str) -> dict[str, Tensor]:
    return train(layout, start, stop, folder, master_weights=True, lr=1e-4)


@pytest.mark.parametrize("saved", ["fsdp", "ddp"])
def test_resharding_of_masters(ranks: World, saved: str, tmp_path: Path) -> None:
    """Steps are smaller than bf16 shows: without their lower halves, masters would not be these."""
    ranks.run(2, train_masters, saved, 0, 2, str(tmp_path))
    expected = ranks.run(1, train_masters, "one", 0, 4, str(tmp_path))[0]
    assert len(expected) == 8
    for layout, size in (("fsdp", 3), ("ddp", 2), ("one", 1)):
        for found in ranks.run(size, train_masters, layout, 2, 4, str(tmp_path)):
            assert found.keys() == expected.keys()
            for name in found:
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def train_norm(layout: str, start: int, stop: int, folder: str, form: str) -> dict[str, Tensor]:
    return train(layout, start, stop, folder, second_moment=form)


@pytest.mark.parametrize("form", ["neuron", "element"])
def test_resharding_of_second_moments(ranks: World, form: str, tmp_path: Path) -> None:
    """Sums of whole rows are in the order of one process; those of elements of parts only nearly to the bit."""
    ranks.run(2, train_norm, "fsdp", 0, 2, str(tmp_path), form)
    expected = ranks.run(1, train_norm, "one", 0, 4, str(tmp_path), form)[0]
    for layout, size in (("fsdp", 3), ("one", 1)):
        for found in ranks.run(size, train_norm, layout, 2, 4, str(tmp_path), form):
            for name in found:
                atol = 0 if form == "neuron" else 2e-4
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol, msg=name)


def eight_bits(layout: str, start: int, stop: int, folder: str) -> list[Tensor]:
    """Steps start..stop with int8 momentum, from and to a checkpoint; no cut to two or four divides a block."""
    whole = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate([(256, 128), (128, 128)])]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place = lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) if layout == "rows" else t.clone()
    params = [nn.Parameter(place(t)) for t in whole]
    shared = {"process_group": dist.group.WORLD} if layout == "ddp" else {}
    optimizer = Muon(params, lr=0.1, momentum_dtype=torch.int8, **shared)
    if start:
        optimizer.init_state()
        state = {"params": [p.data for p in params], "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        optimizer.load_state_dict(state["optimizer"])
    for step in range(start, stop):
        for i, p in enumerate(params):
            p.grad = place(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)))
        optimizer.step()
        assert all(kept["momentum_buffer"].dtype == torch.int8 for kept in optimizer.state.values())
    if stop < 4:
        dcp.save({"params": [p.data for p in params], "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    return [full(p.detach()) for p in params]


def test_resharding_of_int8_momentum(ranks: World, tmp_path: Path) -> None:
    """To the bit between cuts and between replicas; between a cut and none it is refused by name."""
    expected = ranks.run(1, eight_bits, "one", 0, 4, str(tmp_path / "none"))[0]
    for saved, size, others in (("rows", 2, (("rows", 4),)), ("ddp", 2, (("ddp", 3), ("one", 1)))):
        folder = str(tmp_path / saved)
        ranks.run(size, eight_bits, saved, 0, 2, folder)
        for layout, count in others:
            for found in ranks.run(count, eight_bits, layout, 2, 4, folder):
                assert all(map(torch.equal, found, expected)), layout
    for saved, size, layout, key in (("rows", 1, "one", "momentum_buffer"), ("ddp", 2, "rows", "momentum_values")):
        for returned, said in ranks.outcomes(size, eight_bits, layout, 2, 4, str(tmp_path / saved)):
            assert not returned and "Missing key in checkpoint state_dict" in said and key in said


def eight_bits_again(layout: str) -> list[bool]:
    """Whether int8 momentum that is loaded is saved, before any step, with the values that it has; and then steps."""

    def build() -> tuple[list[nn.Parameter], Muon]:
        whole = [torch.randn(s, generator=torch.Generator().manual_seed(sum(s))) for s in [(50, 70), (70, 50)]]
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        place = lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) if layout == "rows" else t
        shared = {"process_group": dist.group.WORLD} if layout == "ddp" else {}
        params = [nn.Parameter(place(t)) for t in whole]
        return params, Muon(params, lr=0.1, momentum_dtype=torch.int8, **shared)

    def step(params: list[nn.Parameter], optimizer: Muon) -> None:
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.1 * (i + 1))
        optimizer.step()

    params, optimizer = build()
    for _ in range(3):
        step(params, optimizer)
    saved, found = copy.deepcopy(optimizer.state_dict()), []
    for _ in range(2):  # loaded, saved, loaded, saved
        others, other = build()
        for p, q in zip(others, params, strict=True):
            p.data.copy_(q.data)
        other.load_state_dict(saved)
        again = copy.deepcopy(other.state_dict())
        pairs = [(a, again["state"][i].get(key)) for i, of in saved["state"].items() for key, a in of.items()]
        found += [
            bool(pairs),
            all(b is not None and a.dtype == b.dtype and torch.equal(full(a), full(b)) for a, b in pairs),
        ]
        saved = again
    step(params, optimizer)
    step(others, other)
    return [*found, all(torch.equal(full(p.detach()), full(q.detach())) for p, q in zip(params, others, strict=True))]


@pytest.mark.parametrize("layout", ["one", "rows", "ddp"])
def test_int8_momentum_keeps_its_values(ranks: World, layout: str) -> None:
    """Also where no step has made codes of the numbers in between."""
    size = 1 if layout == "one" else 2
    assert ranks.run(size, eight_bits_again, layout) == [[True] * 5] * size


def adam(layout: str) -> tuple[list[nn.Parameter], SpectralAdam]:
    """Matrices and a vector, before a first step."""
    shapes = [(24, 40), (40, 24), (16, 16), (7,), (24, 40), (2, 8, 8)]
    params = [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)]
    shared = {"process_group": dist.group.WORLD} if layout == "ddp" else {}
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    return params, SpectralAdam(named, lr=0.1, **shared)


def adam_steps(params: list[nn.Parameter], optimizer: SpectralAdam, start: int, stop: int) -> None:
    for step in range(start, stop):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()


def checkpoint_of_adam() -> list[bool]:
    """A checkpoint under DDP against one process's; training from it on these ranks and on one; the state kept."""
    one, alone = adam("one")
    params, optimizer = adam("ddp")
    for tensors, each in ((one, alone), (params, optimizer)):
        adam_steps(tensors, each, 0, 2)
    kept = sum("exp_avg" in s for s in optimizer.state.values())
    saved, expected = copy.deepcopy(optimizer.state_dict()), alone.state_dict()
    same = saved["state"].keys() == expected["state"].keys() and all(
        own.keys() == saved["state"][i].keys()
        and all(
            torch.equal(t, saved["state"][i][key]) and t.device == saved["state"][i][key].device
            for key, t in own.items()
        )
        for i, own in expected["state"].items()
    )
    found = [same, 1 < kept < len(params), kept == sum("exp_avg" in s for s in optimizer.state.values())]
    adam_steps(one, alone, 2, 4)
    for layout in ("ddp", "one"):
        tensors, other = adam(layout)
        for p, q in zip(tensors, params, strict=True):
            p.data.copy_(q)
        other.load_state_dict(saved)
        if layout == "ddp":
            found.append(kept == sum("exp_avg" in s for s in other.state.values()))
        adam_steps(tensors, other, 2, 4)
        found.append(all(map(torch.equal, tensors, one)))
    try:
        copy.deepcopy(optimizer)
    except TypeError as error:
        found.append("should not be copied" in str(error))
    optimizer.param_groups[0]["power"] = 1.0
    try:
        optimizer.step()
    except ValueError as error:
        found.append("power should not become 1" in str(error))
    return found


def test_moments_of_an_owner(ranks: World) -> None:
    """SpectralAdam under DDP: each matrix's moments are one rank's, and a checkpoint has them all."""
    assert ranks.run(3, checkpoint_of_adam) == [[True] * 8] * 3


def plain_checkpoint() -> tuple[bool, bool]:
    """state_dict() under DDP, saved by torch and loaded on every rank again, and by one process."""
    model, optimizer = build("ddp")
    give(model, 0)
    optimizer.step()
    held = len([s for s in optimizer.state.values() if "momentum_buffer" in s])
    saved = copy.deepcopy(optimizer.state_dict())
    assert len([s for s in optimizer.state.values() if "momentum_buffer" in s]) == held  # as it was
    whole = len([s for s in saved["state"].values() if "momentum_buffer" in s])
    again, alone = build("ddp"), build("one")
    outcomes = []
    for other, theirs in (again, alone):
        other.load_state_dict(
            {
                key.removeprefix("" if other is again[0] else "module."): value
                for key, value in model.state_dict().items()
            }
        )
        theirs.load_state_dict(copy.deepcopy(saved))  # torch.optim.AdamW takes tensors over
    give(model, 1)
    optimizer.step()
    for other, theirs in (again, alone):
        give(other, 1)
        theirs.step()
        outcomes.append(all(map(torch.equal, model.parameters(), other.parameters())))
    kept = len([s for s in again[1].state.values() if "momentum_buffer" in s])
    return all(outcomes), whole == 4 and held == kept < 4


def test_a_plain_checkpoint_of_replicas(ranks: World) -> None:
    assert ranks.run(2, plain_checkpoint) == [(True, True)] * 2
