"""Muon for the hidden matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..adamw_options import ADAMW_OPTIONS, check_cycled, check_group, checked_adamw, settle_adamw
from ..checkpoint import check_checkpoint
from ..closures import ClosureOptimizer
from ..distributed.agreement import Facts, options_of
from ..options import check_keys
from ..step.plan import Plan
from ..tensors import check_disjoint
from .adamw_checks import (
    ADAMW_STATE,
    check_adamw_state,
    check_gradient,
    check_step_size,
    new_adamw_state,
    same_layout,
)
from .muon import Muon

__all__ = ["MuonAdamW"]

_Groups = list[dict[str, Any]]
# Options of the groups of each half. `process_group` is for all groups of an optimizer.
OPTIONS = {"Muon": inspect.signature(Muon).parameters.keys() - {"params", "process_group"}, "AdamW": ADAMW_OPTIONS}


class MuonAdamW(ClosureOptimizer):
    """Muon and AdamW as one optimizer: `use_muon` of a param group says which of them steps it.

        optimizer = MuonAdamW(
            param_groups(model), muon_options={"lr": 0.02}, adamw_options={"lr": 3e-4}
        )

    Groups with `use_muon=True` are stepped by `Muon`, those with `use_muon=False` by `torch.optim.AdamW`, each with
    that optimizer's own options and state keys. Learning-rate schedulers, `add_param_group`, `GradScaler` and one
    `state_dict` work as with any optimizer. A `momentum` in an AdamW group is its first beta, so that schedulers which
    cycle momentum cycle both.

    Both halves are checked, and the state of both is made, before either is stepped. Muon steps first: Ctrl-C between
    the two leaves AdamW's half out. An AdamW that is not fused takes memory while it steps.

    Defaults are those of either optimizer, so groups differ in more than the learning rate: `weight_decay` is 0.1 for
    Muon and 0.01 for AdamW.

    Args:
        params: dicts with `params` and a boolean `use_muon`, as `muon_kernels.param_groups` makes them. An option in a
            dict wins over the same option below.
        muon_options: options of the Muon groups, any keyword of `Muon`.
        adamw_options: options of the AdamW groups, any keyword of `torch.optim.AdamW`. With none of `fused`, `foreach`
            and `differentiable` given, a group is `fused` if it can be: floating point, on CPU or CUDA, contiguous.

    Raises:
        ValueError: a group does not say `use_muon`, or no group has a parameter, or what `Muon` and `AdamW` raise.
        TypeError: an option outside `muon_options` and `adamw_options`, or one that is no number.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        muon_options: Mapping[str, Any] | None = None,
        adamw_options: Mapping[str, Any] | None = None,
        **misplaced: NoReturn,
    ) -> None:
        """Hand every group to its optimizer."""
        if misplaced:
            raise TypeError(
                f"options should be in muon_options={{...}} or adamw_options={{...}} but MuonAdamW was given: "
                f"{', '.join(misplaced)}"
            )
        if isinstance(params, nn.Module):
            raise TypeError("params should be groups but is a module; give muon_kernels.param_groups(model)")
        # Either half may have no group, but an optimizer cannot be built without one.
        self._muon = Muon([{"params": []}], **(muon_options or {}))
        self._adamw = checked_adamw(adamw_options or {})
        # Defaults that schedulers read: OneCycleLR and CyclicLR, to see that `momentum` can be cycled, and others.
        super().__init__(params, defaults={key: self._muon.defaults[key] for key in ("lr", "momentum")})
        if not any(group["params"] for group in self.param_groups):
            raise ValueError(
                "optimizer got an empty parameter list: some group should have a parameter but none has; "
                "is the whole model frozen?"
            )
        (_, groups), _ = self._inner()
        check_disjoint([("parameter", p) for group in groups for p in group["params"]])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group for Muon (`use_muon=True`) or AdamW (`use_muon=False`).

        That optimizer's defaults are written into the dict. Either all groups have names of their parameters, as those
        of `muon_kernels.param_groups` have, or none has: give pairs (name, parameter) beside groups with names.

        Args:
            param_group: a dict with `params`, `use_muon` and options that differ from the defaults.

        Raises:
            ValueError, TypeError: `use_muon` is missing, or what `Muon` and `AdamW` raise.
        """
        if not isinstance(param_group.get("use_muon"), bool):
            raise ValueError(
                "a param group should have use_muon=True or use_muon=False; "
                "muon_kernels.param_groups(model) makes such groups"
            )
        self._hand_over()
        if param_group["use_muon"]:
            self._muon.add_param_group(param_group)
            super().add_param_group(param_group)
            return
        cycled = "momentum" in param_group
        check_cycled(param_group)
        check_keys(param_group, self._adamw.defaults)
        self._adamw.add_param_group(param_group)
        settle_adamw(param_group)
        checked_adamw({key: param_group[key] for key in ADAMW_OPTIONS})
        _fuse(param_group)
        super().add_param_group(param_group)
        if not cycled:
            del param_group["momentum"]  # which is in the defaults for Muon

    def _update(self) -> None:
        """Step Muon's half, then AdamW's, after both have been checked."""
        self._hand_over()
        new: dict[Tensor, dict[str, Tensor]] = {}

        def check() -> None:
            for group in self._adamw.param_groups:
                settle_adamw(group)
                check_group(group)
                _check(group, self.state)
                _unfuse(group, self.state)
                new.update(self._new_state(group, [p for p in group["params"] if p.grad is not None]))

        def options() -> Facts:
            shared = filter(self._muon.shares, self._adamw.param_groups)
            named = [(f"AdamW's group {i}", group) for i, group in enumerate(shared)]
            return [fact for name, group in named for fact in options_of(name, group, ADAMW_OPTIONS)]

        # State that is made here must be usable outside of inference mode, too.
        with torch.inference_mode(False), torch.no_grad():
            self._muon.step_beside(check, options)
            for p, state in new.items():
                self.state[p].update(state)
            _unhooked_step(self._adamw)

    @torch.no_grad()
    def init_state(self) -> None:
        """Make all state that there will be, as `Muon.init_state` does. Parameters are not changed."""
        self._hand_over()
        for group in self._adamw.param_groups:
            settle_adamw(group)
            check_group(group)
        self._muon.init_state()
        with torch.inference_mode(False), torch.no_grad():
            for group in self._adamw.param_groups:
                new = self._new_state(group, [p for p in group["params"] if p.requires_grad])
                for p, state in new.items():
                    self.state[p].update(state)

    def _new_state(self, group: dict[str, Any], params: Iterable[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """Return AdamW's state of the parameters that have none of it yet. Keys of others in their state stay."""
        with_parameter = bool(group["fused"] or group["capturable"])
        return {
            p: new_adamw_state(p, group["amsgrad"], with_parameter)
            for p in params
            if not self.state.get(p, {}).keys() & ADAMW_STATE
        }

    def plan(self) -> Plan:
        """Return what the next step does with the Muon groups, and the host's time of whole steps; see `Muon.plan`."""
        self._hand_over()
        return replace(self._muon.plan(), host_seconds=self.host_seconds)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the state that ranks share to one of them; see `Muon.consolidate_state_dict`."""
        self._hand_over()
        self._muon.consolidate_state_dict(to)

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint; see `Muon.state_dict`."""
        self._hand_over()
        for group in self._adamw.param_groups:
            settle_adamw(group)
        with self._muon.whole_state():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned for the same kinds of groups in the same order.

        Each half is loaded as its optimizer does it: `Muon` keeps the precision of the momentum.

        Args:
            state_dict: the checkpoint.

        Raises:
            ValueError, TypeError: it is another optimizer's, or groups, sizes or options do not fit; nothing has been
                changed then.
        """
        check_checkpoint(state_dict, self.param_groups, "MuonAdamW", "use_muon")
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        saved = [group.get("use_muon") for group in state_dict["param_groups"]]
        order = [group["use_muon"] for group in self.param_groups]
        if not all(isinstance(use_muon, bool) for use_muon in saved) or saved != order:
            raise ValueError(f"use_muon of the loaded param groups should be {order} but is: {saved}")
        self._hand_over()
        loaded: dict[bool, Iterator[dict[str, Any]]] = {}
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for inner, use_muon in ((self._muon, True), (self._adamw, False)):
            groups = [group for group in state_dict["param_groups"] if group["use_muon"] is use_muon]
            ids = {index for group in groups for index in group["params"]}
            part = {
                "state": {index: value for index, value in state_dict["state"].items() if index in ids},
                "param_groups": groups,
            }
            if inner is self._adamw:
                part["param_groups"] = _checked_groups(part, inner)
                part = deepcopy(part)  # torch would share the moments
            inner.load_state_dict(part)
            loaded[use_muon] = iter(inner.param_groups)
            state.update(inner.state)
        self.state = state
        self.param_groups = [next(loaded[use_muon]) for use_muon in order]
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying keep."""
        return {**super().__getstate__(), "_muon": self._muon, "_adamw": self._adamw}

    def _inner(self) -> tuple[tuple[Muon, _Groups], tuple[AdamW, _Groups]]:
        """Return each inner optimizer with its groups."""
        return (
            (self._muon, [group for group in self.param_groups if group["use_muon"]]),
            (self._adamw, [group for group in self.param_groups if not group["use_muon"]]),
        )

    def _hand_over(self) -> None:
        """Give the inner optimizers our groups and our state.

        They keep nothing of their own between steps, so nothing can disagree, whoever replaces `param_groups` or
        `state`.
        """
        for inner, groups in self._inner():
            inner.param_groups = groups
            inner.state = self.state


