"""Every option that ranks can step with, on parameters of all kinds, against one process, to the bit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import needs
from option_layouts import LAYOUTS, REFUSED, ROUNDED, Place, claim, placed
from ranks import World
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from muon_kernels import Muon, SpectralAdam, SpectralMomentum
from muon_kernels.distributed import ZeroMuon, ZeroMuonAdamW, exchange, lots
from muon_kernels.options import OPTIONS
from muon_kernels.split import blocks, equal, heads, qkv

STEPS = 3
# Of the way that a parameter goes: what rounding may change, and where the iteration has another order of operations,
# sums of Gram matrices or directions that are rounded before their norm is taken.
CLOSE, LOOSE = 0.02, {"gram": 0.03, "ZeRO-1": 0.03}
# What the order of fp32 sums of squares may change, where a bf16 element that is divided by their root is rounded over.
SUMMED = 1e-3
# Wide, tall, square, odd, fewer rows than ranks, one row, many equal ones, stacks, empty ones.
SHAPES = [(128, 256), (256, 64), (96, 96), (96, 96), (33, 70), (3, 50), (1, 40), *[(24, 40)] * 5]
SHAPES += [(6, 64, 48), (1, 16, 12), (0, 8), (0, 4, 4)]
WHOLE = [*SHAPES[:7], (6, 64, 48)]
SPLIT = [(96, 64), (96, 96), (48, 32)]
ROUNDING = {"stochastic_rounding": True, "weight_decay": 0.3}
# Of which no cut divides a block of 2048 elements: of rows on two or four ranks.
EIGHT = [(256, 128), (128, 256), (128, 128), (6, 64, 48)]

CASES: dict[str, tuple[type[Optimizer], list[tuple[int, ...]], dict[str, Any]]] = {
    "defaults": (Muon, SHAPES, {}),
    "standard form": (Muon, SHAPES, {"ns_algorithm": "standard"}),
    "Gram form": (Muon, SHAPES, {"ns_algorithm": "gram", "ns_coefficients": "polar_express"}),
    "many rounds": (Muon, SHAPES, {"max_workspace_bytes": 700_000}),
    "Moonlight": (Muon, SHAPES, {"dampened": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1}),
    "(in, out) weights": (Muon, SHAPES, {"adjust_lr_fn": "spectral", "transposed": True}),
    "no momentum": (Muon, SHAPES, {"momentum": 0.0, "nesterov": False, "maximize": True}),
    "bf16 momentum": (Muon, SHAPES, {"momentum_dtype": torch.bfloat16}),
    "cautious": (Muon, SHAPES, {"cautious": True, "weight_decay": 0.5}),
    "signs": (Muon, SHAPES, {"sign_momentum": True}),
    "exact RMS": (Muon, SHAPES, {"exact_rms": True}),
    "rows": (Muon, WHOLE, {"second_moment": "neuron"}),
    "elements": (Muon, WHOLE, {"second_moment": "element", "sign_momentum": True}),
    "master weights": (Muon, SHAPES, {"master_weights": True, "weight_decay": 0.3, "max_workspace_bytes": 700_000}),
    "random bits": (Muon, SHAPES, {**ROUNDING, "max_workspace_bytes": 700_000}),
    "random bits of heads": (Muon, SPLIT, {**ROUNDING, "split": heads(12)}),
    "random bits of columns": (Muon, SPLIT, {**ROUNDING, "split": equal(2, dim=1), "cautious": True}),
    "random bits of queries": (Muon, SPLIT[:2], {**ROUNDING, "split": qkv(4, 2), "sign_momentum": True}),
    "random bits of experts": (Muon, [(6, 40, 33), (3, 24, 97)], {**ROUNDING, "momentum_dtype": torch.bfloat16}),
    "random bits of convolutions": (Muon, [(32, 3, 5, 5), (23, 15, 3)], {**ROUNDING, "flatten": True}),
    "rows of heads": (Muon, SPLIT, {"second_moment": "neuron", "split": heads(12)}),
    "rows of quarters": (Muon, SPLIT, {"second_moment": "neuron", "split": equal(4, dim=1)}),
    "elements of queries": (Muon, SPLIT[:2], {"second_moment": "element", "split": qkv(4, 2)}),
    "rows of experts": (Muon, [(6, 40, 32), (3, 24, 96)], {"second_moment": "neuron", "split": equal(2, dim=1)}),
    "fp16 workspace": (Muon, SHAPES, {"workspace_dtype": torch.float16, "backend": "eager"}),
    "int8 momentum": (Muon, EIGHT, {"momentum_dtype": torch.int8}),
    "int8 momentum of heads": (Muon, [(128, 64)], {"momentum_dtype": torch.int8, "split": heads(4)}),
    "half power": (SpectralMomentum, SHAPES, {"power": 0.5}),
    "SGD": (SpectralMomentum, SHAPES, {"power": 1.0}),
    "quarter power of Adam": (SpectralAdam, SHAPES, {"power": 0.25}),
    "heads": (Muon, SPLIT, {"split": heads(12)}),
    "thirds": (Muon, SPLIT, {"split": equal(3)}),
    "columns": (Muon, SPLIT, {"split": equal(2, dim=1)}),
    "grouped queries": (Muon, SPLIT[:2], {"split": qkv(4, 2)}),
    "unequal blocks": (Muon, [(96, 64)], {"split": blocks(64, 32)}),
    "convolutions": (Muon, [(32, 3, 5, 5), (24, 16, 3)], {"flatten": True}),
}
# What CASES leave out: cuts that are uneven or leave a rank without rows, and stacks, of splits.
MORE_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "elements": [(4, 24 + 8 * i) for i in range(6)] + [(rows, 24) for rows in (6, 9, 35, 37, 41, 43)],
    "fp16 workspace": [(4, 40)],
    "rows of heads": [(3, 24, 20)],
    "rows of quarters": [(33, 24), (1, 40), (3, 24, 20)],
    "elements of queries": [(8 * i, 24) for i in (1, 2, 3, 4, 5, 6, 7, 9)] + [(3, 32, 20)],
    "heads": [(3, 24, 20)],
    "thirds": [(33, 24), (3, 40), (3, 24, 20)],
    "columns": [(33, 24), (1, 40), (3, 24, 20)],
    "grouped queries": [(8, 24), (3, 32, 20)],
    "unequal blocks": [(3, 96, 20)],
}
WIDE = [(8, 2048), (5, 2048), (1, 2048), (3, 2, 2048)]
SMALL = [(24, 40), (33, 24), (1, 40), (3, 24, 20)]
CASES |= {
    "scheduled decay": (Muon, SMALL, {"weight_decay_form": "scheduled", "peak_lr": 0.05, "use_addmm": True}),
    "three steps": (Muon, SMALL, {"ns_steps": 3, "eps": 1e-3}),
    "slow squares": (Muon, SMALL, {"second_moment": "neuron", "beta2": 0.99}),
    "int8 momentum of wide rows": (
        Muon,
        [(8, 2048), (5, 2048), (1, 2048), (3, 2, 2048)],
        {"momentum_dtype": torch.int8},
    ),
}
SCALES = {"": 1.0, "tiny gradients": 1e-25, "huge gradients": 1e25}


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes_of(case: str) -> list[tuple[int, ...]]:
    return CASES[case][1] + MORE_SHAPES.get(case, [])


def initial(case: str) -> list[Tensor]:
    dtype = torch.bfloat16 if {"master_weights", "stochastic_rounding"} & CASES[case][2].keys() else torch.float32
    return [(random(shape, i) * 0.1).to(dtype) for i, shape in enumerate(shapes_of(case))]


def begin(case: str, place: Place, make: Callable[..., Optimizer]) -> tuple[list[nn.Parameter], Optimizer]:
    kind, _, own = CASES[case]
    params = [nn.Parameter(place(t, i)) for i, t in enumerate(initial(case))]
    return params, make(params, kind, {"lr": 0.02, "backend": "cpu", **own})


def give(case: str, params: Sequence[Tensor], step: int, place: Place, scale: float) -> None:
    """The same gradients wherever the parameters are; one is missing in the second step."""
    for i, p in enumerate(params):
        grad = (random(shapes_of(case)[i], 100 + 10 * step + i) * scale).to(p.dtype)
        p.grad = None if step == 1 and i == 1 else place(grad, i)


@cache
def alone(case: str, scale: float) -> tuple[list[list[Tensor]], Optimizer]:
    """Parameters after each step in one process, and the optimizer; the ranks are processes that many tests share."""
    here: Place = lambda t, i: t.clone()
    params, optimizer = begin(case, here, lambda params, kind, own: kind(params, **own))
    found = []
    for step in range(STEPS):
        give(case, params, step, here, scale)
        optimizer.step()
        found.append([t.clone() for t in whole(params, optimizer)])
    return found, optimizer


def kept(optimizer: Optimizer, params: Sequence[Tensor], key: str) -> dict[int, Tensor]:
    """What this rank keeps under a key of the state, whole, by the index of the parameter."""
    found = {i: optimizer.state.get(p, {}).get(key) for i, p in enumerate(params)}
    wide = {i: t.int() if t.dtype == torch.int16 else t for i, t in found.items() if t is not None}  # gloo has no int16
    return {i: t.full_tensor() if isinstance(t, DTensor) else t for i, t in wide.items()}


def zero(params: Sequence[nn.Parameter], kind: type[Optimizer], own: dict[str, Any]) -> Optimizer:
    """ZeroMuonAdamW with what `kind` would have been given, its defaults too."""
    if kind is SpectralMomentum:
        group = kind(params, **own).param_groups[0]
        own = {key: group[key] for key in inspect.signature(ZeroMuon).parameters if key in group}
    return ZeroMuonAdamW([{"params": params, "use_muon": True, **own}])


def makers(run: str) -> Callable[..., Optimizer]:
    options: dict[str, Any] = {}
    if run == "group":
        options = {"process_group": dist.group.WORLD}
    elif run in ("gram", "blocks"):
        options = {"strategy": run} | ({"block_period": STEPS} if run == "blocks" else {})
    return zero if run == "ZeRO-1" else lambda params, kind, own: kind(params, **own, **options)


def whole(params: Sequence[Tensor], optimizer: Optimizer) -> list[Tensor]:
    """Parameters, in fp32 where there are masters, whose other half every rank keeps."""
    found = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]
    lower = kept(optimizer, params, "mantissa")
    return [
        ((t.view(torch.int16).int() << 16) + lower[i]).view(torch.float32) if i in lower else t
        for i, t in enumerate(found)
    ]


def nearness(found: Tensor, expected: Tensor, most: float, way: Tensor | None = None) -> str:
    """How far apart they are: "rounding" is at most `most` of the norm of `way`, or of what is expected."""
    if torch.equal(found, expected):
        return "bits"
    apart = float((found - expected).norm() / (expected if way is None else way).norm())
    return "rounding" if apart <= most else f"wrong: {apart:.3g} apart"


def limit(case: str, after: Tensor, before: Tensor, most: float) -> float:
    """What `nearness` may be at most where it would be `most` if nothing were rounded to bf16 at random.

    Of elements that differ by d before that, d/ulp are rounded the other way, by an ulp of at most 2^-7 of an element:
    the mean square of what comes of it is d·ulp.
    """
    if "stochastic_rounding" not in CASES[case][2]:
        return most
    return math.sqrt(most * 2.0**-7 * float(before.float().norm() / (after - before).float().norm()))


def worst(*found: list[str]) -> list[str]:
    """Of each parameter what is said that is worst; in the order of the alphabet."""
    return list(map(max, zip(*found, strict=True)))


def as_parts(case: str, params: Sequence[Tensor], optimizer: Optimizer, place: Place, scale: float) -> list[str]:
    """Steps after the first of "blocks", of each rank's parts beside parameters of its own that are these."""
    here = lambda t: t.detach().to_local() if isinstance(t, DTensor) else t.detach()
    kind, _, own = CASES[case]
    parts = [nn.Parameter(here(p).clone()) for p in params]
    apart = kind(parts, **{"lr": 0.02, "backend": "cpu", **own})
    for p, part in zip(params, parts, strict=True):
        apart.state[part] = {key: here(t).clone() for key, t in optimizer.state[p].items()}
    for step in range(1, STEPS):
        give(case, params, step, place, scale)
        for p, part in zip(params, parts, strict=True):
            part.grad = None if p.grad is None else here(p.grad).clone()
        optimizer.step()
        apart.step()
    # Parts by themselves have other random bits: of each step, some elements are rounded the other way.
    most = (STEPS - 1) * 2.0**-8 if "stochastic_rounding" in own else 0.0
    found = [nearness(here(p).float(), part.detach().float(), most) for p, part in zip(params, parts, strict=True)]
    for i, (p, part) in enumerate(zip(params, parts, strict=True)):
        for key, t in apart.state[part].items():
            if not torch.equal(t, here(optimizer.state[p][key])):
                found[i] = f"wrong: {key} of a part"
    return found


