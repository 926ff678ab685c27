"""Options of a group as `prepare` takes them, and as they apply to each of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import options
from ..coefficients import Schedule, resolve
from ..options import PREPARED_OPTIONS
from ..powers import schedule_of
from ..split import by_name, close, matching
from ..stages import MasterWeights, SecondMoment, Stage, stages_of

Coefficients = str | Sequence[float] | Sequence[Sequence[float]]


class StepOptions(NamedTuple):
    """Options of a group that `prepare` looks at, the same for all its parameters; see `Muon` for each.

    Attributes:
        schedule: what to iterate.
        stages: what the group's options ask for around the iteration.
        momentum: whether there is one; without, the directions are the gradients.
    """

    schedule: Schedule
    adjust_lr_fn: str | Callable[[int, int], float] | None = None
    power: float = 0.0
    flatten: bool | None = None
    ns_algorithm: str = "auto"
    backend: str = "auto"
    max_workspace_bytes: int | None = None
    workspace_dtype: torch.dtype = torch.bfloat16
    stochastic_rounding: bool = False
    stages: tuple[Stage, ...] = ()
    momentum: bool = True

    @property
    def master_weights(self) -> bool:
        """Whether parameters are the upper halves of fp32 numbers."""
        return any(isinstance(stage, MasterWeights) for stage in self.stages)

    @property
    def second_moment(self) -> str | None:
        """Form of the second moment that results are divided by."""
        return next((stage.form for stage in self.stages if isinstance(stage, SecondMoment)), None)

    @classmethod
    def of(cls, group: Mapping[str, Any], momentum: bool = True) -> StepOptions:
        """Make them of a group, which may lack those with a default here."""
        names = set(cls._fields) - {"schedule", "stages", "momentum", "workspace_dtype"}
        return cls(
            schedule=schedule_for(group["ns_coefficients"], group["ns_steps"], group["power"]),
            workspace_dtype=options.dtype_of(group.get("workspace_dtype", torch.bfloat16)),
            stages=stages_of(group),
            momentum=momentum,
            **{name: group[name] for name in names & group.keys()},
        )


# Those of them that a parameter has its own answer to.
_OF_PARAMETERS = ("split", "transposed")


_OF_GROUPS = [key for key in PREPARED_OPTIONS if key not in _OF_PARAMETERS]


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two groups can be stepped as one, as far as their options say."""
    return all(one[key] == other[key] for key in _OF_GROUPS)


def settled(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options in PREPARED_OPTIONS of groups that are stepped as one, as `TaskCache` takes them."""
    return {
        **{key: groups[0][key] for key in PREPARED_OPTIONS},
        **{key: [_of_parameters(group, key) for group in groups] for key in _OF_PARAMETERS},
        "workspace_dtype": options.dtype_of(groups[0]["workspace_dtype"]),
    }


def _of_parameters(group: Mapping[str, Any], key: str) -> Any:
    """Return an option with the parameters that it is about, which may move from one group to another."""
    if not group[key]:
        return None
    return group[key], list(map(id, group["params"])), list(group.get("param_names", ()))


def splits(group: Mapping[str, Any]) -> list[tuple[Tensor, str | None]]:
    """Return every parameter of a group with what it is cut to."""
    params, split = group["params"], group["split"]
    if not isinstance(split, Mapping) or not split:
        return [(p, split or None) for p in params]
    if not params:
        return []
    if "param_names" not in group:
        raise ValueError(
            f"split by name should be of parameters that have one, but they have none: {dict(split)}; give pairs "
            "(name, parameter), as model.named_parameters() returns them, or muon_kernels.param_groups(model)"
        )
    return list(zip(params, by_name(split, group["param_names"]), strict=True))


def transposes(group: Mapping[str, Any]) -> list[bool]:
    """Return for each parameter of a group whether it is stored as (inputs, outputs)."""
    params, transposed = group["params"], group["transposed"]
    if isinstance(transposed, bool) or not params:
        return [transposed is True] * len(params)
    if "param_names" not in group:
        raise ValueError(
            f"transposed by name should be of parameters that have one, but they have none: {list(transposed)}; give "
            "pairs (name, parameter), as model.named_parameters() returns them, or muon_kernels.param_groups(model)"
        )
    names = group["param_names"]
    found = {pattern: matching(pattern, names) for pattern in transposed}
    for pattern, matched in found.items():
        if not matched:
            raise ValueError(f"transposed={pattern!r} matches no parameter of the group{close(pattern, names)}")
    chosen = {name for matched in found.values() for name in matched}
    return [name in chosen for name in names]


def check_rounding(p: Tensor) -> None:
    """Raise TypeError unless a parameter is of the dtype that is rounded stochastically."""
    if p.dtype != torch.bfloat16:
        raise TypeError(
            f"stochastic_rounding is of torch.bfloat16 parameters but one is of: {p.dtype}; "
            "put it into a group with stochastic_rounding=False"
        )


def schedule_for(ns_coefficients: Coefficients, ns_steps: int | None, power: float) -> Schedule:
    """Return the schedule of a power: for 0 that of the coefficients. For 1 it is not used."""
    return resolve(ns_coefficients, ns_steps) if power in (0, 1) else schedule_of(power)


def as_scalar(x: float | Tensor) -> float | Tensor:
    """Return a float, or a tensor without dimensions if only a device knows the number."""
    return float(x) if options.on_host(x) else cast(Tensor, x).reshape(())
