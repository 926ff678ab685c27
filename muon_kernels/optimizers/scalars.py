"""Numbers that a step takes from a group: learning rate, weight decay, seed, and all else that steps may change."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from ..scaling import decayed
from ..step.options import as_scalar
from ..step.work import Scalars


def scalars_of(group: dict[str, Any]) -> Scalars:
    """Return the numbers that a step takes from `group`."""
    return Scalars(
        *_lr_and_decay(group),
        group["momentum"],
        group["nesterov"],
        group["dampened"],
        group["eps"],
        -1.0 if group["maximize"] else 1.0,
        group["cautious"],
        group["beta2"],
        _seed(group) if group["stochastic_rounding"] else None,
    )


def _one_cycle(group: Mapping[str, Any]) -> float | None:
    """Return the largest lr of the schedule as OneCycleLR writes it into a group, or None.

    `initial_lr` is then small.
    """
    largest = group.get("max_lr")
    return float(largest) if isinstance(largest, Real) else None


def set_peak_lr(group: dict[str, Any]) -> None:
    """Set a group's `peak_lr`, where it is None, to the largest learning rate that its schedule is known to reach."""
    if group["peak_lr"] is None:
        lr = group.get("initial_lr", group["lr"])  # a scheduler may have lowered lr to warm up
        largest = _one_cycle(group)
        group["peak_lr"] = largest if largest is not None else lr.clone() if isinstance(lr, Tensor) else lr


def peak_lr(group: Mapping[str, Any]) -> float | Tensor:
    """Return the largest lr of the schedule, also where OneCycleLR came after the group had its `peak_lr`."""
    peak, largest = as_scalar(group["peak_lr"]), _one_cycle(group)
    if largest is None:
        return peak
    return peak.clamp(min=largest) if isinstance(peak, Tensor) else max(peak, largest)


def _lr_and_decay(group: dict[str, Any]) -> tuple[float | Tensor, float | Tensor]:
    lr, weight_decay, form = group["lr"], group["weight_decay"], group["weight_decay_form"]
    if form == "decoupled":
        return lr, weight_decay
    return decayed(form, as_scalar(lr), as_scalar(weight_decay), peak_lr(group))


def _seed(group: dict[str, Any]) -> int:
    """Return the seed for one step's stochastic rounding.

    The numbers of matrices, which have 30 bits, are added to it; see numbers.py.
    """
    return int(group.get("step", 0)) << 30
