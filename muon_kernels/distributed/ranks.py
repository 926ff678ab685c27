"""Placement of all parameters of an optimizer, and the ranks that step them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from ..stages import SecondMoment, Stage, stages_of
from ..tensors import any_dtensor, is_dtensor
from . import consensus
from .agreement import Agreement, Facts, GradOf, Prepared
from .balance import assign_owners
from .placement import Placement, Team, Teams, placement_of, replicated, team_of

if TYPE_CHECKING:
    from ..step.work import Task


class Consolidated(NamedTuple):
    """State that one rank of the process group has got from the others, on the host; empty on these."""

    to: int
    state: dict[Tensor, dict[str, Tensor]]


class Ranks:
    """Placements and teams of all parameters of an optimizer.

    Attributes:
        placements: of the parameters that several ranks step together.
        teams: each with the parameters that it steps, in their order.
        agreement: of these ranks about their steps.
        consolidated: state of other ranks as it is since the last step, if it was asked for.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        """Begin without parameters.

        Args:
            process_group: the ranks that have the same plain tensors; see `Muon`.
        """
        self.placements: dict[Tensor, Placement] = {}
        self.teams: dict[Team, list[Tensor]] = {}
        self.agreement = Agreement()
        self.consolidated: Consolidated | None = None
        self._copies = None if process_group is None else team_of(process_group)
        self._teams = Teams()
        self._flatten: dict[Tensor, bool | None] = {}  # as DTensors were seen
        self._loads = [0] * (0 if self._copies is None else self._copies.ranks)

    @property
    def owned(self) -> dict[Tensor, Placement]:
        """The plain parameters whose momentum one rank keeps, with their placements."""
        return {p: at for p, at in self.placements.items() if at.owner is not None}

    def placement(self, p: Tensor) -> Placement | None:
        """Return where a parameter's shards or copies are, or None if no other rank has one."""
        return self.placements.get(p) if self.placements else None  # a Tensor's hash is worth being spared

    def elsewhere(self, p: Tensor) -> bool:
        """Whether another rank keeps the momentum of `p`."""
        at = self.placement(p)
        return at is not None and at.owner is not None and at.owner != at.team.rank

    def shares(self, params: Sequence[Tensor]) -> bool:
        """Whether any of `params` may be on other ranks too."""
        return self._copies is not None or any_dtensor(params)

    def add(self, group: Mapping[str, Any], costs: Sequence[int]) -> None:
        """Find out where a group's parameters are; all ranks have to call this at the same time.

        Args:
            group: with `params`.
            costs: FLOPs of each parameter; plain tensors that every rank has are assigned to owners by them.

        Raises:
            ValueError: a parameter is placed in a way that cannot be stepped, or ranks differ in what they give.
        """
        params: Sequence[Tensor] = group["params"]
        placements = self._placed(group)
        loads = self._loads
        if self._copies is not None and group["power"] != 1:
            plain = [(p, cost) for p, cost in zip(params, costs, strict=True) if not is_dtensor(p)]
            loads = list(loads)
            owners = assign_owners([cost for _, cost in plain], len(loads), loads=loads)
            for (p, cost), owner in zip(plain, owners, strict=True):
                placements[p] = replicated(self._copies, p.shape, owner)
                loads[owner] += cost
        consensus.check_alike(placements, group, self._copies)
        self._take(group, placements)
        self._loads = loads

    def agree(
        self,
        groups: Sequence[Mapping[str, Any]],
        prepare: Callable[[GradOf], tuple[Prepared, Sequence[Task]]],
        options: Callable[[Sequence[Tensor]], Facts],
    ) -> Prepared:
        """Look at DTensors again, see `refresh`, and have all ranks prepare the same step, see `Agreement.reach`.

        Another `flatten` may make other teams, which wait for ever where not all ranks have it. So in a step before
        which it has changed, ranks compare it first, in the teams that they have been in.
        """
        changed = self._changed(groups)

        def look_again(_: GradOf) -> tuple[None, list[Task]]:
            self.refresh(groups)
            return None, []

        def with_changes(params: Sequence[Tensor]) -> Facts:
            meshes = {p.device_mesh for p in params if is_dtensor(p)}
            here = [g for g in changed if any(is_dtensor(p) and p.device_mesh in meshes for p in g["params"])]
            return [*options(params), *((f"new flatten {i}", repr(group["flatten"])) for i, group in enumerate(here))]

        if changed:
            meshes = {p.device_mesh for group in changed for p in group["params"] if is_dtensor(p)}
            known = dict(self.placements), dict(self._flatten), self.teams
            try:
                concerned = {
                    team: params
                    for team, params in self.teams.items()
                    if any(is_dtensor(p) and p.device_mesh in meshes for p in params)
                }
                self.agreement.reach(concerned, look_again, with_changes)
            except Exception:  # a step is begun in the teams that all ranks have been in
                self.placements, self._flatten, self.teams = known
                raise
        found = self.agreement.reach(self.teams, prepare, options)
        assert found is not None
        return found

    def refresh(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Look again at DTensors that are new, or whose group has another `flatten` now.

        Raises:
            ValueError: a parameter is placed in a way that cannot be stepped, or an option is not for several ranks.
        """
        for group in self._changed(groups):
            self._take(group, self._placed(group))

    def _changed(self, groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return the groups that have a DTensor which was not seen with their `flatten`."""
        return [
            group
            for group in groups
            if any_dtensor(group["params"])
            and any(
                is_dtensor(p) and self._flatten.get(p, "unseen") is not group.get("flatten", "missing")
                for p in group["params"]
            )
        ]

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if a group's `power` has become 1, where no owner would keep a share of the momenta."""
        if group["power"] == 1 and any(at.owner is not None for at in map(self.placements.get, group["params"]) if at):
            raise ValueError("power should not become 1 with a process_group, where ranks keep the momentum of a share")

    def _placed(self, group: Mapping[str, Any]) -> dict[Tensor, Placement]:
        """Return the placements of the DTensors that other ranks have shards or copies of."""
        placements: dict[Tensor, Placement] = {}
        for p in group["params"]:
            if is_dtensor(p) and (at := placement_of(p, group["flatten"], self._teams)) is not None:
                placements[p] = at
        return placements

    def _take(self, group: Mapping[str, Any], placements: Mapping[Tensor, Placement]) -> None:
        for p in group["params"]:
            if is_dtensor(p):
                self.placements.pop(p, None)
                self._flatten[p] = group["flatten"]
        self.placements.update(placements)
        self.teams = consensus.teams_of(self.placements)


def check_shared(group: Mapping[str, Any]) -> None:
    """Raise ValueError where a group of parameters that several ranks share has an option that is not for these."""
    for stage in stages_of(group):
        if type(stage).after is not Stage.after and not isinstance(stage, SecondMoment):
            raise ValueError(
                f"{stage.option} should be {stage.choices[0]} for DTensors and with a process_group: its stage changes "
                "results where parameters are updated, of which a rank has parts"
            )
