"""ZeRO-1 on flat slices: Muon and AdamW of the mean gradient, against one process and float64.

Ranks run functions of this module, see ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks import needs
from ranks import World
from test_strategies import alone, normal, params_of, traffic
from test_traffic import written
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, param_groups
from muon_kernels.checks.yardsticks import relative_error
from muon_kernels.coefficients import resolve
from muon_kernels.distributed import ZeroMuon, ZeroMuonAdamW, collectives
from muon_kernels.reference import muon_step
from muon_kernels.split import blocks, equal, heads, qkv

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
        {"power": 0.5, "transposed": True, "adjust_lr_fn": "spectral"},
        {"power": 1.0, "dampened": False, "adjust_lr_fn": "none"},
    ],
    ids=str,
)
def test_options_of_flat_slices_are_muons(ranks: World, options: dict[str, Any]) -> None:
    shapes = ZERO
    params, _, found, expected = ranks.run(3, zero_stepped, shapes, 2, torch.float32, {**ZERO_OPTIONS, **options})[0]
    assert sum(bytes_ for _, bytes_ in found) == expected
    assert ("all_to_all" in dict(found)) == (options.get("power") != 1.0)
    for index, (p, before) in enumerate(zip(params, params_for(shapes, torch.float32), strict=True)):
        grads = [
            [sum(gradient(p.shape, index, step, rank) for rank in range(3)) / 3]  # type: ignore[list-item]
            for step in range(2)
        ]
        muon = alone([before.detach()], grads, {**ZERO_OPTIONS, **options, "lr": 0.05 if index % 2 else 0.1})
        update = params_of(muon)[0].detach().double() - before.detach()
        # Where no matrix is multiplied nothing is rounded to bf16.
        assert relative_error(p - before.detach(), update) < (1e-6 if options.get("power") == 1.0 else 0.03), p.shape


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


# Matrices of each parameter by plain slices, in order; the size of a parameter is the first thing of a case.
SPLITS: dict[str, tuple[tuple[int, ...], str, Any]] = {
    "heads": ((24, 18), heads(4), lambda t: t.chunk(4)),
    "heads of columns": ((20, 30), heads(5, dim=1), lambda t: t.chunk(5, 1)),
    "thirds": ((8, 33), equal(3, dim=1), lambda t: t.chunk(3, 1)),
    "unequal": ((17, 40), blocks(30, 10, dim=1), lambda t: t.split([30, 10], 1)),
    "interleaved": (
        (32, 10),
        qkv(4, 2, interleaved=True),
        lambda t: [torch.cat(part) for part in zip(*(g.split([8, 4, 4]) for g in t.chunk(2)), strict=True)],
    ),
    "alternating": ((9, 14), blocks(1, 1, interleaved=True, dim=1), lambda t: [t[:, ::2], t[:, 1::2]]),
    "experts": ((3, 8, 12), equal(2, dim=1), lambda t: [half for e in t for half in e.chunk(2, 1)]),
    "channels": ((6, 4, 3, 3), equal(2, dim=1), lambda t: [half.flatten(1) for half in t.chunk(2, 1)]),
}
TURNED = ["heads of columns", "experts"]


def split_stepped(dtype: torch.dtype, adjusted: str) -> list[str]:
    """The cases in which split parameters are not, to the bit, what their matrices are as parameters; and else what."""
    wholes, parts = [], []
    for i, (name, (shape, _, cut_of)) in enumerate(SPLITS.items()):
        t = normal(*shape, seed=i).to(dtype)
        t = t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.mT.contiguous().mT
        wholes.append((name, Parameter(t)))
        parts += [(f"{name} {j}", Parameter(part.contiguous())) for j, part in enumerate(cut_of(t))]
    options = {**ZERO_OPTIONS, "adjust_lr_fn": adjusted}
    turned_parts = [name for name, _ in parts if name.rpartition(" ")[0] in TURNED]
    whole = ZeroMuon(wholes, split={n: split for n, (_, split, _) in SPLITS.items()}, transposed=TURNED, **options)
    apart = ZeroMuon(parts, transposed=turned_parts, **options)
    by_name = dict(parts)
    for step in range(3):
        for i, (name, p) in enumerate(wholes):
            p.grad = gradient(p.shape, i, step, dist.get_rank()).to(dtype)
            if step == 1 and name == "thirds":
                p.grad = None
            for j, part in enumerate(SPLITS[name][2](p.grad) if p.grad is not None else [None] * 3):
                by_name[f"{name} {j}"].grad = None if part is None else part.contiguous()
        whole.step()
        apart.step()
    wrong = []
    for name, p in wholes:
        found = [part.reshape(-1) for part in SPLITS[name][2](p.detach())]
        if not all(torch.equal(t, by_name[f"{name} {j}"].detach().reshape(-1)) for j, t in enumerate(found)):
            wrong.append(name)
    states = [next(iter(optimizer.state.values())) for optimizer in (whole, apart)]
    for key in states[0]:
        if not torch.equal(states[0][key].full_tensor(), states[1][key].full_tensor()):
            wrong.append(key)
    if whole.bytes_sent != apart.bytes_sent:
        wrong.append("bytes")
    return wrong


@needs.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_split_is_its_matrices(ranks: World, dtype: torch.dtype) -> None:
    """To the bit, wherever their elements are in the parameter and in memory."""
    for wrong in ranks.run(3, split_stepped, dtype, "spectral"):
        assert not wrong


def split_as_muon() -> dict[str, float]:
    """Relative distance of two steps' updates from those of `Muon` with the mean gradient."""
    named = [[(name, Parameter(normal(*shape, seed=1))) for name, (shape, *_) in SPLITS.items()] for _ in range(2)]
    options = {**ZERO_OPTIONS, "adjust_lr_fn": "spectral", "transposed": TURNED}
    options["split"] = {name: split for name, (_, split, _) in SPLITS.items()}
    zero, muon = ZeroMuon(named[0], **options), Muon(named[1], **options)
    for step in range(2):
        for i, ((_, p), (_, own)) in enumerate(zip(*named, strict=True)):
            p.grad = gradient(p.shape, i, step, dist.get_rank())
            own.grad = torch.stack([gradient(p.shape, i, step, r) for r in range(dist.get_world_size())]).mean(0)
        zero.step()
        muon.step()
    found = {}
    for (name, p), (_, own) in zip(*named, strict=True):
        before = normal(*p.shape, seed=1)
        found[name] = relative_error(p.detach() - before, own.detach().double() - before)
    return found