def stepped(case: str, run: str, scale: float) -> list[str]:
    """Of each parameter whether the steps are those of one process: "bits", "rounding", or what is wrong."""
    place, (expected, by_itself) = placed(run, CASES[case][2]), alone(case, scale)
    params, optimizer = begin(case, place, makers(run))
    for step in range(1 if run == "blocks" else STEPS):
        give(case, params, step, place, scale)
        optimizer.step()
    wanted = expected[0 if run == "blocks" else -1]
    form = CASES[case][2].get("second_moment")
    most = LOOSE.get(run, CLOSE if form is None else SUMMED)
    if run in LOOSE and form == "element":  # divided by their own size, elements near zero may have another sign
        most *= 2
    pairs = zip(whole(params, optimizer), wanted, initial(case), strict=True)
    found = [nearness(p, own, limit(case, own, before, most), own - before) for p, own, before in pairs]
    if run == "blocks":
        return worst(found, as_parts(case, params, optimizer, place, scale))
    # A constant factor of a moment would not show in the update, whose norm is kept.
    squares = kept(by_itself, list(by_itself.state), "second_momentum_buffer")
    for i, V in kept(optimizer, params, "second_momentum_buffer").items():
        found[i] = max(found[i], nearness(V, squares[i], 2 * most))
    return found


