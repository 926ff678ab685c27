"""AdamW on flat slices, and with Muon as one optimizer: it goes element by element, so a slice is stepped as it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ...adamw_options import check_cycled, check_group, checked_adamw, settle_adamw
from ...tensors import check_dense, check_whole
from ..collectives import on_all
from .flat import Flat, lay_out
from .muon import ZeroMuon
from .optimizer import Half, ZeroOptimizer, group_of


class ZeroMuonAdamW(ZeroOptimizer):
    """`MuonAdamW` for replicated parameters with sharded state, ZeRO-1: `ZeroMuon` and AdamW as one optimizer.

        optimizer = ZeroMuonAdamW(param_groups(model), muon_options={"lr": 0.02}, adamw_options={"lr": 3e-4})

    Groups with `use_muon=True` are stepped as by `ZeroMuon`, whose description holds for all groups: gradients are each
    rank's own, and other dtypes than fp32 have fp32 master copies. Groups with `use_muon=False` are stepped by
    torch.optim.AdamW's function on each rank's slice. The result is that of torch.optim.AdamW in fp32 with the mean
    gradient, bit for bit on CPUs; with `fused=True` second moments may differ in their last bit.

    The state of an AdamW group is in that of its first parameter: `exp_avg`, `exp_avg_sq` and maybe `max_exp_avg_sq`,
    one-dimensional DTensors, and `step`, on every rank a vector with the number of steps of each parameter. A
    `momentum` in such a group is its first beta, so that schedulers which cycle momentum cycle both halves.

    Args:
        params: dicts with `params` and a boolean `use_muon`, as `muon_kernels.param_groups` makes them, the same on all
            ranks. Those of a group are of one dtype and on one device. An option in a dict wins over the same option
            below.
        muon_options: options of the Muon groups and `process_group`, any keyword of `ZeroMuon`.
        adamw_options: options of the AdamW groups, any keyword of `torch.optim.AdamW` but `capturable` and
            `differentiable`.

    Raises:
        ValueError: a group does not say `use_muon`, or an argument that cannot be used.
        TypeError: an option outside `muon_options` and `adamw_options`, or one that is no number.
        RuntimeError: another rank refuses its arguments.
    """

    _marks = "use_muon"

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        muon_options: Mapping[str, Any] | None = None,
        adamw_options: Mapping[str, Any] | None = None,
        **misplaced: NoReturn,
    ) -> None:
        """Check everything and make the state."""
        of_muon = dict(muon_options or {})

        def checked() -> dict[str, Any]:
            if misplaced:
                raise TypeError(
                    "options should be in muon_options={...} or adamw_options={...} but ZeroMuonAdamW was given: "
                    f"{', '.join(misplaced)}"
                )
            inspect.signature(ZeroMuon).bind([], **of_muon)
            return checked_adamw(adamw_options or {}).defaults

        adamw_defaults = on_all(group_of(of_muon.get("process_group")), checked)
        # Either half may have no group, but an optimizer cannot be built without one.
        muon = ZeroMuon([{"params": []}], **of_muon)
        self._halves: dict[bool, Half] = {True: muon.half, False: AdamWHalf(adamw_defaults, muon.half.ranks)}
        # Defaults that schedulers read: OneCycleLR and CyclicLR, to see that `momentum` can be cycled, and others.
        defaults = {key: muon.defaults[key] for key in ("lr", "momentum")}
        super().__init__(params, defaults, muon.half.ranks)
        if not any(group["params"] for group in self.param_groups):
            raise ValueError(
                "optimizer got an empty parameter list: some group should have a parameter but none has; "
                "is the whole model frozen?"
            )

    def _half(self, group: Mapping[str, Any]) -> Half:
        if not isinstance(group.get("use_muon"), bool):
            raise ValueError(
                "a param group should have use_muon=True or use_muon=False; "
                "muon_kernels.param_groups(model) makes such groups"
            )
        return self._halves[group["use_muon"]]


class AdamWHalf(Half):
    """torch's AdamW, on flat slices."""

    def check_new(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if options that a new group is given are misspelt or contradict each other."""
        super().check_new(group)
        check_cycled(group)

    def settle(self, group: dict[str, Any]) -> None:
        """Replace options of a group by plain values."""
        settle_adamw(group)

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError unless a group, settled, has options and parameters that can be stepped."""
        check_group(group)
        if group["capturable"]:
            raise ValueError("AdamW's capturable should be False where ranks step together but is: True")
        step_size, largest = float(group["lr"]) / (1 - float(group["betas"][0])), torch.finfo(torch.float32).max
        if step_size > largest:
            raise ValueError(f"lr, divided by 1 - beta1, should be at most {largest} but is: {step_size}")
        for p in group["params"]:
            check_dense("parameter", p)
            check_whole("parameter", p)

    def flat(self, group: Mapping[str, Any], ranks: int) -> Flat:
        """Return the layout of a group's parameters."""
        return lay_out(tuple(tuple(p.shape) for p in group["params"]), ranks)

    def sliced(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys of the state that each rank keeps its slice of."""
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def whole(self, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state that every rank keeps: how often each parameter has been stepped."""
        return {"step": torch.zeros(len(group["params"]), dtype=torch.float32, device="cpu")}

    def check_whole(self, key: str, value: Any, own: Tensor) -> None:
        """Raise ValueError or TypeError unless `value` can be counts of steps in place of `own`."""
        super().check_whole(key, value, own)
        if not bool(((value >= 0) & value.isfinite()).all()):
            raise ValueError(f"{key} should have counts >= 0 but has: {value.tolist()!r:.100}")

    def step(
        self,
        group: dict[str, Any],
        flat: Flat,
        state: Mapping[str, Tensor],
        present: Sequence[bool],
        gradient: Tensor,
        updated: Tensor,
    ) -> None:
        """Update this rank's slice of a group, see `Half`.

        torch steps what it is given as one tensor with one count: parameters of equal counts that follow one another.
        """
        counts = state["step"]
        keys = [count if there else None for count, there in zip(counts.tolist(), present, strict=True)]
        runs = flat.runs(self.ranks.rank(), keys)
        moments = {key: [state[key][run] for run, _ in runs] for key in self.sliced(group)}
        beta1, beta2 = map(float, group["betas"])
        device = gradient.device if group["fused"] else "cpu"
        adamw(
            [updated[run] for run, _ in runs],
            [gradient[run] for run, _ in runs],
            moments["exp_avg"],
            moments["exp_avg_sq"],
            moments.get("max_exp_avg_sq", []),
            [torch.tensor(count, dtype=torch.float32, device=device) for _, count in runs],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,  # the gradient is negative already
        )
        counts.add_(torch.tensor(present, dtype=torch.float32))
