"""Checkpoints of `Muon`: whether one fits, and the options that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import check_precision
from ..distributed.ranks import Ranks, check_shared
from ..options import settled_checkpoint
from ..split import pieces
from ..stages.packed import check_mantissa, check_momentum_scale, pieces_of_shape
from ..stages.second_moment import check_second_moment
from ..step.options import splits, transposes
from ..tensors import is_dtensor
from .muon_checks import check_muon_options
from .state import VALUES


def with_momenta(state_dict: Any) -> Any:
    """Return a checkpoint in which the numbers of int8 momenta of DTensors are momenta; the next step converts them."""
    state = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(kept, Mapping) for kept in state.values()):
        return state_dict  # which is no checkpoint
    if not any(VALUES in kept for kept in state.values()):
        return state_dict
    named = {
        index: {"momentum_buffer" if key == VALUES else key: t for key, t in kept.items()}
        for index, kept in state.items()
    }
    return {**state_dict, "state": named}


def fitted(
    state_dict: dict[str, Any],
    states: Sequence[tuple[Tensor, dict[str, Any]]],
    groups: Sequence[dict[str, Any]],
    defaults: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """Return a checkpoint with the options that it lacks taken from `groups`.

    Args:
        state_dict: the checkpoint.
        states: every parameter that has state in it, with this state.
        groups: the param groups that are to load it.
        defaults: of the optimizer.
        ranks: of the optimizer.

    Raises:
        ValueError, TypeError: options or state do not fit the groups.
    """
    saved = settled_checkpoint(state_dict["param_groups"], groups, defaults)
    for group in saved:
        check_muon_options({**defaults, **group})
    state_of = dict(states)
    if [len(group["params"]) for group in saved] == [len(own["params"]) for own in groups]:  # else torch raises
        # A checkpoint of torch.optim.Muon lacks options: they stay as the group has them, instead of the defaults.
        for own, group in zip(groups, saved, strict=True):
            check_precision(own, group)
        # But lr is the checkpoint's, and so is the peak of its schedule.
        options = defaults.keys() - {"peak_lr"}
        kept = [{key: value for key, value in own.items() if key in options} for own in groups]
        for own, group in zip(kept, saved, strict=True):
            if group.get("ns_coefficients") != own["ns_coefficients"]:
                own.pop("ns_steps", None)
        saved = [{**own, **group} for own, group in zip(kept, saved, strict=True)]
        state_dict = {**state_dict, "param_groups": saved}
        for own, group in zip(groups, saved, strict=True):
            loaded = {**own, **defaults, **group, "params": own["params"]}
            check_muon_options(loaded)
            if ranks.shares(own["params"]):
                check_shared(loaded)
            transposes(loaded)
            for p, split in splits(loaded):
                pieces(p.shape, loaded["flatten"], split)
                state = state_of.get(p, {})
                # State may be of another precision than the group's: it is from before the option was changed.
                if "momentum_buffer" in state and state["momentum_buffer"].dtype == torch.int8:
                    if is_dtensor(p):
                        raise ValueError(
                            f"the momentum of a DTensor in a checkpoint should be {VALUES}, as DTensors' own have it, "
                            "but is momentum_buffer of int8, whose blocks are of another cut: load it where it was "
                            "saved, and change momentum_dtype there"
                        )
                    shapes = pieces_of_shape(p.shape, loaded["flatten"], split)
                    check_momentum_scale("momentum_scale", state.get("momentum_scale"), shapes)
                if "mantissa" in state:
                    check_mantissa("mantissa", state["mantissa"], p)
                V, form = state.get("second_momentum_buffer"), loaded["second_moment"]
                if V is not None and form is not None:
                    check_second_moment("second_momentum_buffer", V, form, p, loaded["flatten"], split)
    return state_dict
