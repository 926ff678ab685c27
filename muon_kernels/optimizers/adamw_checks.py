"""Checks of what torch's AdamW steps: gradients and state; those of options are in adamw_options.py.

torch finds faults while it steps, when some parameters have been stepped already, or never: the fused step reads and
writes whatever lies at a moment's address. So everything is checked here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layout import overlaps_itself
from ..options import check_number, on_host
from ..tensors import DTYPES, check_dense, check_device, check_like, local

MOMENTS = ("exp_avg", "exp_avg_sq")
ADAMW_STATE = {"step", *MOMENTS, "max_exp_avg_sq"}
_COMPLEX = (torch.complex64, torch.complex128, torch.complex32)
_COUNTS = (torch.float32, torch.float64)


def check_gradient(p: Tensor, grad: Tensor) -> None:
    """Raise ValueError or TypeError unless the gradient is of the parameter's size, dtype and device, and dense."""
    if not isinstance(grad, Tensor) or grad.layout != torch.strided:
        raise TypeError("AdamW's gradients should be dense but one is sparse")
    if grad.dtype != p.dtype:
        raise TypeError(f"AdamW's gradients should be of the parameter's dtype {p.dtype} but one is of: {grad.dtype}")
    if grad.shape != p.shape or grad.device != p.device:
        check_like("gradient", grad, p)
        check_device("gradient", grad, p)


def check_step_size(p: Tensor, group: Mapping[str, Any]) -> None:
    """Raise ValueError if the first step's size is beyond the range of the parameter's dtype."""
    lr, beta1 = group["lr"], group["betas"][0]
    if isinstance(lr, Tensor) or isinstance(beta1, Tensor) or lr <= 1:
        return
    if lr / (1 - beta1) > torch.finfo(p.dtype).max:
        raise ValueError(f"lr, divided by 1 - beta1, should be at most {torch.finfo(p.dtype).max} but lr is: {lr}")


def check_count(name: str, step: Any) -> None:
    """Raise ValueError or TypeError unless `step` can be AdamW's count of steps: one float, not below zero."""
    if isinstance(step, Tensor) and (step.dtype not in _COUNTS or step.layout != torch.strided):
        raise TypeError(f"{name} should be of float32, which counts each step, but is of: {step.dtype}")
    check_number(name, step)


def check_adamw_state(of: str, p: Tensor, state: Mapping[str, Any], amsgrad: bool = False, saved: bool = False) -> None:
    """Raise ValueError or TypeError unless torch's AdamW can step `p` with this state.

    Args:
        of: names the parameter in the error.
        p: the parameter.
        state: of it, not empty.
        amsgrad: the option.
        saved: in a checkpoint, which is cast to the parameter's dtype and device, and whose step may be a number.
    """
    moments = (*MOMENTS, "max_exp_avg_sq") if amsgrad else MOMENTS
    if all(_is_ordinary(state.get(key), p) for key in moments) and _is_count(state.get("step")):
        return  # nearly always so, and asked in every step
    for key in moments:
        if key not in state:
            raise ValueError(f"state{of} should have {', '.join(moments)} but has: {', '.join(map(str, state))}")
        moment = state[key]
        check_dense(key + of, local(moment), _COMPLEX if p.is_complex() else DTYPES)
        check_like(key + of, moment, p)
        if overlaps_itself(local(moment).shape, local(moment).stride()):
            raise ValueError(
                f"{key}{of} should have memory for every element but its strides {local(moment).stride()} give several "
                "elements the same; clone it"
            )
        if saved:
            continue
        if moment.dtype != p.dtype:
            raise ValueError(f"{key}{of} should be of the parameter's dtype {p.dtype} but is of: {moment.dtype}")
        check_device(key + of, moment, p)
    step = state.get("step")
    if not isinstance(step, Tensor) and not (saved and isinstance(step, (int, float))):
        raise ValueError(f"state{of} should have step, a tensor, but has: {step!r}; delete the state to start anew")
    check_count("step" + of, step)


def _is_ordinary(moment: Any, p: Tensor) -> bool:
    return (
        type(moment) is Tensor
        and moment.dtype == p.dtype
        and moment.shape == p.shape
        and moment.device == p.device
        and moment.layout == torch.strided
        and moment.is_contiguous()
    )


def _is_count(step: Any) -> bool:
    if type(step) is not Tensor or step.dtype != torch.float32 or step.ndim:
        return False
    return not on_host(step) or step.item() >= 0


def new_adamw_state(p: Tensor, amsgrad: bool = False, with_parameter: bool = False) -> dict[str, Tensor]:
    """Return the state that torch's AdamW begins with. AdamW itself makes it piece by piece while it steps.

    Args:
        p: the parameter.
        amsgrad: the option.
        with_parameter: whether the count of steps is on the parameter's device, as with `fused` and `capturable`.
    """
    step = torch.zeros((), dtype=torch.float32, device=p.device if with_parameter else "cpu")
    moments = (*MOMENTS, "max_exp_avg_sq") if amsgrad else MOMENTS
    return {"step": step, **{key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in moments}}


def same_layout(p: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether the fused step, which pairs elements by their place in memory, pairs those that belong together."""
    tensors = [p, p.grad, *(state.get(key) for key in (*MOMENTS, "max_exp_avg_sq"))]
    return all(t.is_contiguous() for t in tensors if isinstance(t, Tensor))