def in_parts() -> Any:
    """Replicas gather parts of a few results; fewer, where there are many rounds."""
    return mock.patch.object(exchange, "part_bytes", lambda cap: max(4000, cap // 4000))


def results(run: str, cases: Sequence[str]) -> dict[str, list[str] | str]:
    """Of each case what `stepped` says, of the worst scale, or what an error says."""
    lots._NUMBERS_ON_CPU = 2000  # several matrices at a time, and not all
    found: dict[str, list[str] | str] = {}
    for case in cases:
        scales = SCALES.values() if case in ("defaults", "half power") else [1.0]
        try:
            with in_parts():
                found[case] = worst(*(stepped(case, run, scale) for scale in scales))
        except (ValueError, TypeError) as error:
            found[case] = f"{type(error).__name__}: {error}"
    return found


RUNS = sorted({(size, at.run) for at in LAYOUTS.values() for size in at.sizes})


def mistakes(case: str, layout: str, size: int, found: list[str] | str) -> list[str]:
    """What the claim about a case in a layout has that is not so; `found` is what `results` said, of all parameters."""
    kind, _, own = CASES[case]
    claimed = claim(case, kind, own, layout, size)
    if isinstance(found, str):
        return [] if REFUSED.get(claimed or "", "nothing") in found else [f"{claimed} but {found}"]
    here = [t for t, shape in zip(found, shapes_of(case), strict=True) if LAYOUTS[layout].has(shape, size, own)]
    # A claim of rounding that is none would hide an error of rounding.
    return [] if not here or max(here) == claimed else [f"{claimed} but {here}"]


@needs.cpu_kernels
@pytest.mark.parametrize(("size", "run"), RUNS)
def test_as_in_one_process(ranks: World, size: int, run: str) -> None:
    """Each case is exactly what the page says: of the parameters that a layout has, one is as far off as that."""
    layouts = [name for name, at in LAYOUTS.items() if at.run == run and size in at.sizes]
    cases = [case for case, (kind, _, own) in CASES.items() if claim(case, kind, own, layouts[0], size) is not None]
    found, *others = ranks.run(size, results, run, cases)
    wrong = {}
    for case in cases:
        same = found[case]
        for other in others:
            assert isinstance(same, str) == isinstance(other[case], str), (case, same, other[case])
            same = same if isinstance(same, str) else worst(same, other[case])
        for layout in layouts:
            if said := mistakes(case, layout, size, same):
                wrong[f"{case}, {layout}"] = said
    assert wrong == {}


def test_every_option_has_a_case() -> None:
    """Or is a layout, see LAYOUTS; and what is claimed is claimed of cases and layouts that there are."""
    for case, layouts in ROUNDED.items():
        assert case in CASES and layouts.keys() <= LAYOUTS.keys()
        assert all(set(sizes) <= set(LAYOUTS[name].sizes) for name, sizes in layouts.items())
    given = set().union(*(own for _, _, own in CASES.values()))
    assert OPTIONS.keys() - given <= {"lr", "strategy", "block_period", "block_lr_ratio"}
