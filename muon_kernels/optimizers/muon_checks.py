"""Checks of the options of a group of `Muon`, and of its parameters with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..distributed.ranks import Ranks, check_shared
from ..layout import split_shape
from ..options import check_options, check_together, dtype_of, settle
from ..split import pieces
from ..stages.packed import check_master
from ..step.options import check_rounding, schedule_for, splits
from ..step.plan import plan_for_shapes
from ..tensors import check_dense, check_like, check_matrices, local

_ADAMW_HINT = "; give vectors and scalars to AdamW (muon_kernels.MuonAdamW with muon_kernels.param_groups(model) does)"


def check_muon_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless a group has options that `Muon` can use, each by itself and together."""
    check_options(group)
    check_together(group)
    step = group.get("step", 0)
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 1 << 31:
        raise ValueError(f"step of a group, which counts its steps, should be an int from 0 to 2^31 but is: {step!r}")


def cost_of(p: Tensor, split: str | None, group: Mapping[str, Any]) -> int:
    """Return the FLOPs of a step of a parameter of a group, which is cut as `split` says.

    Raises:
        ValueError, TypeError, RuntimeError: it cannot be stepped with the group's options.
    """
    shapes = [split_shape(p.shape, group["flatten"], x) for x in pieces(p.shape, group["flatten"], split)]
    return plan_for_shapes(
        [(rows, cols, count) for count, rows, cols in shapes],
        schedule=schedule_for(group["ns_coefficients"], group["ns_steps"], group["power"]),
        device=p.device,
        dtype=p.dtype,
        backend=group["backend"],
        ns_algorithm=group["ns_algorithm"],
        max_workspace_bytes=group["max_workspace_bytes"],
        workspace_dtype=dtype_of(group.get("workspace_dtype", "bfloat16")),
    ).flops


def costs_of(group: Mapping[str, Any]) -> list[int]:
    """Return the FLOPs of a step of each parameter of a group of `Muon`.

    Raises:
        ValueError, TypeError, RuntimeError: a parameter cannot be stepped with the group's options.
    """
    costs = []
    for i, (p, split) in enumerate(splits(group)):
        name = group["param_names"][i] if "param_names" in group else "parameter"
        check_matrices(name, local(p), _ADAMW_HINT)
        if group["stochastic_rounding"]:
            check_rounding(p)
        if group["master_weights"]:
            check_master(p)
        costs.append(cost_of(p, split, group))
    return costs


def check_group(group: dict[str, Any], defaults: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise ValueError or TypeError unless the options of a group, which users may have edited, can be used."""
    settle(group, defaults)
    check_muon_options(group)
    if ranks.shares(group["params"]):
        check_shared(group)
        ranks.check(group)


def check_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError or TypeError unless gradients can be stepped, before other ranks wait for this one."""
    for group in groups:
        for p in group["params"]:
            if p.grad is not None:
                check_dense("gradient", local(p.grad))
                check_like("gradient", p.grad, p)
