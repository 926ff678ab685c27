"""Factors of the learning rate by a matrix's shape, and of weight decay by the learning rate."""

import math
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

AdjustLr = Callable[[int, int], float]

# An orthogonal rows x cols matrix has RMS 1 / sqrt(max(rows, cols)), whatever the gradient was.
# Each rule undoes a part of that. max(cols, 1) is for parameters without elements.
ADJUST_LR: dict[str, AdjustLr] = {
    # sqrt(max(1, rows / cols)): https://github.com/KellerJordan/Muon
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / max(cols, 1))),
    # 0.2 sqrt(max(rows, cols)), for the RMS of AdamW's updates: https://arxiv.org/abs/2502.16982, eq. 4. What is not
    # quite orthogonal comes to another RMS: docs/options.md has it by coefficient set.
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    # sqrt(rows / cols), the RMS-to-RMS operator norm is lr: https://arxiv.org/abs/2310.17813
    # torch.optim.Muon has it from torch 2.14 on, by the longer name. Earlier ones read either name as "none".
    "spectral": lambda rows, cols: math.sqrt(rows / max(cols, 1)),
    "spectral_unclamped": lambda rows, cols: math.sqrt(rows / max(cols, 1)),
    "none": lambda rows, cols: 1.0,
}


def rule_name(rule: AdjustLr) -> str:
    """Return the name "package.module:qualname" of a function, by which a checkpoint can hold it.

    Raises:
        ValueError: there is no such function under its name.
    """
    name = f"{getattr(rule, '__module__', None)}:{getattr(rule, '__qualname__', None)}"
    if _found(name) is not rule:
        raise ValueError(
            f"Adjust learning rate function {rule} is not supported; it should be one that can be found by its name, "
            "which is what a checkpoint has of it: write it with `def` at the top level of a module"
        )
    return name


def _found(name: str) -> Any:
    """Return what "package.module:qualname" names, or None.

    Modules are not imported: the name may come from a checkpoint.
    """
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for attribute in qualname.split("."):
        found = getattr(found, attribute, None)
    return found


def rule_of(adjust_lr_fn: str | AdjustLr | None) -> AdjustLr:
    """Return the function that an option means.

    Args:
        adjust_lr_fn: a name in ADJUST_LR, None for "original", a function of (rows, cols), or what `rule_name`
            returned.

    Raises:
        ValueError: an unknown name.
    """
    if callable(adjust_lr_fn):
        return adjust_lr_fn
    name = "original" if adjust_lr_fn is None else adjust_lr_fn
    if isinstance(name, str):
        if name in ADJUST_LR:
            return ADJUST_LR[name]
        if callable(found := _found(name)):
            rule: AdjustLr = found
            return rule
    raise ValueError(
        f"Adjust learning rate function {name} is not supported; expected one of {', '.join(map(repr, ADJUST_LR))}, or "
        "a function of (rows, cols) at the top level of a module that has been imported"
    )


def lr_ratio(adjust_lr_fn: str | AdjustLr | None, rows: int, cols: int) -> float:
    """Return the factor of the learning rate for a rows x cols matrix. It does not apply to weight decay.

    Args:
        adjust_lr_fn: see `rule_of`.
        rows: of the matrix as the parameter holds it: outputs. May be 0.
        cols: of the matrix as the parameter holds it: inputs. May be 0.

    Raises:
        ValueError: an unknown name, or a function that returned a negative, infinite or NaN number.
        TypeError: a function that returned something other than a number.
    """
    ratio = rule_of(adjust_lr_fn)(rows, cols)
    if not isinstance(ratio, Real):
        raise TypeError(f"adjust_lr_fn({rows}, {cols}) should return a number but returned: {ratio!r}")
    if not 0.0 <= ratio < math.inf:
        raise ValueError(f"adjust_lr_fn({rows}, {cols}) should return a finite number >= 0 but returned: {ratio}")
    return float(ratio)


Number = float | Tensor

# Forms of the share of a parameter that decays in a step, from (lr, weight_decay, peak_lr).
WEIGHT_DECAY_FORMS = (
    "decoupled",  # lr·weight_decay: https://arxiv.org/abs/1711.05101 as torch writes it
    "independent",  # weight_decay, whatever lr is above 0: the same as its authors write it
    "scheduled",  # lr·weight_decay·lr/peak_lr, AdamC and MuonC: https://arxiv.org/abs/2506.02285
)


def decayed(form: str, lr: Number, weight_decay: Number, peak_lr: Number) -> tuple[Number, Number]:
    """Return the (lr, weight_decay) whose product decays parameters as `form` says; backends know no other form.

    Tensors stay on their device, and nothing waits for them.

    Args:
        form: in WEIGHT_DECAY_FORMS.
        lr: of this step. At 0 nothing moves, whatever the form: torch.distributed.checkpoint makes state by such a
            step. For "independent" any lr above 0 counts as at least 1e-30, so that the quotient is finite; no update
            shows it.
        weight_decay: as the user gave it.
        peak_lr: the largest lr of the schedule.
    """
    if form == "independent":
        if isinstance(lr, Tensor):
            divisor = lr.clamp(min=1e-30)
            return torch.where(lr > 0, divisor, 0.0), torch.where(lr > 0, weight_decay / divisor, 0.0)
        lr = max(lr, 1e-30) if lr else 0.0
        return lr, weight_decay / lr if lr else 0.0
    if form == "scheduled":
        return lr, weight_decay * lr / peak_lr
    return lr, weight_decay
