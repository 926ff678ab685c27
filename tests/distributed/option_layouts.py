"""The ways in which ranks hold parameters, and what a step of an option is in each: test_options.py runs all of it.

`PYTHONPATH=tests python tests/distributed/options_page.py` writes docs/distributed-options.md from the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muon_kernels import SpectralAdam
from muon_kernels.distributed import ZeroMuon
from muon_kernels.layout import flattens

Shape = tuple[int, ...]
# Puts a whole tensor, which is the `i`-th parameter or its gradient, where it belongs.
Place = Callable[[Tensor, int], Tensor]


def _mesh(*sizes: int, names: str = "ab") -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple(names[: len(sizes)]))


def _on(mesh: DeviceMesh, placements_of: Callable[[Shape, int], Sequence[Any]]) -> Place:
    return lambda t, i: distribute_tensor(t, mesh, placements_of(t.shape, i), src_data_rank=None)


def _of_tensor_parallel(shape: Shape, i: int, own: Mapping[str, Any]) -> int:
    """The dimension that is cut: of rows and columns in turn, as of the two matrices of an MLP."""
    return 0 if flattens(shape, own.get("flatten")) else len(shape) - 2 + i % 2


def _longer(shape: Shape, own: Mapping[str, Any]) -> int:
    return 0 if flattens(shape, own.get("flatten")) else len(shape) - 2 + (shape[-1] > shape[-2])


def _whole_parts(shape: Shape, own: Mapping[str, Any]) -> int:
    """A dimension that no split divides: so the parts of a rank are those of the whole, and may be stepped as such."""
    by_rows = own.get("split") is not None and "dim=1" not in own["split"]
    return 0 if flattens(shape, own.get("flatten")) else len(shape) - 2 + by_rows


def _fsdp_and_tp(own: Mapping[str, Any]) -> Place:
    """What fully_shard makes of tensor-parallel parameters; it is asked once a shape which elements a rank holds."""
    # Under names of its own: torch keeps in mind the groups of a mesh that looks the same, also when they are gone.
    both, found = _mesh(2, dist.get_world_size() // 2, names="dt"), dict[tuple[Shape, int], DTensor]()

    def place(t: Tensor, i: int) -> Tensor:
        dim = _of_tensor_parallel(t.shape, i, own)
        if (t.shape, dim) not in found:
            numbers = torch.arange(t.numel(), dtype=torch.float32).view(t.shape)
            module = nn.Module()
            module.weight = nn.Parameter(distribute_tensor(numbers, both["t"], [Shard(dim)], src_data_rank=None))
            fully_shard(module, mesh=both["d"])
            found[t.shape, dim] = module.weight
        at = found[t.shape, dim]
        mine = t.flatten()[at.to_local().detach().long()]
        return DTensor.from_local(
            mine, at.device_mesh, at.placements, run_check=False, shape=t.shape, stride=t.contiguous().stride()
        )

    return place


def placed(run: str, own: Mapping[str, Any]) -> Place:
    """How a run places parameters that are given the options `own`; for all ranks to call."""
    size = dist.get_world_size()
    if run in ("group", "ZeRO-1"):
        return lambda t, i: t.clone()
    if run == "FSDP2 and TP":
        return _fsdp_and_tp(own)
    one = _mesh(size)
    return {
        "rows": lambda: _on(one, lambda shape, i: [Shard(0)]),
        "columns": lambda: _on(one, lambda shape, i: [Shard(1 if i % 2 else -1)]),
        "copies": lambda: _on(one, lambda shape, i: [Replicate()]),
        "copies of rows": lambda: _on(_mesh(2, size // 2), lambda shape, i: [Replicate(), Shard(0)]),
        "rows and columns": lambda: _on(_mesh(2, size // 2), lambda shape, i: [Shard(0), Shard(1)]),
        "TP": lambda: _on(one, lambda shape, i: [Shard(_of_tensor_parallel(shape, i, own))]),
        "gram": lambda: _on(one, lambda shape, i: [Shard(_longer(shape, own))]),
        "blocks": lambda: _on(one, lambda shape, i: [Shard(_whole_parts(shape, own))]),
    }[run]()


def _is_stack(shape: Shape, own: Mapping[str, Any]) -> bool:
    return len(shape) > 2 and not flattens(shape, own.get("flatten"))


def _last(rows: int, size: int) -> int:
    """Rows of the last rank's shard, as torch cuts; below zero if others have none either."""
    return rows - -(-rows // size) * (size - 1)


class Layout(NamedTuple):
    """A column of the table.

    Attributes:
        run: how parameters are placed, see `placed`. Several columns may be of one run.
        sizes: numbers of ranks.
        has: whether a parameter of a case with options is of this column, on so many ranks.
        description: for the page.
    """

    run: str
    sizes: tuple[int, ...]
    description: str
    has: Callable[[Shape, int, Mapping[str, Any]], bool] = lambda shape, size, own: True


LAYOUTS: dict[str, Layout] = {
    "copies": Layout("group", (1, 2, 3, 4), "plain tensors with `process_group`, as under DDP"),
    "even rows": Layout(
        "rows",
        (1, 2, 3, 4),
        "`Shard(0)`, as by FSDP2; all ranks have as many rows",
        lambda shape, size, own: not _is_stack(shape, own) and shape[0] % size == 0,
    ),
    "uneven rows": Layout(
        "rows",
        (2, 3, 4),
        "`Shard(0)`; the last rank that has rows has fewer",
        lambda shape, size, own: not _is_stack(shape, own) and shape[0] % size > 0 and _last(shape[0], size) > 0,
    ),
    "empty shards": Layout(
        "rows",
        (2, 3, 4),
        "`Shard(0)`; some ranks have no rows",
        lambda shape, size, own: not _is_stack(shape, own) and shape[0] > 0 and _last(shape[0], size) <= 0,
    ),
    "experts": Layout(
        "rows",
        (1, 2, 3, 4),
        "stacks cut by `Shard(0)`: every rank has whole matrices",
        lambda shape, size, own: _is_stack(shape, own),
    ),
    "columns": Layout("columns", (2, 3, 4), "`Shard(1)` and `Shard(-1)`"),
    "replicated DTensors": Layout("copies", (4,), "`Replicate()`"),
    "HSDP": Layout("copies of rows", (2, 4), "`[Replicate(), Shard(0)]` on two times half of the ranks"),
    "TP": Layout("TP", (4,), "rows and columns in turn, as `ColwiseParallel` and `RowwiseParallel` cut"),
    "rows and columns": Layout("rows and columns", (4,), "`[Shard(0), Shard(1)]` on two times two ranks"),
    "FSDP2 and TP": Layout("FSDP2 and TP", (4,), "`fully_shard` of tensor-parallel parameters, two times two ranks"),
    "gram": Layout("gram", (2, 3, 4), '`strategy="gram"`, the longer dimension cut'),
    "blocks": Layout("blocks", (2, 3, 4), '`strategy="blocks"`: a step of parts is that of each part alone'),
    "ZeRO-1": Layout("ZeRO-1", (1, 2, 3, 4), "`ZeroMuonAdamW`, the mean gradient being that of one process"),
}

# Numbers of ranks on which the layouts cut a matrix; and those on which they cut its rows.
CUT = {
    **{"even rows": (2, 3, 4), "uneven rows": (2, 3, 4), "empty shards": (3, 4), "columns": (2, 3, 4), "HSDP": (4,)},
    **{"TP": (4,), "rows and columns": (4,), "FSDP2 and TP": (4,), "blocks": (2, 3, 4)},
}
ROWS_CUT = {"columns": (2, 3, 4), "TP": (4,), "rows and columns": (4,), "FSDP2 and TP": (4,)}

_OF = ("", " of heads", " of columns", " of queries", " of experts", " of convolutions")
RANDOM = [f"random bits{of}" for of in _OF]

# The numbers of ranks on which a case is that of one process to rounding only. On all others it has its bits.
ROUNDED: dict[str, Mapping[str, Sequence[int]]] = {
    # Partial sums of squares, of a row that is cut, are in another order than those of one process.
    "rows": ROWS_CUT,
    "slow squares": ROWS_CUT,
    "rows of heads": ROWS_CUT,
    "rows of quarters": {"columns": (3,)},  # a rank of two or four has whole quarters
    "rows of experts": {"columns": (3, 4), "TP": (4,)},
    # So are those of a matrix.
    "elements": CUT,
    "elements of queries": {**CUT, "even rows": (3, 4), "HSDP": ()},  # the first of two ranks has the queries
    # "eager" normalizes slices before it rounds them.
    "fp16 workspace": CUT,
    # A block that is cut has another largest element.
    "int8 momentum": {**ROWS_CUT, "uneven rows": (3,)},
    "int8 momentum of wide rows": ROWS_CUT,
    "int8 momentum of heads": {"uneven rows": (3,), "columns": (2, 3, 4), "rows and columns": (4,), "gram": (3,)},
    # Parts by themselves, with which "blocks" is compared, have other random bits; test_random_bits.py has its own.
    **{case: {"blocks": (2, 3, 4)} for case in RANDOM},
    # The mean of three equal gradients is not always the same number.
    "SGD": {"ZeRO-1": (3,)},
}
# Cases of which no matrix is summed by "gram": parts that the cut leaves whole, or cuts along their shorter side; SGD.
NOT_SUMMED = ("rows of heads", "heads", "thirds", "grouped queries", "convolutions", "SGD", "int8 momentum of heads")
NOT_SUMMED += ("random bits of heads", "random bits of convolutions")

BITS, ROUNDING = "bits", "rounding"
# Why something is refused, in the words of the page, with those of the error.
REFUSED = {
    "ZeRO-1 does not have the option": "an option of Muon that ZeroMuon does not have; leave it out",
    "`SpectralAdam` has no `strategy`": "got an unexpected keyword argument 'strategy'",
    "no rank has a whole direction": "for strategy='gram', in which no rank has a whole direction",
    "flattened parameters are cut along dimension 0 only": "flattened to matrices should be sharded along dimension 0",
}


def refusal(kind: type, own: Mapping[str, Any], layout: str) -> str | None:
    """A key of REFUSED, or None."""
    strategy = layout in ("gram", "blocks")
    refused = [
        layout == "ZeRO-1" and not own.keys() - {"backend"} <= inspect.signature(ZeroMuon).parameters.keys(),
        strategy and kind is SpectralAdam,
        layout == "gram" and bool({"sign_momentum", "exact_rms"} & own.keys()),
        layout in ("columns", "rows and columns") and bool(own.get("flatten")),
    ]
    return next((text for text, here in zip(REFUSED, refused, strict=True) if here), None)


def claim(case: str, kind: type, own: Mapping[str, Any], layout: str, size: int) -> str | None:
    """What the page says of a case: BITS, ROUNDING, a key of REFUSED, or None where there is no such thing."""
    if layout == "ZeRO-1" and kind is SpectralAdam:
        return None  # ZeRO-1 has the formulas of Muon and of AdamW
    if reason := refusal(kind, own, layout):
        return reason
    rounded = size in ROUNDED.get(case, {}).get(layout, ())
    if layout == "gram":
        rounded |= case not in NOT_SUMMED
    if layout == "ZeRO-1":
        rounded |= own.get("power") != 1
    return ROUNDING if rounded else BITS
