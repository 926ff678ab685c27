"""Momentum of any dtype on several ranks is stepped as in one process, or refused before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import needs
from ranks import World
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muon_kernels import Muon

SHAPES = [(24, 40), (24, 40), (9, 5), (24, 40)]


def whole(t: Tensor) -> Tensor:
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def tensors(seed: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=numbers) for shape in SHAPES]


def stepped(layout: str, loaded: torch.dtype | None, options: dict[str, Any]) -> list[Tensor] | str:
    """Parameters after two steps, or an error; the momenta of the first two may be `loaded`."""
    if layout == "rows":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    place = lambda t: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) if layout == "rows" else t
    params, momenta, grads = [torch.nn.Parameter(place(t)) for t in tensors(0)], tensors(1), tensors(2)
    if layout == "group":
        options = {**options, "process_group": dist.group.WORLD}
    optimizer = Muon(params, lr=0.1, **options)
    if loaded is not None:
        saved = optimizer.state_dict()
        saved["state"] = {i: {"momentum_buffer": place(momenta[i].to(loaded))} for i in range(2)}
        optimizer.load_state_dict(saved)
    for p, grad in zip(params, grads, strict=True):
        p.grad = place(grad)
    before = list(map(whole, params))
    try:
        optimizer.step()
        optimizer.step()
    except ValueError as error:
        assert all(map(torch.equal, before, map(whole, params)))
        return str(error)
    return list(map(whole, params))


@needs.cpu_kernels
@pytest.mark.parametrize("layout", ["group", "rows"])
def test_any_dtype(ranks: World, layout: str) -> None:
    """As in one process "auto" takes "eager", which rounds slices twice, where "cpu" cannot take the momentum."""
    for dtype in (torch.float64, torch.float16):
        expected = stepped("alone", None, {"momentum_dtype": dtype})
        for found in ranks.run(2, stepped, layout, None, {"momentum_dtype": dtype}):
            for p, own, before in zip(found, expected, tensors(0), strict=True):
                assert float((p - own).norm() / (own - before).norm()) <= (0 if layout == "group" else 0.02)
        for said in ranks.run(2, stepped, layout, None, {"momentum_dtype": dtype, "backend": "cpu"}):
            assert said == stepped("alone", None, {"momentum_dtype": dtype, "backend": "cpu"})
            assert f"backend 'cpu' cannot take these tensors: expected float32 or bfloat16 tensors, got {dtype}" in said


@needs.cpu_kernels
@pytest.mark.parametrize("layout", ["group", "rows"])
def test_momenta_of_two_dtypes(ranks: World, layout: str) -> None:
    """Equal matrices whose momenta are not of one dtype, as after a load: each is read as what it is."""
    expected = stepped("alone", torch.bfloat16, {})
    for found in ranks.run(2, stepped, layout, torch.bfloat16, {}):
        assert all(map(torch.equal, found, expected))


@needs.cpu_kernels
def test_a_loaded_momentum_that_the_backend_cannot_take(ranks: World) -> None:
    """Its owner alone knows of it; all ranks take another backend if they are told."""
    for said in ranks.run(2, stepped_or_refused, torch.float64):
        assert "momentum_buffer should be of torch.float32, which the other ranks take it to be of" in said
        assert "set momentum_dtype to torch.float64" in said
    expected = stepped("alone", torch.float64, {"momentum_dtype": torch.float64})
    for found in ranks.run(2, stepped, "group", torch.float64, {"momentum_dtype": torch.float64}):
        assert all(map(torch.equal, found, expected))


def stepped_or_refused(loaded: torch.dtype) -> list[Tensor] | str:
    try:
        return stepped("group", loaded, {})
    except RuntimeError as error:  # of the rank that does not own the momentum
        return str(error)
