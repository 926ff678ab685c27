"""ZeRO-1 on flat slices: Muon and AdamW of the mean gradient, against one process and float64.

Ranks run functions of this module, see ranks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks import needs
from ranks import World
from test_strategies import alone, normal, params_of, traffic
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from muon_kernels.checks.yardsticks import relative_error
from muon_kernels.coefficients import resolve
from muon_kernels.distributed import ZeroMuon
from muon_kernels.reference import muon_step

# None of whose sizes is a multiple of another: slices begin and end inside matrices.
ZERO = [(20, 30), (7, 11), (3, 8, 10), (6, 2, 3, 3), (50, 13), (1, 5)]
ZERO_OPTIONS = {"lr": 0.1, "weight_decay": 0.1, "backend": "cpu"}


def gradient(shape: Sequence[int], index: int, step: int, rank: int) -> Tensor:
    return normal(*shape, seed=1000 * index + 10 * step + rank)


def params_for(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Parameter]:
    return [Parameter(normal(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def zero_stepped(
    shapes: Sequence[Sequence[int]], steps: int, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[list[Tensor], list[dict[str, Tensor]], list[tuple[str, int]], int]:
    """Parameters, whole states of both groups, and traffic of the last step; gradients are each rank's own."""
    params = params_for(shapes, dtype)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.05}]
    optimizer = ZeroMuon([group for group in groups if group["params"]], **options)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(p.shape, i, step, dist.get_rank()).to(dtype)
        with traffic() as found:
            optimizer.step()
    states = [{key: t.full_tensor() for key, t in state.items()} for state in optimizer.state.values()]
    return [p.detach() for p in params], states, found, optimizer.bytes_sent


def averaged(
    shape: Sequence[int], index: int, steps: int, ranks: int, dtype: torch.dtype, lr: float
) -> tuple[Tensor, Tensor]:
    """Parameter and momentum in float64 by reference.py."""
    W = normal(*shape, seed=index).to(dtype).double()
    rows = shape if len(shape) < 4 else (shape[0], -1)
    M = torch.zeros_like(W).reshape(rows)
    W = W.reshape(rows)
    for step in range(steps):
        g = sum(gradient(shape, index, step, rank).to(dtype).double() for rank in range(ranks)) / ranks
        W, M = muon_step(
            W,
            g.reshape(rows),
            M,
            lr=lr,
            weight_decay=0.1,
            momentum=0.95,
            nesterov=True,
            coefficients=resolve("keller", 5).triples,
            margin=1.0,
            eps=1e-7,
            lr_ratio=max(1, W.shape[-2] / W.shape[-1]) ** 0.5,
        )
    return W, M


