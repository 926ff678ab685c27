"""Checks of checkpoints: whether one is of an optimizer, and fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tensors import MOMENTUM_DTYPES, check_dense, check_like, local


def check_checkpoint(
    state_dict: Any,
    groups: Sequence[dict[str, Any]],
    optimizer: str,
    option: str,
    check: Callable[[str, Tensor, Mapping[str, Any]], None] = lambda of, p, state: None,
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Raise ValueError or TypeError unless `state_dict` is a checkpoint of an optimizer; do not look at options.

    Args:
        state_dict: the checkpoint.
        groups: the param groups that are to load it.
        optimizer: name of the optimizer, for errors.
        option: an option that every param group of its checkpoints has.
        check: raises unless a parameter can have such a state; its first argument names the parameter in the error.

    Returns:
        Every parameter that has state in the checkpoint, with this state.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= set(state_dict):
        has = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"a checkpoint should be a dict with 'state' and 'param_groups' but is: {has}")
    state, saved_groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not all(isinstance(kept, Mapping) for kept in state.values()):
        raise TypeError("state of a checkpoint should be a dict of dicts, one a parameter, but is not")
    if not isinstance(saved_groups, (list, tuple)) or not all(
        isinstance(group, Mapping) and "params" in group for group in saved_groups
    ):
        raise TypeError("param_groups of a checkpoint should be a list of dicts with params but is not")
    for group in saved_groups:
        if option not in group:
            raise ValueError(
                f"a checkpoint of {optimizer} should have {option} in every group but has: {sorted(group)}"
            )
        if not isinstance(group["params"], (list, tuple)) or not all(map(_is_index, group["params"])):
            raise TypeError(
                f"params in the groups of a checkpoint should be lists of numbers or names but are: {group['params']!r}"
            )
    saved = [index for group in saved_groups for index in group["params"]]
    if len(set(saved)) < len(saved):
        raise ValueError("every parameter of a checkpoint should be there once but some are repeated")
    own = [p for group in groups for p in group["params"]]
    if len(saved) != len(own):
        return []  # torch raises for it
    states = []
    for index, p in zip(saved, own, strict=True):
        if kept := state.get(index):
            for key, value in kept.items():
                _check_loadable(f"{key} of parameter {index}", value, p)
            check(f" of parameter {index}", p, kept)
            states.append((p, kept))
    return states


def _is_index(index: Any) -> bool:
    return isinstance(index, (int, str)) and not isinstance(index, bool)


def _check_loadable(name: str, value: Any, p: Tensor) -> None:
    """Raise ValueError or TypeError for a tensor that torch could not copy, whatever its key is."""
    if not isinstance(value, Tensor):
        return
    if value.is_quantized:
        raise TypeError(f"{name} should be a plain tensor but is of: {value.dtype}")
    if value.is_meta and not p.is_meta:
        raise ValueError(f"{name} should have memory but is on the meta device")
    if not value.is_leaf:
        raise ValueError(f"{name} should be a tensor by itself but is the result of an operation; detach it")


def check_state(of: str, p: Tensor, state: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless `p` can have this state, as far as that does not depend on options."""
    if "momentum_buffer" not in state:
        raise ValueError(f"state{of} should have momentum_buffer but has: {', '.join(map(str, state))}")
    for key in STATE:
        if key in state:
            check_dense(key + of, local(state[key]), (*MOMENTUM_DTYPES, torch.int16))
    check_dense("momentum_buffer" + of, local(state["momentum_buffer"]), MOMENTUM_DTYPES)
    check_like("momentum_buffer" + of, state["momentum_buffer"], p)


def check_precision(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise ValueError if either the checkpoint's group or ours keeps its state packed, and the other does not."""
    for key, packed, without in (("momentum_dtype", "int8", None), ("master_weights", True, False)):
        wanted, found = own[key], saved.get(key, without)  # torch.optim.Muon has neither
        if (wanted == packed) != (found == packed):
            raise ValueError(
                f"{key} of the checkpoint should be {wanted}, as in this optimizer, but is: {found}; "
                f"loading converts nothing: load it into an optimizer with {key}={found!r}, then change that in its "
                "param_groups"
            )


# Keys of the state that `Muon` may keep of a parameter, all tensors.
STATE = ("momentum_buffer", "momentum_scale", "mantissa", "second_momentum_buffer")