def _unhooked_step(optimizer: Optimizer) -> None:
    """Step without the hooks and the profiler's record that torch wraps around every class's `step`: ours has them."""
    inspect.unwrap(type(optimizer).step, stop=lambda function: not hasattr(function, "hooked"))(optimizer)


def _checked_groups(checkpoint: dict[str, Any], adamw: AdamW) -> _Groups:
    """Return the AdamW groups of a checkpoint, options that they lack taken from `adamw`.

    Raises:
        ValueError, TypeError: `adamw` cannot load them.
    """
    amsgrad: dict[Tensor, bool] = {}
    groups: _Groups = []
    for own, group in zip(adamw.param_groups, checkpoint["param_groups"], strict=False):
        groups.append({**{key: own[key] for key in adamw.defaults if key in own}, **group})
        settle_adamw(groups[-1])
        check_group(groups[-1])
        amsgrad.update(dict.fromkeys(own["params"], groups[-1]["amsgrad"]))

    def check(of: str, p: Tensor, state: Mapping[str, Any]) -> None:
        check_adamw_state(of, p, state, amsgrad.get(p, False), saved=True)

    check_checkpoint(checkpoint, adamw.param_groups, "AdamW", "betas", check)
    return groups


def _fuse(group: dict[str, Any]) -> None:
    """Choose AdamW's fused step where the options leave it open and the parameters allow it."""
    if group["fused"] is group["foreach"] is None and not group["differentiable"]:
        if all(param.is_floating_point() and param.device.type in ("cpu", "cuda") for param in group["params"]):
            group["fused"] = True
            _unfuse(group, {})


def _unfuse(group: dict[str, Any], state: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Take back `fused=True` where a parameter, a gradient or a moment is not contiguous.

    The fused step pairs elements by their place in memory. On the CPU (torch 2.13) it silently updates with the wrong
    ones where two layouts differ; on CUDA it raises.
    """
    if group["fused"] and not all(same_layout(p, state.get(p, {})) for p in group["params"]):
        group["fused"] = None


def _check(group: dict[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Raise ValueError or TypeError where `AdamW.step` would, or should, refuse a gradient or the state of `group`."""
    for param in group["params"]:
        if param.grad is None:
            continue
        check_gradient(param, param.grad)
        check_step_size(param, group)
        kept = state.get(param, {})
        if kept.keys() & ADAMW_STATE:
            check_adamw_state("", param, kept, group["amsgrad"])
        if group["capturable"] and param.device.type == "cpu":
            raise ValueError("AdamW's capturable should be False for parameters on the CPU")
        if group["fused"] and not param.is_floating_point():
            raise ValueError(f"AdamW's fused should be False or None for parameters of {param.dtype} but is: True")