@needs.cpu_kernels
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_flat_slices_are_muon_of_the_mean_gradient(ranks: World, size: int) -> None:
    """Slices that cut matrices anywhere, ranks without any of one; the traffic is what it says."""
    for dtype in (torch.float32, torch.bfloat16):
        results = ranks.run(size, zero_stepped, ZERO, 3, dtype, ZERO_OPTIONS)
        first = results[0]
        for params, _, found, expected in results:
            assert all(torch.equal(a, b) for a, b in zip(params, first[0], strict=True))
            assert sum(bytes_ for _, bytes_ in found) == expected
            assert [name for name, _ in found] == ["reduce_scatter", "all_to_all", "all_gather"] * 2
        for index, shape in enumerate(ZERO):
            W, M = averaged(shape, index, 3, size, dtype, 0.05 if index % 2 else 0.1)
            before = normal(*shape, seed=index).to(dtype).double().reshape(W.shape)
            state, group = first[1][index % 2], ZERO[index % 2 :: 2]
            start = sum(torch.Size(s).numel() for s in group[: index // 2])
            momentum = state["momentum_buffer"][start : start + W.numel()].view(W.shape)
            assert relative_error(momentum, M) < 1e-5
            assert ("master_param" in state) == (dtype != torch.float32)
            master = first[0][index] if dtype == torch.float32 else state["master_param"][start : start + W.numel()]
            assert relative_error(master.reshape(W.shape).double() - before, W - before) < 0.03, shape
            assert torch.equal(first[0][index].flatten(), master.flatten().to(dtype))


@needs.cpu_kernels
def test_matrices_are_sent_where_slices_cut_them_only(ranks: World) -> None:
    """Two ranks, each with a matrix: nothing. Three: what the one between has of both, to both and back."""
    for size, expected in ((2, 0), (3, 2 * (200 + 400 + 400 + 200))):
        results = ranks.run(size, zero_stepped, [(20, 30), (1, 1), (20, 30)], 1, torch.float32, ZERO_OPTIONS)
        assert sum(dict(found[:3])["all_to_all"] for _, _, found, _ in results) == expected


@needs.cpu_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"dampened": False},
        {"nesterov": False},
        {"dampened": False, "nesterov": False, "maximize": True},
        {"adjust_lr_fn": "match_rms_adamw", "ns_coefficients": "polar_express", "ns_steps": 8},
        {"flatten": True, "momentum": 0.5},
    ],
    ids=str,
)
def test_options_of_flat_slices_are_muons(ranks: World, options: dict[str, Any]) -> None:
    shapes = ZERO
    params, *_ = ranks.run(3, zero_stepped, shapes, 2, torch.float32, {**ZERO_OPTIONS, **options})[0]
    for index, (p, before) in enumerate(zip(params, params_for(shapes, torch.float32), strict=True)):
        grads = [
            [sum(gradient(p.shape, index, step, rank) for rank in range(3)) / 3]  # type: ignore[list-item]
            for step in range(2)
        ]
        muon = alone([before.detach()], grads, {**ZERO_OPTIONS, **options, "lr": 0.05 if index % 2 else 0.1})
        update = params_of(muon)[0].detach().double() - before.detach()
        assert relative_error(p - before.detach(), update) < 0.03, p.shape


GAPS = [(6, 9), (8, 5), (4, 4)]


