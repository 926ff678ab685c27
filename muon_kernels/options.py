"""What an option may be: checks that several callers share, each raising with what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .newton_schulz import ALGORITHMS
from .scaling import WEIGHT_DECAY_FORMS
from .second_moment import FORMS


def on_host(value: Any) -> bool:
    """Whether it costs no synchronisation to look at the number."""
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def check_number(name: str, value: Any) -> None:
    """Raise unless `value` is a finite number >= 0, or a tensor of one; on a device only its size is looked at."""
    if type(value) is float and 0.0 <= value < math.inf:  # which it nearly always is, in every step
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} should be a number but is: {value!r}")
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise ValueError(f"{name} should be one real number but is a tensor of size {tuple(value.shape)}")
    if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided or value.is_quantized):
        raise TypeError(
            f"{name} should be a number but is a tensor of {value.dtype}, {value.layout}, on {value.device}"
        )
    if not on_host(value):
        return
    number = float(value)
    if not 0.0 <= number:
        raise ValueError(f"{name} should be >= 0 but is: {value}")
    if number == math.inf:
        raise ValueError(f"{name} should be finite but is: {value}")


def check_eps(eps: Any) -> None:
    """Raise unless `eps` is in [0, 1)."""
    check_number("eps", eps)
    if eps >= 1:
        raise ValueError(f"eps should be < 1, the smallest norm that it is compared with, but is: {eps}")


def check_fraction(name: str, value: Any) -> None:
    """Raise unless `value` is in [0, 1)."""
    check_number(name, value)
    if value >= 1:
        raise ValueError(f"{name} should be < 1 but is: {value}")


def check_choice(name: str, value: Any, among: Collection[Any]) -> None:
    """Raise ValueError unless `value` is one of those that there are."""
    if not isinstance(value, (str, type(None))) or value not in among:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, among))} but is: {value!r}")


def check_weight_decay_form(form: Any, peak_lr: Any) -> None:
    """Raise unless there is such a form, and it has the `peak_lr` that it needs; None is one to come."""
    check_choice("weight_decay_form", form, WEIGHT_DECAY_FORMS)
    if peak_lr is not None:
        check_number("peak_lr", peak_lr)
    if form == "scheduled" and on_host(peak_lr) and peak_lr == 0:
        raise ValueError(
            "peak_lr should be > 0 for weight_decay_form='scheduled' but is: 0; give the largest lr of the schedule"
        )


SECOND_MOMENTS = (None, *FORMS)


def check_relatives(group: Mapping[str, Any]) -> None:
    """Raise ValueError where options of a group do not go together."""
    power, form = group["power"], group["second_moment"]
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError("stochastic_rounding should be False where master_weights is True, which rounds nothing away")
    if group["strategy"] == "gram" and group["sign_momentum"]:
        raise ValueError("sign_momentum should be False for strategy='gram', in which no rank has a whole direction")
    if power != 1:
        return
    if form is not None:
        raise ValueError(f"second_moment should be None where power is 1, which is SGD in torch, but is: {form!r}")
    for name in ("cautious", "sign_momentum", "stochastic_rounding", "master_weights"):
        if group[name]:
            raise ValueError(f"{name} should be False where power is 1, which is SGD in torch")
    if group["momentum_dtype"] == torch.int8:
        raise ValueError(
            "momentum_dtype should be floating-point where power is 1, which is SGD in torch, but is: int8"
        )


def check_second_moment_form(form: Any) -> None:
    """Raise ValueError unless there is such a second moment, or it is None."""
    check_choice("second_moment", form, SECOND_MOMENTS)


def check_algorithm(name: Any) -> None:
    """Raise ValueError unless there is such a form of the iteration, or it is "auto"."""
    if not isinstance(name, str) or name not in ("auto", *ALGORITHMS):
        raise ValueError(f"ns_algorithm should be 'auto' or one of {', '.join(map(repr, ALGORITHMS))} but is: {name!r}")


def check_workspace(cap: Any) -> None:
    """Raise unless `cap` is a positive int or None."""
    if cap is None:
        return
    if isinstance(cap, bool) or not isinstance(cap, int):
        raise TypeError(f"max_workspace_bytes should be a positive int or None but is: {cap!r}")
    if cap <= 0:
        raise ValueError(f"max_workspace_bytes should be a positive int or None but is: {cap}")


WORKSPACE_DTYPES = (torch.bfloat16, torch.float16)


def check_workspace_dtype(dtype: Any) -> None:
    """Raise ValueError unless stacks can be of that dtype."""
    if dtype not in WORKSPACE_DTYPES:
        raise ValueError(f"workspace_dtype should be torch.bfloat16 or torch.float16 but is: {dtype!r}")
