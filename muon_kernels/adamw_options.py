"""Options of torch's AdamW: their checks, and plain values. torch finds faults in them while it steps, or never."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import AdamW

from .options import check_number, on_host, plain, settle

ADAMW_OPTIONS = inspect.signature(AdamW).parameters.keys() - {"params"}
_SWITCHES = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")


def check_numbers(group: Mapping[str, Any], of: str = "") -> None:
    """Raise ValueError or TypeError if a number of a group would fail a step, or make it NaN; `of` begins its name."""
    check_number(f"{of}lr", group["lr"])
    for key in ("weight_decay", "eps"):
        check_number(of + key, group[key])
        if isinstance(group[key], Tensor):
            raise TypeError(f"{of}{key} should be a number but is a tensor: {group[key]}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{of}betas should be two numbers but are: {betas!r}")
    for beta in betas:
        check_number(f"each of {of}betas", beta)
        if on_host(beta) and beta >= 1:
            raise ValueError(f"each of {of}betas should be < 1 but is: {beta}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise TypeError(f"{of}betas should be both numbers or both tensors but are: {betas!r}")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless torch's AdamW can step a group with these options."""
    check_numbers(group, "AdamW's ")
    for key in _SWITCHES:
        if key in group and not isinstance(group[key], bool):
            raise TypeError(f"AdamW's {key} should be True or False but is: {group[key]!r}")
    for key in ("foreach", "fused"):
        if group.get(key) is not None and not isinstance(group[key], bool):
            raise TypeError(f"AdamW's {key} should be True, False or None but is: {group[key]!r}")
    if group.get("differentiable"):
        raise ValueError("AdamW's differentiable should be False, as Muon's step is not, but is: True")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("AdamW's decoupled_weight_decay should be True, or it is Adam, but is: False")
    if group.get("fused") and group.get("foreach"):
        raise ValueError("AdamW's fused and foreach should not both be True")
    tensors = [name for name, x in (("lr", group["lr"]), ("betas", group["betas"][0])) if isinstance(x, Tensor)]
    if group.get("foreach") and tensors and not group.get("capturable"):
        raise ValueError(f"AdamW's {tensors[0]} should be a number with foreach=True but is a tensor")


def check_cycled(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a new group has `betas` and a `momentum`, which is its first beta, that differ."""
    betas = group.get("betas")
    if "momentum" in group and betas is not None and group["momentum"] != betas[0]:
        raise ValueError(
            "a group for AdamW should have betas or momentum, which is its first beta, but has both: "
            f"betas={betas} and momentum={group['momentum']}"
        )


def settle_adamw(group: dict[str, Any]) -> None:
    """Write plain values into an AdamW group, and to its first beta the `momentum` that a scheduler has given it."""
    settle(group, group.keys() & {*ADAMW_OPTIONS, "momentum"})
    betas = group["betas"]
    if "momentum" in group and isinstance(betas, (tuple, list)):
        group["betas"] = (group["momentum"], *betas[1:])


def checked_adamw(options: Mapping[str, Any]) -> AdamW:
    """Return an AdamW without parameters; raise ValueError or TypeError for options that it refuses or overlooks."""
    options = {key: plain(value) for key, value in options.items()}
    check_group({"lr": 0.0, "weight_decay": 0.0, "eps": 0.0, "betas": (0.0, 0.0), **options})
    return AdamW([{"params": []}], **options)