def with_gaps(scaled: bool) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Parameters and momentum after each of three steps.

    With all gradients; without one of a parameter, and another only on one rank; where one rank finds no number.
    """
    params = params_for(GAPS, torch.float32)
    optimizer = ZeroMuon(params, lr=0.1, backend="cpu")
    seen: list[list[Tensor]] = []
    momenta = []
    for step, found_inf in enumerate((False, False, dist.get_rank() == 1)):
        for i, p in enumerate(params):
            p.grad = None
            if step != 1 or i == 0 or (i == 2 and dist.get_rank() == 1):
                p.grad = gradient(p.shape, i, step, 0) * (1024.0 if scaled else 1.0)
        optimizer.grad_scale = torch.tensor(1024.0) if scaled else None
        optimizer.found_inf = torch.tensor(float(found_inf))
        optimizer.step()
        seen.append([p.detach().clone() for p in params])
        momenta.append(next(iter(optimizer.state.values()))["momentum_buffer"].full_tensor().clone())
    return seen, momenta


@needs.cpu_kernels
def test_gradients_that_some_ranks_have_not(ranks: World) -> None:
    results = {scaled: ranks.run(3, with_gaps, scaled) for scaled in (False, True)}
    for (all_, some, none), (M_all, M_some, M_none) in results[False] + results[True]:
        for i, (before, after, later) in enumerate(zip(all_, some, none, strict=True)):
            assert torch.equal(before, after) == (i == 1)
            assert torch.equal(after, later)
        assert torch.equal(M_some[54:94], M_all[54:94])
        assert M_all[54:94].any()
        of_one = gradient((4, 4), 2, 1, 0).flatten() / 3
        torch.testing.assert_close(M_some[94:], M_all[94:].lerp(of_one, 0.05))
        assert torch.equal(M_none, M_some)
    for a, b in zip(results[False][0][0][1], results[True][0][0][1], strict=True):
        assert torch.equal(a, b)


def saved_and_loaded(folder: str, save: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """What one more step makes of a checkpoint, which is written first by some other number of ranks."""
    params = params_for(ZERO, dtype)
    optimizer = ZeroMuon(params, **ZERO_OPTIONS)

    def step(number: int) -> None:
        for i, p in enumerate(params):
            p.grad = gradient(p.shape, i, number, 0).to(dtype)
        optimizer.step()

    state = {"optimizer": optimizer.state_dict(), "params": {str(i): p.detach() for i, p in enumerate(params)}}
    if save:
        step(0)
        step(1)
        state["optimizer"] = optimizer.state_dict()
        dcp.save(state, storage_writer=FileSystemWriter(folder))
    else:
        dcp.load(state, storage_reader=FileSystemReader(folder))
        optimizer.load_state_dict(state["optimizer"])
    loaded = [t.full_tensor().clone() for t in next(iter(optimizer.state.values())).values()]
    step(2)
    return loaded, [p.detach() for p in params]


@needs.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_is_of_any_number_of_ranks(ranks: World, tmp_path: Any, dtype: torch.dtype) -> None:
    saved = ranks.run(2, saved_and_loaded, str(tmp_path), True, dtype)
    for size in (1, 3, 2):
        for state, params in ranks.run(size, saved_and_loaded, str(tmp_path), False, dtype):
            assert all(torch.equal(a, b) for a, b in zip(state, saved[0][0], strict=True))
            for a, b in zip(params, saved[0][1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


def refusals() -> list[str]:
    """What is said of checkpoints and parameters that do not fit; none changes anything."""
    found = []
    params = params_for(ZERO, torch.float32)
    optimizer = ZeroMuon(params, **ZERO_OPTIONS)
    for i, p in enumerate(params):
        p.grad = gradient(p.shape, i, 0, 0)
    optimizer.step()
    own = optimizer.state_dict()
    before = next(iter(optimizer.state.values()))["momentum_buffer"].full_tensor()
    flat = own["state"][0]["momentum_buffer"]
    odd = DTensor.from_local(
        flat.to_local()[: 3 + dist.get_rank()],
        flat.device_mesh,
        [Shard(0)],
        run_check=False,
        shape=flat.shape,
        stride=(1,),
    )
    for state in ({}, {"momentum_buffer": before[1:]}, {"momentum_buffer": odd}):
        try:
            optimizer.load_state_dict({**own, "state": {0: state}})
        except ValueError as error:
            found.append(str(error))
    assert torch.equal(next(iter(optimizer.state.values()))["momentum_buffer"].full_tensor(), before)
    optimizer.load_state_dict({**own, "state": {0: {"momentum_buffer": 2 * before}}})
    assert torch.equal(next(iter(optimizer.state.values()))["momentum_buffer"].full_tensor(), 2 * before)
    for bad, options in (
        (params_for([(3, 4)], torch.float32) + params_for([(3, 4)], torch.bfloat16), {}),
        ([Parameter(torch.zeros(3))], {}),
        (params, {"lr": -1.0}),
        (params, {"max_workspace_bytes": 1}),
        (params, {"momentum": float("nan")}),
        (params, {"dampened": 1}),
        ([Parameter(normal(2 + dist.get_rank(), 3))], {}),
    ):
        try:
            ZeroMuon(bad, **{**ZERO_OPTIONS, **options})
        except (ValueError, TypeError) as error:
            found.append(str(error))
    params[0].grad = gradient((20, 30), 0, 0, 0).to_sparse()
    kept = [p.detach().clone() for p in params]
    try:
        optimizer.step()
    except TypeError as error:
        found.append(str(error))
    assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))
    return found


@needs.cpu_kernels
def test_flat_slices_refuse_what_does_not_fit(ranks: World) -> None:
    for found in ranks.run(2, refusals):
        for text, expected in zip(
            found,
            [
                "a checkpoint of ZeroMuon should have momentum_buffer but has",
                "momentum_buffer should be of 1680 elements",
                "saved by another number of ranks",
                "of one dtype and on one device",
                "at least 2 dimensions",
                "Learning rate should be >= 0",
                "max_workspace_bytes should be at least",
                "momentum should be >= 0",
                "dampened should be True or False",
                "all ranks should give the optimizer the same parameters",
                "gradient should be dense",
            ],
            strict=True,
        ):
            assert expected in text


def test_flat_slices_need_a_group() -> None:
    with pytest.raises(ValueError, match="process_group should be one"):
        ZeroMuon([Parameter(torch.zeros(2, 2))])
