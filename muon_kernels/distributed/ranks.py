"""Where an optimizer's parameters are and who steps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from . import consensus
from .deal import deal
from .placement import Placement, Team, Teams, is_dtensor, placement_of, replicated


class Ranks:
    """Of all parameters of an optimizer.

    Attributes:
        placements: those that several ranks step together have one.
        teams: and the parameters that each steps, in their order.
    """

    def __init__(self, process_group: ProcessGroup | None = None) -> None:
        """`process_group`: of ranks that have the same plain tensors; see `Muon`."""
        self.placements: dict[Tensor, Placement] = {}
        self.teams: dict[Team, list[Tensor]] = {}
        self._copies = None if process_group is None else Team(None, process_group)
        self._teams = Teams()
        self._loads = [0] * (0 if self._copies is None else self._copies.ranks)

    @property
    def owned(self) -> dict[Tensor, Placement]:
        """The plain parameters that one rank each keeps the momentum of."""
        return {p: at for p, at in self.placements.items() if at.owner is not None}

    def elsewhere(self, p: Tensor) -> bool:
        """Whether another rank keeps its momentum."""
        at = self.placements.get(p)
        return at is not None and at.owner is not None and at.owner != at.team.rank

    def shares(self, params: Sequence[Tensor]) -> bool:
        """Whether any of them may be on other ranks too."""
        return self._copies is not None or any(map(is_dtensor, params))

    def add(self, group: Mapping[str, Any], costs: Sequence[int]) -> None:
        """Find out where a group's parameters are; all ranks have to, at the same time.

        Args:
            group: with `params`.
            costs: of each, in FLOPs; plain tensors that every rank has are dealt out by them.

        Raises:
            ValueError: one is placed in a way that cannot be stepped, or ranks differ in what they give.
        """
        params: Sequence[Tensor] = group["params"]
        placements: dict[Tensor, Placement] = {}
        for p in params:
            if is_dtensor(p) and (at := placement_of(p, group["flatten"], self._teams)) is not None:
                placements[p] = at
        loads = self._loads
        if self._copies is not None and group["power"] != 1:
            plain = [(p, cost) for p, cost in zip(params, costs, strict=True) if not is_dtensor(p)]
            loads = list(loads)
            owners = deal([cost for _, cost in plain], len(loads), loads=loads)
            for (p, cost), owner in zip(plain, owners, strict=True):
                placements[p] = replicated(self._copies, p.shape, owner)
                loads[owner] += cost
        consensus.check_alike(placements, group)
        self.placements.update(placements)
        self.teams = consensus.teams_of(self.placements)
        self._loads = loads