@needs.cpu_kernels
def test_a_split_is_muons(ranks: World) -> None:
    for found in ranks.run(2, split_as_muon):
        assert found.keys() == SPLITS.keys() and all(error < 0.03 for error in found.values()), found


# Vectors, a scalar, one without elements, tables: what AdamW steps.
VECTORS = [(7, 5), (13,), (), (0,), (3, 4, 2), (50,), (1,)]


def exact(shape: Sequence[int], index: int, step: int, rank: int) -> Tensor:
    """A gradient whose sums over ranks are exact in fp32, in any order."""
    return (gradient(shape, index, step, rank) * 64).round() / 64


def given(index: int, step: int, rank: int) -> bool:
    """Whether a rank has a gradient; in the second step the sixth parameter has one on the last rank only."""
    return step != 1 or index < 2 or (index == 5 and rank == dist.get_world_size() - 1)


def adamw_stepped(dtype: torch.dtype, options: dict[str, Any]) -> list[str]:
    """What differs from torch.optim.AdamW in fp32 with the mean gradient after three steps."""
    params = [Parameter(normal(*shape, seed=i).to(dtype)) for i, shape in enumerate(VECTORS)]
    alone_ = [Parameter(p.detach().float()) for p in params]
    cycled = {"momentum": 0.7} if "betas" in options else {}  # which is the first beta
    ours = {key: value for key, value in options.items() if key != "betas"}
    optimizer = ZeroMuonAdamW([{"params": params, "use_muon": False, **cycled}], adamw_options=ours)
    expected = torch.optim.AdamW(alone_, **options)
    size, rank = dist.get_world_size(), dist.get_rank()
    for step in range(3):
        for i, (p, own) in enumerate(zip(params, alone_, strict=True)):
            grads = [exact(p.shape, i, step, r).to(dtype) if given(i, step, r) else None for r in range(size)]
            p.grad, there = grads[rank], [g.float() for g in grads if g is not None]
            own.grad = sum(there) / size if there else None  # type: ignore[assignment]
        with traffic() as sent:
            optimizer.step()
        expected.step()
    state, wanted = optimizer.state[params[0]], [expected.state[q] for q in alone_]
    wrong = [f"{i}" for i, (p, q) in enumerate(zip(params, alone_, strict=True)) if not torch.equal(p, q.to(dtype))]
    keys = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * options.get("amsgrad", False)]
    for key in keys:
        whole, torchs = state[key].full_tensor(), torch.cat([each[key].reshape(-1) for each in wanted])
        close = options.get("fused") and torch.allclose(whole, torchs, rtol=2**-23, atol=0)
        wrong += [key] * (not close and not torch.equal(whole, torchs))
    wrong += ["step"] * (not torch.equal(state["step"], torch.stack([each["step"] for each in wanted])))
    wrong += ["keys"] * (set(state) != {"step", *keys, *["master_param"] * (dtype != torch.float32)})
    wrong += ["calls"] * ([name for name, _ in sent] != ["reduce_scatter", "all_gather"])
    wrong += ["bytes"] * (sum(bytes_ for _, bytes_ in sent) != optimizer.bytes_sent)
    return wrong


