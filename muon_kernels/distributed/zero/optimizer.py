"""ZeRO-1 as a torch optimizer: groups, their slices of state, steps and checkpoints. A `Half` has the formulas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ...checkpoint import check_checkpoint
from ...closures import ClosureOptimizer
from ...options import check_keys
from ...tensors import check_dense, check_disjoint, check_like, local
from .. import consensus
from ..agreement import Agreement, Facts, GradOf, options_of
from ..collectives import Failed, gather, on_all, reduce_scatter
from ..placement import replicated, team_of
from .flat import Flat, length
from .loading import check_keys_of_state, check_layout, check_sizes, own_slice

if TYPE_CHECKING:
    from ...step.work import Task

MASTER = "master_param"
# The layouts of a step, and the gradients of each group.
_Ready = tuple[list[Flat], list[list["Tensor | None"]]]


class Half(ABC):
    """Formulas of an optimizer, or of a half of one, on flat slices.

    Attributes:
        defaults: of the options of its groups.
        ranks: which step together.
    """

    def __init__(self, defaults: dict[str, Any], ranks: dist.ProcessGroup) -> None:
        """Take the attributes."""
        self.defaults = defaults
        self.ranks = ranks

    def check_new(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if options that a new group is given are misspelt or contradict each other."""
        check_keys(group, self.defaults)

    @abstractmethod
    def settle(self, group: dict[str, Any]) -> None:
        """Replace options of a group by plain values."""

    @abstractmethod
    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError unless a group, settled, has options and parameters that can be stepped."""

    @abstractmethod
    def flat(self, group: Mapping[str, Any], ranks: int) -> Flat:
        """Return the layout of a group's parameters; raise ValueError if there is none with its options."""

    @abstractmethod
    def sliced(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys of the state that each rank keeps its slice of."""

    def whole(self, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the state that every rank keeps, as it is before the first step."""
        return {}

    def check_whole(self, key: str, value: Any, own: Tensor) -> None:
        """Raise ValueError or TypeError unless `value` can be such a state in place of `own`."""
        check_dense(key, value)
        if value.shape != own.shape:
            raise ValueError(f"{key} should have size {tuple(own.shape)} but has: {tuple(value.shape)}")

    def fitted(self, saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group of a checkpoint in plain values, with the options that it lacks taken from `own`.

        Raises:
            ValueError: it would choose what runs.
        """
        found = {**{key: own[key] for key in self.defaults if key in own}, **saved}
        self.settle(found)
        return found

    def bytes_sent(self, group: Mapping[str, Any], flat: Flat) -> int:
        """Bytes that this rank sends in a step beside gradients and parameters."""
        return 0

    @abstractmethod
    def step(
        self,
        group: dict[str, Any],
        flat: Flat,
        state: Mapping[str, Tensor],
        present: Sequence[bool],
        gradient: Tensor,
        updated: Tensor,
    ) -> None:
        """Update this rank's slice of a group; all ranks call it.

        Args:
            group: the group.
            flat: its layout.
            state: of the group, this rank's slices; written.
            present: whether each parameter has a gradient. Of the others nothing changes.
            gradient: fp32, this rank's slice of the mean, negative to ascend; may be overwritten.
            updated: fp32, this rank's slice of the parameters; written.
        """


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the process group that is asked for; None asks for all ranks.

    Raises:
        ValueError: there is none.
        TypeError: it is no process group.
    """
    group = process_group if process_group is not None else dist.group.WORLD
    if group is None:
        raise ValueError("process_group should be one, or torch.distributed initialized before, but is: None")
    team_of(group)
    return group


def _listed(params: ParamsT) -> list[Any]:
    """Return the parameters or groups of an optimizer as a list; raise where torch does, for all ranks to hear of."""
    if isinstance(params, (nn.Module, Tensor)):
        kind = "a module" if isinstance(params, nn.Module) else "one tensor"
        raise TypeError(f"params should be parameters or groups but is {kind}; give its parameters, or a list")
    found = list(params)
    if not found:
        raise ValueError("optimizer got an empty parameter list: give it a parameter or a group")
    return found


class ZeroOptimizer(ClosureOptimizer):
    """Base of the optimizers whose state is cut into equal slices of a flat buffer for each group."""

    # Has torch.amp.GradScaler leave unscaling, and leaving out a step, to `step` (attributes grad_scale and found_inf):
    # gradients are each rank's own, and all ranks have to leave out the same steps.
    _step_supports_amp_scaling = True

    _marks: str  # an option that every group has, by which a checkpoint is known

    def __init__(self, params: ParamsT, defaults: dict[str, Any], process_group: dist.ProcessGroup) -> None:
        """Check everything and make the state."""
        given = on_all(process_group, lambda: _listed(params))
        consensus.check_counts(process_group, len(given) if isinstance(given[0], dict) else 1)
        self._group = process_group
        self._team = team_of(process_group)
        self._agreement = Agreement()
        self._flats: list[Flat] = []
        self._steps = 0
        super().__init__(given, defaults)

    @abstractmethod
    def _half(self, group: Mapping[str, Any]) -> Half:
        """Return what steps a group; raise ValueError if the group does not tell."""

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state; on error the optimizer is unchanged, on all ranks.

        Args:
            param_group: a dict with `params` and options that differ from the defaults. All ranks have to add it.

        Raises:
            ValueError, TypeError: an option or a parameter that cannot be used, or ranks that differ in them.
            RuntimeError: another rank refuses.
        """
        before = len(self.param_groups)
        try:
            flat = on_all(self._group, lambda: self._added(param_group))
            group = self.param_groups[-1]
            consensus.check_alike({p: replicated(self._team, p.shape, 0) for p in group["params"]}, group, self._team)
        except Exception:
            del self.param_groups[before:]
            raise
        self._flats.append(flat)
        self._begin(group, flat)

    def _added(self, param_group: dict[str, Any]) -> Flat:
        """Add a group, check it, and return its layout."""
        if not isinstance(param_group, dict):
            raise TypeError(f"a param group should be a dict but is a {type(param_group).__name__}")
        half = self._half(param_group)
        half.check_new(param_group)
        others = self.defaults.keys() - half.defaults.keys() - param_group.keys()
        for key, value in half.defaults.items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key in others:
            del group[key]  # which torch took from the defaults of the other half
        half.settle(group)
        params: list[Tensor] = group["params"]
        for p in params:
            if (p.dtype, p.device) != (params[0].dtype, params[0].device):
                raise ValueError(
                    f"parameters of a group should be of one dtype and on one device but are {params[0].dtype} on "
                    f"{params[0].device} and {p.dtype} on {p.device}; make groups of them"
                )
        half.check(group)
        check_disjoint([("parameter", p) for other in self.param_groups for p in other["params"]])
        return half.flat(group, self._group.size())

    def _begin(self, group: dict[str, Any], flat: Flat) -> None:
        """Make the state of a group."""
        if not group["params"]:
            return
        half, first, rank = self._half(group), group["params"][0], self._group.rank()
        size = length(flat.slices[rank])
        for key in half.sliced(group):
            zeros = torch.zeros(size, dtype=torch.float32, device=first.device)
            self.state[first][key] = self._distributed(zeros, flat)
        self.state[first].update(half.whole(group))
        if first.dtype != torch.float32:
            self.state[first][MASTER] = self._distributed(flat.slice_of(group["params"], rank), flat)

    def _distributed(self, own: Tensor, flat: Flat) -> Tensor:
        """Return a DTensor of which this rank's slice is `own`."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self._group, own.device.type)
        size = torch.Size([flat.elements])
        return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=size, stride=(1,))

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends in a step if every parameter has a gradient, reductions counted as in a ring."""
        total = 0
        for flat, group in zip(self._flats, self.param_groups, strict=True):
            if group["params"]:
                total += (self._group.size() - 1) * flat.share * (4 + group["params"][0].itemsize)
                total += self._half(group).bytes_sent(group, flat)
        return total

    def _laid_out(self, group: Mapping[str, Any], flat: Flat) -> Flat:
        """Return the layout of a group with the options that it has now.

        Raises:
            ValueError: it has other places for elements than `flat`, which its state is in.
        """
        found = self._half(group).flat(group, self._group.size())
        check_layout("param_groups", found.layout, flat.layout)
        return found

    def _check(self) -> list[Flat]:
        """Raise ValueError or TypeError unless this rank can take a step; return the layouts."""
        flats = []
        for group, flat in zip(self.param_groups, self._flats, strict=True):
            half = self._half(group)
            half.settle(group)
            half.check(group)
            flats.append(self._laid_out(group, flat))
            for p in group["params"]:
                if p.grad is not None:
                    check_dense("gradient", p.grad)
                    check_like("gradient", p.grad, p)
            if group["params"]:
                check_keys_of_state("state", self.state[group["params"][0]], self._keys(group))
        return flats

    def _keys(self, group: Mapping[str, Any]) -> set[str]:
        """Return the keys that the state of a group has."""
        half = self._half(group)
        master = [MASTER] * (group["params"][0].dtype != torch.float32)
        return {*half.sliced(group), *half.whole(group), *master}

    def _update(self) -> None:
        """Average gradients over ranks and step every parameter that has one on any rank; all ranks call it."""
        everything = [p for group in self.param_groups for p in group["params"]]
        if not everything:
            return
        name = type(self).__name__
        self._steps += 1

        def prepare(grad_of: GradOf) -> tuple[_Ready, list[Task]]:
            flats = self._check()
            return (flats, [list(map(grad_of, group["params"])) for group in self.param_groups]), []

        try:
            # torch.amp.GradScaler sets these for the duration of a step.
            found_inf = getattr(self, "found_inf", None)
            ready = self._agreement.reach({self._team: everything}, prepare, self._options, found_inf)
        except Failed as error:
            raise RuntimeError(
                f"step {self._steps} of {name} did not begin: {error}; every rank has to call step"
            ) from error
        if ready is None:
            return
        self._flats, gradients = ready
        scale: Tensor | None = getattr(self, "grad_scale", None)
        grad_scale = 1.0 if scale is None else 1.0 / float(scale)
        for group, flat, grads in zip(self.param_groups, self._flats, gradients, strict=True):
            if any(g is not None for g in grads):
                try:
                    self._step(group, flat, grads, -grad_scale if group["maximize"] else grad_scale)
                except Failed as error:
                    raise RuntimeError(
                        f"step {self._steps} of {name} is incomplete, state is updated and parameters may be: "
                        f"{error}; go on from the last checkpoint"
                    ) from error

    def _options(self, params: Sequence[Tensor]) -> Facts:
        """Return what all ranks should have alike."""
        named = [(f"group {i}", group) for i, group in enumerate(self.param_groups)]
        return [fact for name, group in named for fact in options_of(name, group, self._half(group).defaults)]

    def _step(self, group: dict[str, Any], flat: Flat, grads: Sequence[Tensor | None], grad_scale: float) -> None:
        params: list[Tensor] = group["params"]
        rank, ranks, device = self._group.rank(), self._group.size(), params[0].device
        size = length(flat.slices[rank])
        present = [g is not None for g in grads]
        state = {key: local(t) for key, t in self.state[params[0]].items()}
        gradient = self._averaged(flat, grads, device, grad_scale)[:size]
        updated = state[MASTER] if MASTER in state else flat.slice_of(params, rank)
        self._half(group).step(group, flat, state, present, gradient, updated)
        share = torch.zeros(flat.share, dtype=params[0].dtype, device=device)
        share[:size].copy_(updated)
        gathered = torch.empty(ranks * flat.share, dtype=params[0].dtype, device=device)
        gather(gathered, share, [flat.share] * ranks, self._team, "all ranks").wait()
        flat.read(gathered, params, present)

    def _averaged(self, flat: Flat, grads: Sequence[Tensor | None], device: torch.device, grad_scale: float) -> Tensor:
        """Return this rank's slice of the mean of scaled gradients in fp32, with room for the longest slice."""
        ranks = self._group.size()
        everything = torch.empty(ranks * flat.share, dtype=torch.float32, device=device)
        flat.fill(everything, grads)
        if grad_scale != 1:  # of this rank: where one alone overflows, GradScaler comes to another scale on each
            everything.mul_(grad_scale)
        gradient = torch.empty(flat.share, dtype=torch.float32, device=device)
        reduce_scatter(gradient, everything, self._group, "gradients").wait()
        return gradient.div_(ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, in plain values: copies of this rank's slices as DTensors, and each group's layout.

        What torch.distributed.checkpoint loads into them is in use only after `load_state_dict` has found that it fits.
        """
        for group in self.param_groups:
            self._half(group).settle(group)
        found: dict[str, Any] = super().state_dict()
        for group, flat in zip(found["param_groups"], self._flats, strict=True):
            group["layout"] = list(flat.layout)
        found["state"] = {index: {key: t.clone() for key, t in kept.items()} for index, kept in found["state"].items()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned for the same groups and number of ranks. All ranks have to call this.

        For another number of ranks, load the checkpoint into what `state_dict` returns here by
        torch.distributed.checkpoint first. Slices may also be given as the whole flat buffers.

        Args:
            state_dict: a checkpoint of this class.

        Raises:
            ValueError, TypeError: groups, sizes, splits or options do not fit; nothing has been changed then.
            RuntimeError: they do not on another rank.
        """
        groups, flats, found = on_all(self._group, lambda: self._fitted(state_dict))
        kept = dict(self.state)
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        self.state.update(kept)
        self._flats = flats
        for own, value in found:
            own.copy_(value)

    def _fitted(
        self, state_dict: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Flat], list[tuple[Tensor, Tensor]]]:
        """Return the groups that a checkpoint makes, their layouts, and pairs of state and what to copy to it."""
        name = type(self).__name__
        check_checkpoint(state_dict, self.param_groups, name, self._marks)
        check_sizes(name, state_dict["param_groups"], self.param_groups)
        groups: list[dict[str, Any]] = []
        flats: list[Flat] = []
        found: list[tuple[Tensor, Tensor]] = []
        for saved, own, flat in zip(state_dict["param_groups"], self.param_groups, self._flats, strict=True):
            half = self._half(own)
            if self._half(saved) is not half:
                raise ValueError(f"use_muon of the loaded group should be {own['use_muon']} but is not")
            group = half.fitted(saved, own)
            # Checkpoints of 0.1 have no layout: no parameter was split then.
            layout = group.pop("layout", [text.partition(" ")[0] for text in flat.layout])
            check_layout(f"a checkpoint of {name}", layout, flat.layout)
            loaded = {"param_names": own["param_names"], **group} if "param_names" in own else dict(group)
            loaded["params"] = own["params"]
            half.check(loaded)
            flats.append(self._laid_out(loaded, flat))
            groups.append(group)
            if own["params"]:
                found += self._copies(own, flat, state_dict["state"].get(saved["params"][0], {}))
        return groups, flats, found

    def _copies(self, group: dict[str, Any], flat: Flat, values: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of a group's state and what a checkpoint has in its place."""
        half, keys, state = self._half(group), self._keys(group), self.state[group["params"][0]]
        check_keys_of_state(f"a checkpoint of {type(self).__name__}", values, keys)
        found = []
        for key in sorted(keys):
            own, value = local(state[key]), values[key]
            if key in half.whole(group):
                half.check_whole(key, value, own)
            else:
                value = own_slice(key, value, flat, self._group.rank())
            found.append((own, value))
        return found
