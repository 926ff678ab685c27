"""Every option that ranks can step with, on parameters of all kinds, against one process, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import needs
from ranks import World
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from muon_kernels import Muon, SpectralAdam, SpectralMomentum
from muon_kernels.distributed import lots
from muon_kernels.split import blocks, equal, heads, qkv

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
SCALES = {"": 1.0, "tiny gradients": 1e-25, "huge gradients": 1e25}


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(case: str, place: Any, scale: float, **options: Any) -> tuple[list[Tensor], Optimizer]:
    """Three steps with the same gradients wherever the parameters are; a gradient is missing in the second."""
    kind, shapes, own = CASES[case]
    dtype = torch.bfloat16 if {"master_weights", "stochastic_rounding"} & own.keys() else torch.float32
    params = [torch.nn.Parameter(place((random(shape, i) * 0.1).to(dtype))) for i, shape in enumerate(shapes)]
    optimizer = kind(params, **{"lr": 0.02, "backend": "cpu", **own, **options})  # type: ignore[call-arg]
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = None if step == 1 and i == 1 else place((random(shapes[i], 100 + 10 * step + i) * scale).to(dtype))
        optimizer.step()
    return [p.detach() for p in params], optimizer


def kept(optimizer: Optimizer, key: str) -> dict[int, Tensor]:
    """What this rank keeps under a key of the state, whole, by the index of the parameter."""
    found = {i: optimizer.state.get(p, {}).get(key) for i, p in enumerate(optimizer.param_groups[0]["params"])}
    wide = {i: t.int() if t.dtype == torch.int16 else t for i, t in found.items() if t is not None}  # gloo has no int16
    return {i: t.full_tensor() if isinstance(t, DTensor) else t for i, t in wide.items()}


def compare(layout: str) -> list[str]:
    """The cases in which a rank's result differs from one process's."""
    size = dist.get_world_size()
    one = init_device_mesh("cpu", (size,), mesh_dim_names=("a",))
    placements: dict[str, tuple[Any, list[Any]]] = {
        "rows": (one, [Shard(0)]),
        "columns": (one, [Shard(1)]),
        "last": (one, [Shard(-1)]),
        "copies": (one, [Replicate()]),
    }
    if size == 4:
        two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("b", "c"))
        placements["copies of rows"] = two, [Replicate(), Shard(0)]
        placements["rows and columns"] = two, [Shard(0), Shard(1)]
    lots._NUMBERS_ON_CPU = 2000  # several matrices at a time, and not all
    different = []
    for case, (_, _, own) in CASES.items():
        for name, scale in SCALES.items():
            if name and case not in ("defaults", "half power"):
                continue
            options: dict[str, Any] = {}
            if layout == "group":
                place, options["process_group"] = (lambda t: t), dist.group.WORLD
            else:
                mesh, where = placements[layout]
                if own.get("flatten") and layout not in ("rows", "copies", "copies of rows"):
                    continue  # refused
                place = lambda t, mesh=mesh, where=where: distribute_tensor(t, mesh, where, src_data_rank=None)
            found, optimizer = steps(case, place, scale, **options)
            expected, alone = steps(case, lambda t: t, scale)
            whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in found]
            # Partial sums of squares, of a row that is cut or of a matrix, are in fp32, and in another order. "eager"
            # rounds slices twice. Blocks that are cut have another absmax.
            by_rows = ("group", "rows", "copies", "copies of rows")
            exact = {"neuron": by_rows, "element": ("group", "copies")}.get(own.get("second_moment"), (layout,))
            if own.get("momentum_dtype") == torch.int8:
                exact = ("group", "copies") if size == 3 else by_rows
            close = layout not in exact or own.get("backend") == "eager"
            same = (lambda a, b: torch.allclose(a, b, rtol=0, atol=3e-4)) if close else torch.equal
            # A constant factor of a moment would not show in the update, whose norm is kept.
            if close and "second_moment" in own:
                wanted = kept(alone, "second_momentum_buffer")
                for i, V in kept(optimizer, "second_momentum_buffer").items():
                    torch.testing.assert_close(V, wanted[i], rtol=1e-3, atol=1e-6)
            if own.get("master_weights"):  # which the parameters show half of; every rank keeps all
                lower, wanted = kept(optimizer, "mantissa"), kept(alone, "mantissa")
                assert lower.keys() == wanted.keys()
                whole, expected = [*whole, *lower.values()], [*expected, *wanted.values()]
            if not all(map(same, whole, expected)):
                different.append(f"{case} {name}")
    return different


LAYOUTS = {
    2: ("group", "rows", "columns", "last"),
    3: ("group", "rows", "columns"),
    4: ("group", "rows", "copies", "copies of rows", "rows and columns"),
}


@needs.cpu_kernels
@pytest.mark.parametrize(
    ("size", "layout"), [(size, layout) for size, layouts in LAYOUTS.items() for layout in layouts]
)
def test_as_in_one_process(ranks: World, size: int, layout: str) -> None:
    for different in ranks.run(size, compare, layout):
        assert not different