def adamw_cases(cases: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{options} {dtype}: {wrong}"
        for options in cases
        for dtype in (torch.float32, torch.bfloat16)
        if (wrong := adamw_stepped(dtype, options))
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_vectors_are_torchs_adamw_of_the_mean_gradient(ranks: World, size: int) -> None:
    """To the bit; torch's fused step rounds squares at the end of a tensor otherwise, so those to their last bit."""
    cases: list[dict[str, Any]] = [{"lr": 0.1}]
    if size == 3:
        cases += [
            {"lr": 0.1, "weight_decay": 0.5, "eps": 1e-3, "maximize": True},
            {"lr": 0.1, "amsgrad": True, "betas": (0.7, 0.999)},
            {"lr": 0.1, "foreach": True},
            {"lr": 0.1, "fused": True},
        ]
    for wrong in ranks.run(size, adamw_cases, cases):
        assert not wrong


def sockets() -> tuple[int, int]:
    """Bytes that a step hands to sockets beside its reductions, and what `bytes_sent` says of that."""
    params, size = params_for([(96, 160)] * 7, torch.float32), dist.get_world_size()
    vectors = params_for([(5000,)], torch.float32)
    groups = [{"params": params, "use_muon": True}, {"params": vectors, "use_muon": False}]
    optimizer = ZeroMuonAdamW(groups, muon_options=ZERO_OPTIONS)
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    shares = [-(-n // size) for n in (7 * 96 * 160, 5000)]
    optimizer.step()
    dist.barrier()
    before = written()
    optimizer.step()
    sent = written() - before
    for share in shares:  # gloo writes twice what a ring does
        into, everything = torch.empty(share), torch.empty(size * share)
        dist.barrier()
        before = written()
        collectives._reduce_scatter(into, everything)
        sent -= written() - before
    return sent, optimizer.bytes_sent - sum(4 * (size - 1) * share for share in shares)


@needs.cpu_kernels
def test_counted_as_sockets_count(ranks: World) -> None:
    """What is sent in a step, to the few hundred bytes that gloo writes with a message and the ranks agree by."""
    for sent, expected in ranks.run(3, sockets):
        assert expected > 4 * 7 * 96 * 160 * 2 / 3
        assert abs(sent - expected) < 10_000


class Net(torch.nn.Module):
    """A fused projection, and what goes to AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 12)
        self.gate_up_proj = torch.nn.Linear(12, 40)
        self.norm = torch.nn.LayerNorm(20)
        self.lm_head = torch.nn.Linear(20, 20, bias=False)


def model_stepped() -> tuple[dict[str, float], list[str]]:
    """Errors of the updates of a model's parameters beside those of MuonAdamW, and the names of those without any."""
    torch.manual_seed(0)
    model, own = Net(), Net()
    own.load_state_dict(model.state_dict())
    options: dict[str, Any] = {
        "muon_options": {"lr": 0.05, "backend": "eager"},
        "adamw_options": {"lr": 0.01, "fused": None, "foreach": False},
    }
    before = {name: p.detach().clone() for name, p in own.named_parameters()}
    halves = {"gate_up_proj.weight": equal(2)}
    optimizer = ZeroMuonAdamW(param_groups(model, split=halves), **options)
    expected = MuonAdamW(param_groups(own, split=halves), **options)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, [0.05, 0.01], 4) for o in (optimizer, expected)]
    for step in range(3):
        for i, (p, q) in enumerate(zip(model.parameters(), own.parameters(), strict=True)):
            p.grad = exact(p.shape, i, step, dist.get_rank())
            q.grad = sum(exact(p.shape, i, step, r) for r in range(dist.get_world_size())) / dist.get_world_size()  # type: ignore[assignment]
        for each in (optimizer, expected, *schedulers):
            each.step()
    after = dict(model.named_parameters())
    errors = {
        n: relative_error(after[n].detach() - before[n], q.detach().double() - before[n])
        for n, q in own.named_parameters()
    }
    same = [n for n, q in own.named_parameters() if torch.equal(after[n], q)]
    return errors, same


def test_a_model_is_stepped_as_by_muon_and_adamw(ranks: World) -> None:
    """Groups as param_groups makes them, with a scheduler that cycles momentum and the first beta."""
    for errors, same in ranks.run(2, model_stepped):
        assert sorted(same) == sorted(errors.keys() - {"gate_up_proj.weight"})
        assert errors["gate_up_proj.weight"] < 0.03


CUT = [(20, 30), (7, 11), (6, 8, 10)]
CUTS = {"0": heads(5, dim=1), "2": equal(2, dim=1)}


def of_both(dtype: torch.dtype, **muon: Any) -> tuple[list[Parameter], ZeroMuonAdamW]:
    """Parameters that Muon steps, some of them split, and vectors."""
    params = params_for([*CUT, *VECTORS], dtype)
    named = [(str(i), p) for i, p in enumerate(params)]
    groups = [{"params": named[:3], "use_muon": True, **muon}, {"params": named[3:], "use_muon": False}]
    return params, ZeroMuonAdamW(groups, muon_options=ZERO_OPTIONS, adamw_options={"lr": 0.1})


def saved_and_loaded(folder: str, save: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """What one more step makes of a checkpoint, which is written first by some other number of ranks."""
    params, optimizer = of_both(dtype, split=CUTS)

    def step(number: int) -> None:
        for i, p in enumerate(params):
            p.grad = exact(p.shape, i, number, 0).to(dtype)
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
    loaded = [
        (t.full_tensor() if isinstance(t, DTensor) else t).clone()
        for of in optimizer.state.values()
        for _, t in sorted(of.items())
    ]
    step(2)
    return loaded, [p.detach() for p in params]


@needs.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_is_of_any_number_of_ranks(ranks: World, tmp_path: Any, dtype: torch.dtype) -> None:
    saved = ranks.run(2, saved_and_loaded, str(tmp_path), True, dtype)
    assert len(saved[0][0]) == (4 if dtype == torch.float32 else 6)
    for size in (1, 3, 2):
        for state, params in ranks.run(size, saved_and_loaded, str(tmp_path), False, dtype):
            assert all(torch.equal(a, b) for a, b in zip(state, saved[0][0], strict=True))
            for a, b in zip(params, saved[0][1], strict=True):
                assert torch.equal(a, b)


def outcome(act: Callable[[], object], optimizer: Optimizer | None = None) -> str:
    """What is said where an act is refused; and that it has changed something, if it has."""
    seen = [] if optimizer is None else [p.detach() for p in params_of(optimizer)]
    if optimizer is not None:
        for of in optimizer.state.values():
            seen += [t.to_local() if isinstance(t, DTensor) else t for t in of.values()]
    kept, groups = [t.clone() for t in seen], [] if optimizer is None else str(optimizer.param_groups)
    try:
        act()
    except (ValueError, TypeError, RuntimeError) as error:
        said = str(error)
    else:
        said = "nothing"
    same = all(map(torch.equal, seen, kept)) and (optimizer is None or str(optimizer.param_groups) == groups)
    return said if same else f"{said}, and it has changed something"


def refused_loads() -> dict[str, str]:
    """What is said of checkpoints that do not fit; of the last, what one rank alone is given."""
    params, optimizer = of_both(torch.float32, split=CUTS)
    for i, p in enumerate(params):
        p.grad = gradient(p.shape, i, 0, 0)
    optimizer.step()
    own, rank = optimizer.state_dict(), dist.get_rank()
    matrices, vectors = own["state"][0], own["state"][3]
    flat = matrices["momentum_buffer"]
    odd = DTensor.from_local(
        flat.to_local()[: 3 + rank], flat.device_mesh, [Shard(0)], run_check=False, shape=flat.shape, stride=(1,)
    )

    def with_state(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        return {**own, "state": {0: first, 3: second}}

    def with_group(index: int, **changes: Any) -> dict[str, Any]:
        groups = [dict(group) for group in own["param_groups"]]
        groups[index].update(changes)
        return {**own, "param_groups": groups}

    plain = with_group(0)
    del plain["param_groups"][0]["layout"]  # as by 0.1, which had no splits
    checkpoints = {
        "no momentum": with_state({}, vectors),
        "another size": with_state({"momentum_buffer": flat.full_tensor()[1:]}, vectors),
        "another cut": with_state({"momentum_buffer": odd}, vectors),
        "masters": with_state({**matrices, "master_param": flat}, vectors),
        "no squares": with_state(matrices, {**vectors, "exp_avg_sq": None}),
        "a count": with_state(matrices, {**vectors, "step": torch.tensor(3.0)}),
        "counts below zero": with_state(matrices, {**vectors, "step": torch.full((len(VECTORS),), -1.0)}),
        "another split": of_both(torch.float32, split={**CUTS, "2": equal(5, dim=1)})[1].state_dict(),
        "no split": of_both(torch.float32)[1].state_dict(),
        "no layout": plain,
        "a layout that is none": with_group(0, layout=7),
        "its options": with_group(0, split=None),
        "another half": with_group(1, use_muon=True),
        "a group less": {**own, "param_groups": own["param_groups"][:1]},
        "a parameter less": with_group(1, params=own["param_groups"][1]["params"][1:]),
        "an option": with_group(1, betas=(0.9, 1.5)),
        "one rank's": with_group(0, momentum=-1.0) if rank == 1 else own,
    }
    found = {name: outcome(partial(optimizer.load_state_dict, c), optimizer) for name, c in checkpoints.items()}
    unsplit = ZeroMuon(params_for(CUT, torch.float32))
    old = unsplit.state_dict()
    for key in ("layout", "split", "transposed", "power"):
        del old["param_groups"][0][key]
    found["0.1's"] = outcome(partial(unsplit.load_state_dict, old))
    whole = flat.full_tensor()
    optimizer.load_state_dict(with_state({"momentum_buffer": 2 * whole}, vectors))
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"].full_tensor(), 2 * whole)
    return found


def test_checkpoints_that_do_not_fit(ranks: World) -> None:
    """None changes anything on any rank."""
    other = "state is kept matrix by matrix, so sizes and splits have to be those that it was made with"
    expected = {
        "no momentum": "a checkpoint of ZeroMuonAdamW should have momentum_buffer but has: []",
        "another size": "momentum_buffer should be of 1157 elements",
        "another cut": "saved by another number of ranks",
        "masters": "should have no master_param, as parameters are of float32, but has one",
        "no squares": "exp_avg_sq should be of 124 elements, of which",
        "a count": "step should have size (7,) but has: ()",
        "counts below zero": "step should have counts >= 0 but has: [-1.0",
        "another split": f"parameter 2 laid out as '6x8x10 equal(2, dim=1)' but has '6x8x10 equal(5, dim=1)': {other}",
        "no split": f"parameter 0 laid out as '20x30 heads(5, dim=1)' but has '20x30': {other}",
        "no layout": f"parameter 0 laid out as '20x30 heads(5, dim=1)' but has '20x30': {other}",
        "a layout that is none": "should have a layout of 3 parameters but has: 7",
        "its options": f"parameter 0 laid out as '20x30 heads(5, dim=1)' but has '20x30': {other}",
        "another half": "use_muon of the loaded group should be False but is not",
        "a group less": "should have groups of [3, 7] parameters but has groups of: [3]",
        "a parameter less": "should have groups of [3, 7] parameters but has groups of: [3, 6]",
        "an option": "each of AdamW's betas should be < 1 but is: 1.5",
        "0.1's": "nothing",
    }
    for rank, found in enumerate(ranks.run(2, refused_loads)):
        of_one = "momentum should be >= 0 but is: -1.0"
        if rank == 0:
            of_one = f"nothing has been changed on this rank, as rank 1 of the process group got ValueError: {of_one}"
        assert found.pop("one rank's") == of_one
        assert found.keys() == expected.keys()
        for name, text in found.items():
            assert expected[name] in text and "changed something" not in text, (name, text)


def refused_arguments() -> dict[str, str]:
    """What is said of arguments that cannot be used, by all ranks or by one of them."""
    params, rank = params_for(CUT, torch.float32), dist.get_rank()
    one = {"lr": -1.0} if rank == 1 else {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    acts: dict[str, Callable[[], object]] = {
        "two dtypes": lambda: ZeroMuon([*params, *params_for([(3, 4)], torch.bfloat16)]),
        "a vector": lambda: ZeroMuon([Parameter(torch.zeros(3))]),
        "a DTensor": lambda: ZeroMuon([Parameter(distribute_tensor(params[0].detach(), mesh, [Shard(0)]))]),
        "a rate": lambda: ZeroMuon(params, lr=-1.0),
        "a workspace": lambda: ZeroMuon(params, max_workspace_bytes=1),
        "a momentum": lambda: ZeroMuon(params, momentum=float("nan")),
        "no boolean": lambda: ZeroMuon(params, dampened=1),  # type: ignore[arg-type]
        "sizes": lambda: ZeroMuon([Parameter(normal(2 + rank, 3))]),
        "a split": lambda: ZeroMuon(params, split=heads(7)),
        "names": lambda: ZeroMuon(params, transposed=["0"]),
        "a power": lambda: ZeroMuon(params, power=1.5),
        "Muon's": lambda: ZeroMuon([{"params": params, "cautious": True}]),
        "AdamW's group": lambda: ZeroMuon([{"params": params, "use_muon": False}]),
        "a frozen model": lambda: ZeroMuonAdamW(param_groups(Net().requires_grad_(False))),
        "no half": lambda: ZeroMuonAdamW([{"params": params}]),
        "captured": lambda: ZeroMuonAdamW([{"params": params, "use_muon": False, "capturable": True}]),
        "two betas": lambda: ZeroMuonAdamW(
            [{"params": params, "use_muon": False, "betas": (0.9, 0.99), "momentum": 0.8}]
        ),
        "misplaced": lambda: ZeroMuonAdamW([{"params": params, "use_muon": False}], lr=0.1),  # type: ignore[arg-type]
        "a module": lambda: ZeroMuonAdamW(Net()),  # type: ignore[arg-type]
        "misspelt": lambda: ZeroMuonAdamW([{"params": params, "use_muon": False, "beta": 1.0}]),
        "one rank's": lambda: ZeroMuonAdamW([{"params": params, "use_muon": True, **one}]),
    }
    return {name: outcome(act) for name, act in acts.items()}


def test_arguments_that_cannot_be_used(ranks: World) -> None:
    expected = {
        "two dtypes": "of one dtype and on one device",
        "a vector": "at least 2 dimensions",
        "a DTensor": "should be a tensor with memory of its own but is a DTensor without",
        "a rate": "Learning rate should be >= 0",
        "a workspace": "max_workspace_bytes should be at least",
        "a momentum": "momentum should be >= 0",
        "no boolean": "dampened should be True or False",
        "sizes": "all ranks should give the optimizer the same parameters",
        "a split": "split='heads(7)' should divide dimension 0",
        "names": "transposed by name should be of parameters that have one",
        "a power": "power should be from 0 (orthogonal) to 1 (as it is) but is: 1.5",
        "Muon's": "a group has 'cautious', an option of Muon that ZeroMuon does not have; leave it out",
        "AdamW's group": "give groups with use_muon=False to ZeroMuonAdamW",
        "a frozen model": "some group should have a parameter but none has; is the whole model frozen?",
        "no half": "a param group should have use_muon=True or use_muon=False",
        "captured": "AdamW's capturable should be False where ranks step together but is: True",
        "two betas": "should have betas or momentum, which is its first beta, but has both",
        "misplaced": "options should be in muon_options={...} or adamw_options={...} but ZeroMuonAdamW was given: lr",
        "a module": "params should be parameters or groups but is a module",
        "misspelt": "a group has 'beta', which is no option but close to one: did you mean 'betas'?",
    }
    for rank, found in enumerate(ranks.run(2, refused_arguments)):
        of_one = "Learning rate should be >= 0 but is: -1.0"
        if rank == 0:
            of_one = f"nothing has been changed on this rank, as rank 1 of the process group got ValueError: {of_one}"
        assert found.pop("one rank's") == of_one
        assert found.keys() == expected.keys()
        for name, text in found.items():
            assert expected[name] in text, (name, text)


def refused_alone() -> dict[str, str]:
    """What is said of arguments that rank 1 alone gives."""
    params, alone = params_for(CUT, torch.float32), dist.get_rank() == 1

    def make(first: Any = None, second: Any = None, count: int = 2, **arguments: Any) -> None:
        groups = [{"params": params[:2], "use_muon": True}, {"params": params[2:], "use_muon": False}]
        if alone:
            groups = [{**groups[0], **(first or {})}, {**groups[1], **(second or {})}][:count]
        ZeroMuonAdamW(groups if count else [], **(arguments if alone else {}))

    acts: dict[str, Callable[[], object]] = {
        "Muon's rate": lambda: make(muon_options={"lr": -1.0}),
        "no option of Muon": lambda: make(muon_options={"learning_rate": 1.0}),
        "AdamW's betas": lambda: make(adamw_options={"betas": (0.9, 1.5)}),
        "misplaced": lambda: make(lr=0.1),
        "no half": lambda: make(first={"use_muon": None}),
        "a split": lambda: make(first={"split": heads(7)}),
        "captured": lambda: make(second={"capturable": True}),
        "no parameter": lambda: make(second={"params": []}),
        "another option": lambda: make(second={"lr": 0.5}),
        "a group less": lambda: make(count=1),
        "no group": lambda: ZeroMuonAdamW([] if alone else [{"params": params, "use_muon": True}]),
        "a module": lambda: ZeroMuon(Net() if alone else params),  # type: ignore[arg-type]
        "one tensor": lambda: ZeroMuon(params[0] if alone else params[:1]),  # type: ignore[arg-type]
    }
    return {name: outcome(act) for name, act in acts.items()}


def test_arguments_of_one_rank_are_refused_by_all(ranks: World) -> None:
    """At once: none of them waits for the other until the timeout."""
    expected = {
        "Muon's rate": "Learning rate should be >= 0 but is: -1.0",
        "no option of Muon": "got an unexpected keyword argument 'learning_rate'",
        "AdamW's betas": "1.5",
        "misplaced": "but ZeroMuonAdamW was given: lr",
        "no half": "a param group should have use_muon=True or use_muon=False",
        "a split": "split='heads(7)' should divide dimension 0",
        "captured": "AdamW's capturable should be False",
        "no parameter": "rank 1 of the process group gave nothing more where rank 0 gave parameter 0",
        "another option": "rank 1 of the process group gave lr=0.5 where rank 0 gave lr=0.001",
        "a group less": "many param groups but rank 1 of the process group gave 1 where rank 0 gave 2",
        "no group": "optimizer got an empty parameter list",
        "a module": "params should be parameters or groups but is a module",
        "one tensor": "params should be parameters or groups but is one tensor",
    }
    for rank, (returned, found) in enumerate(ranks.outcomes(2, refused_alone, timeout=10)):
        assert returned, found
        assert found.keys() == expected.keys()
        for name, text in found.items():
            assert expected[name] in text, (rank, name, text)
            of_another = text.startswith("nothing has been changed on this rank, as rank 1 of the process group got")
            assert of_another == (rank == 0 and "where rank 0 gave" not in text), (rank, name, text)


def written_over() -> list[str]:
    """What writing to a checkpoint, or to one that has been loaded, changes in an optimizer; nothing should."""
    params, optimizer = of_both(torch.bfloat16, split=CUTS)
    for i, p in enumerate(params):
        p.grad = gradient(p.shape, i, 0, 0).bfloat16()
    optimizer.step()

    def seen() -> list[Any]:
        state = [t.to_local() if isinstance(t, DTensor) else t for of in optimizer.state.values() for t in of.values()]
        return [
            *(t.clone() for t in state),
            str(optimizer.param_groups),
            str([flat.layout for flat in optimizer._flats]),
        ]

    def spoil(checkpoint: dict[str, Any]) -> None:
        for t in (t for of in checkpoint["state"].values() for t in of.values()):
            (t.to_local() if isinstance(t, DTensor) else t).fill_(7.0)
        for group in checkpoint["param_groups"]:
            group["lr"] = 7.0
            group["layout"].append("spoilt")
            group["params"].append(99)

    changed = []
    for what in ("saved", "loaded"):
        checkpoint = optimizer.state_dict()
        if what == "loaded":
            optimizer.load_state_dict(checkpoint)
        before = seen()
        spoil(checkpoint)
        after = seen()
        same = [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True)]
        changed += [] if all(same) else [f"{what}: {same}"]
    return changed


@needs.cpu_kernels
def test_checkpoints_are_copies(ranks: World) -> None:
    for changed in ranks.run(2, written_over):
        assert changed == []


def refused_steps() -> dict[str, str]:
    """What is said of steps that cannot be taken, by all ranks or by one of them."""
    params, optimizer = of_both(torch.float32, split=CUTS)
    matrices, vectors = optimizer.param_groups

    def step(**changes: Any) -> str:
        for i, p in enumerate(params):
            p.grad = gradient(p.shape, i, 0, 0)
        for key, (group, value) in changes.items():
            kept, group[key] = group[key], value
            changes[key] = group, kept
        said = outcome(optimizer.step, optimizer)
        for key, (group, kept) in changes.items():
            group[key] = kept
        return said

    found = {
        "another split": step(split=(matrices, None)),
        "another flattening": step(flatten=(matrices, True)),
        "a split that does not fit": step(split=(matrices, {"0": heads(7)})),
        "squares": step(amsgrad=(vectors, True)),
        "a huge rate": step(lr=(matrices, 1e300)),
        "AdamW's huge rate": step(lr=(vectors, 1e38)),
    }
    for i, p in enumerate(params):
        p.grad = gradient(p.shape, i, 0, 0)
    params[0].grad = params[0].grad.to_sparse()  # type: ignore[union-attr]
    found["sparse"] = outcome(optimizer.step, optimizer)
    if dist.get_rank() == 0:
        params[0].grad = gradient(CUT[0], 0, 0, 0)
    found["one rank's"] = outcome(optimizer.step, optimizer)
    return found


def test_steps_that_cannot_be_taken(ranks: World) -> None:
    """None changes anything on any rank."""
    moved = "param_groups should have parameter {} laid out as {!r} but has {!r}"
    expected = {
        "another split": moved.format(0, "20x30 heads(5, dim=1)", "20x30"),
        "another flattening": moved.format(2, "6x8x10 equal(2, dim=1)", "6x8x10 flattened equal(2, dim=1)"),
        "a split that does not fit": "split='heads(7)' should divide dimension 0",
        "squares": "state should have max_exp_avg_sq but has",
        "a huge rate": "lr times adjust_lr_fn's factor should be at most",
        "AdamW's huge rate": "lr, divided by 1 - beta1, should be at most",
        "sparse": "gradient should be dense",
    }
    for rank, found in enumerate(ranks.run(2, refused_steps)):
        of_one = found.pop("one rank's")
        assert "gradient should be dense" in of_one and ("rank 1 cannot take this step" in of_one) == (rank == 0)
        assert found.keys() == expected.keys()
        for name, text in found.items():
            assert expected[name] in text and "changed something" not in text, (name, text)


def test_flat_slices_need_a_group() -> None:
    with pytest.raises(ValueError, match="process_group should be one"):
        ZeroMuon([Parameter(torch.zeros(2, 2))])


def scaled_apart(powers: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A parameter after a step by gradients that each rank has scaled by its own power of two, and by 1; its copy."""
    results = []
    for power in (powers[dist.get_rank()], 0):
        p = Parameter(torch.ones(6, 8))
        optimizer = ZeroMuon([p], lr=0.1, backend="eager")
        p.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(dist.get_rank())) * 2.0**power
        optimizer.grad_scale = torch.tensor(2.0**power)  # as GradScaler does for the duration of a step
        optimizer.step()
        results.append(p.detach())
    return results[0], results[1]


def test_ranks_with_other_scales(ranks: World) -> None:
    """Where one rank alone has overflowed, its GradScaler has a smaller scale from then on."""
    for scaled, plain in ranks.run(2, scaled_apart, (4, 9)):
        assert torch.equal(scaled, plain)
