"""Checkpoints with one to three things in them replaced by others, taken up and stepped with.

`python garbling.py FIRST LAST KIND...` tries those of the seeds FIRST..LAST-1 and prints what should not be: a load or
a step that raises something else than it may, or raises and has written. A crash ends it, and the last line says where.
"""

from __future__ import annotations

import copy
import ctypes
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, SpectralAdam, SpectralMomentum
from muon_kernels.distributed import ZeroMuon, ZeroMuonAdamW

SHAPES = [(6, 4), (4, 6), (2, 3, 5), (3, 2, 2, 2)]


def _params(vectors: bool, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [*SHAPES, (5,), ()] if vectors else SHAPES
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def _muon(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], Optimizer]:
    return lambda: Muon([{"params": half} for half in _halves(_params(False, dtype))], **options)


def _halves(params: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return params[: len(params) // 2], params[len(params) // 2 :]


def _muon_adamw(kind: Callable[..., Optimizer] = MuonAdamW, **options: Any) -> Callable[[], Optimizer]:
    def make() -> Optimizer:
        params = _params(True)
        groups = [{"params": params[:4], "use_muon": True}, {"params": params[4:], "use_muon": False}]
        # A matrix that AdamW steps, for its layout can be another.
        groups.append({"params": [nn.Parameter(torch.ones(7, 5))], "use_muon": False})
        return kind(groups, **options)

    return make


KINDS: dict[str, list[Callable[[], Optimizer]]] = {
    "Muon": [
        _muon(),
        _muon(momentum_dtype=torch.int8, second_moment="neuron"),
        _muon(torch.bfloat16, master_weights=True, second_moment="element", momentum_dtype=torch.float32),
        _muon(torch.bfloat16, stochastic_rounding=True, backend="eager"),
        _muon(power=1.0, nesterov=False),
    ],
    "SpectralMomentum": [
        lambda: SpectralMomentum(_params(False), power=0.25),
        lambda: SpectralMomentum(_params(False), power=1.0),
    ],
    "SpectralAdam": [
        lambda: SpectralAdam([{"params": half} for half in _halves(_params(True))]),
        lambda: SpectralAdam(_params(True), power=1.0, weight_decay=0.1),
    ],
    "ZeroMuon": [
        lambda: ZeroMuon([{"params": half} for half in _halves(_params(False))]),
        lambda: ZeroMuon(_params(False, torch.bfloat16), maximize=True),
        lambda: ZeroMuon(_params(False)[:2], split="heads(2, dim=1)", transposed=True, power=0.5),
    ],
    "ZeroMuonAdamW": [
        _muon_adamw(ZeroMuonAdamW),
        _muon_adamw(ZeroMuonAdamW, adamw_options={"amsgrad": True, "foreach": True}),
    ],
    "MuonAdamW": [
        _muon_adamw(),
        _muon_adamw(muon_options={"momentum_dtype": torch.int8}, adamw_options={"amsgrad": True}),
        _muon_adamw(adamw_options={"foreach": True, "maximize": True}),
        _muon_adamw(adamw_options={"foreach": False, "capturable": False, "amsgrad": True}),
    ],
}


def _backward(optimizer: Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def _frozen(value: Any) -> Any:
    """What compares equal if and only if it is the same to the bit."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            return str(value.layout), value.shape, value.dtype
        if value.is_quantized:
            return value.dtype, value.shape, value.int_repr().tolist()
        bits = value.detach().resolve_conj().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
        return value.dtype, value.shape, value.stride(), ctypes.string_at(bits.data_ptr(), bits.nbytes)
    if isinstance(value, dict):
        return [(_frozen(k) if not isinstance(k, Tensor) else id(k), _frozen(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [type(value), *map(_frozen, value)]
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    return value if isinstance(value, (int, float, str, bool, type(None), torch.dtype)) else repr(type(value))


def snapshot(optimizer: Optimizer) -> Any:
    """Parameters, state and groups, to the bit."""
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    places = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state = sorted((places.get(id(p), -1), _frozen(dict(kept))) for p, kept in optimizer.state.items() if kept)
    return _frozen((params, groups)), state


def _tensors(like: Tensor) -> Iterator[Callable[[], Tensor]]:
    """What may be in the place of a tensor."""
    yield lambda: like.double()
    yield lambda: like.half()
    yield lambda: like.to(torch.bfloat16)
    yield lambda: like.to(torch.int64)
    yield lambda: like.to(torch.int8)
    yield lambda: like.bool()
    yield lambda: like.to(torch.complex64)
    yield lambda: like.flatten()
    yield lambda: like.flatten()[:1]
    yield lambda: like.flatten()[:0]
    yield lambda: like.unsqueeze(0)
    yield lambda: like.mT.contiguous() if like.ndim > 1 else like.repeat(2)
    yield lambda: like.mT.contiguous().mT if like.ndim > 1 else like.repeat(2)[::2] if like.ndim else like
    yield lambda: like.flatten()[:1].sum().expand(like.shape)
    yield lambda: like.flatten()[:1].sum()
    yield lambda: torch.zeros(3)
    yield lambda: torch.zeros(64, 64)
    yield lambda: torch.full_like(like, math.nan) if like.is_floating_point() else like
    yield lambda: like.to("meta")
    yield lambda: like.to_sparse() if like.ndim else like
    yield lambda: nn.Parameter(like.clone()) if like.is_floating_point() else like
    yield lambda: like.clone().requires_grad_() * 1 if like.is_floating_point() else like
    yield lambda: torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8)


_OTHERS: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 2**40, 0.5, -0.5, 1.5, 1e300, 2e38, math.nan, math.inf, 1j, "", "x", "eager"),
    *(
        (),
        [],
        {},
        [1],
        (0.5, 0.5),
        (0.9, "a"),
        [0.9, None],
        (1.0, 2.0, 3.0),
        {"a": 1},
        {1, 2},
        b"x",
        range(3),
        object(),
    ),
    *(torch.float32, torch.int8, torch.float16, int, len, slice(1)),
    *(torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.1, 0.2]), torch.tensor(3), torch.tensor(True)),
    *(torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(1j), torch.zeros((), device="meta"), torch.zeros(0)),
]


def _junk(value: Any, rng: random.Random) -> Any:
    if isinstance(value, Tensor) and rng.random() < 0.7:
        try:
            return rng.choice(list(_tensors(value)))()
        except RuntimeError:
            return torch.zeros(3)
    return copy.deepcopy(rng.choice(_OTHERS)) if rng.random() < 0.9 else _OTHERS[5]


def _garble_state(state: dict[Any, Any], rng: random.Random) -> str:
    index = rng.choice(list(state))
    kept = state[index]
    if not isinstance(kept, dict) or not kept or rng.random() < 0.05:
        state[index] = _junk(None, rng)
        return f"state[{index}] = {state[index]!r}"
    key = rng.choice(list(kept))
    how = rng.random()
    if how < 0.1:
        del kept[key]
        return f"del state[{index}][{key}]"
    if how < 0.15:
        kept[rng.choice(["extra", 3, "step", "momentum_scale", "mantissa", "second_momentum_buffer"])] = _junk(
            kept[key], rng
        )
        return f"state[{index}] has more"
    if how < 0.2 and len(state) > 1:
        other = rng.choice(list(state))
        state[index], state[other] = state[other], state[index]
        return f"state {index} and {other} swapped"
    if how < 0.25:
        kept[key] = next((v for v in kept.values() if v is not kept[key]), None)
        return f"state[{index}][{key}] shared"
    kept[key] = _junk(kept[key], rng)
    return f"state[{index}][{key}] = {type(kept[key]).__name__} {kept[key]!r:.80}"


def _garble_groups(groups: Any, rng: random.Random) -> str:
    if not isinstance(groups, list) or not groups:
        return "nothing"
    i = rng.randrange(len(groups))
    if not isinstance(groups[i], dict) or not groups[i] or rng.random() < 0.04:
        groups[i] = _junk(None, rng)
        return f"group {i} = {groups[i]!r}"
    group = groups[i]
    how = rng.random()
    if how < 0.04:
        del groups[i]
        return f"del group {i}"
    if how < 0.08:
        groups.append(copy.deepcopy(group))
        return f"group {i} twice"
    key = rng.choice(list(group))
    if key == "params" and rng.random() < 0.7:
        params = group["params"]
        if isinstance(params, list) and params:
            at = rng.randrange(len(params))
            params[at] = rng.choice([0, 1, -1, 99, "x", None, 1.0, [1]])
        return f"group {i} params {group['params']}"
    if how < 0.2:
        del group[key]
        return f"del group {i} {key}"
    if how < 0.25:
        group[rng.choice(["extra", "step", "initial_lr", 7])] = _junk(None, rng)
        return f"group {i} has more"
    group[key] = _junk(group[key], rng)
    return f"group {i} {key} = {group[key]!r:.80}"


def _garble(checkpoint: dict[str, Any], rng: random.Random) -> str:
    """Change one thing, and say which."""
    state = checkpoint.get("state")
    where = rng.random()
    if where < 0.02:
        key = rng.choice(["state", "param_groups", "other"])
        checkpoint[key] = _junk(None, rng)
        return f"{key} = {checkpoint[key]!r}"
    if where < 0.5 and isinstance(state, dict) and state:
        return _garble_state(state, rng)
    return _garble_groups(checkpoint.get("param_groups"), rng)


def attempt(kind: str, seed: int) -> str | None:
    """What is wrong with the load of a garbled checkpoint and the step after it; None if nothing is."""
    rng = random.Random(f"{kind} {seed}")
    make = rng.choice(KINDS[kind])
    saved, optimizer = make(), make()
    for step, each in enumerate((saved, saved, optimizer)):
        _backward(each, step)
        each.step()
    checkpoint = copy.deepcopy(saved.state_dict())
    changes = [_garble(checkpoint, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    before = snapshot(optimizer)
    print(f"{kind} {seed}: {changes}", file=sys.stderr, flush=True)
    try:
        optimizer.load_state_dict(checkpoint)
    except Exception as error:
        if not isinstance(error, (ValueError, TypeError)) or type(error) not in (ValueError, TypeError):
            return f"{changes}: load raises {type(error).__name__}: {error}"
        return None if snapshot(optimizer) == before else f"{changes}: load raises and has written: {error}"
    _backward(optimizer, 9)
    before = snapshot(optimizer)
    try:
        optimizer.step()
    except Exception as error:
        if type(error) not in (ValueError, TypeError, RuntimeError):
            return f"{changes}: step raises {type(error).__name__}: {error}"
        return None if snapshot(optimizer) == before else f"{changes}: step raises and has written: {error}"
    return None


def main(first: str, last: str, *kinds: str) -> int:
    """Print what is wrong and how many were tried; return how many are wrong."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    total = 0
    for kind in kinds or KINDS:
        wrong = [found for seed in range(int(first), int(last)) if (found := attempt(kind, seed))]
        print(*wrong, f"{kind}: {int(last) - int(first)} tried, {len(wrong)} wrong", sep="\n")
        total += len(wrong)
    dist.destroy_process_group()
    return total


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
