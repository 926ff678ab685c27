"""The step of groups that are stepped as one: their state, their operands, and the tasks of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..distributed.exchange import divide
from ..distributed.ranks import Ranks
from ..distributed.strategies import blocks
from ..step.cache import TaskCache
from ..step.operands import Operand
from ..step.options import StepOptions, settled, splits, transposes
from ..step.work import Task
from ..tensors import any_dtensor, local
from .state import StateOfGroups, Writes


def prepared(
    groups: Sequence[dict[str, Any]],
    grad_of: Callable[[Tensor], Tensor | None],
    state_of: Mapping[Tensor, Mapping[str, Any]],
    ranks: Ranks,
    cache: TaskCache,
) -> tuple[list[Task], list[Tensor], Writes]:
    """Return the tasks of a step of `groups`, its gradients, and what it would write into the state."""
    group, wanted, nothing = groups[0], StateOfGroups(groups, ranks), dict[str, Any]()
    candidates = [p for each in groups for p in each["params"]]
    spread = bool(ranks.placements) or any_dtensor(candidates)  # most are not, and spared the questions
    params, grads, states = [], [], []
    for p in candidates:
        if (grad := grad_of(p)) is None:
            continue
        state = state_of.get(p, nothing)
        if spread or not wanted.complete(state):
            state = wanted.completed(p, grad, state)
        params.append(p)
        grads.append(grad)
        states.append(state)
    placements = [ranks.placement(p) for p in params] if spread else None

    def column(key: str, wanted: bool = True) -> list[Tensor | None]:
        found = [state.get(key) for state in states] if wanted else []
        return [t if t is None else local(t) for t in found] if spread else found

    momenta, scales = column("momentum_buffer"), column("momentum_scale", wanted.int8)
    mantissas = column("mantissa", group["master_weights"])
    moments = column("second_momentum_buffer", group["second_moment"] is not None)
    if spread:
        params, grads = list(map(local, params)), list(map(local, grads))

    def make() -> list[Task]:
        named = [pair for each in groups for pair in zip(splits(each), transposes(each), strict=True)]
        said = [(split, turned) for (p, split), turned in named if grad_of(p) is not None]
        none = [None] * len(params)
        kept = zip(params, grads, momenta, scales or none, mantissas or none, moments or none, strict=True)
        return divide(
            [
                Operand(p, g, momentum, scale, mantissa, moment, *words)
                for (p, g, momentum, scale, mantissa, moment), words in zip(kept, said, strict=True)
            ],
            placements,
            StepOptions.of(group),
            strategy=group["strategy"],
            steps_shards=steps_shards,
            shard_lr_factor=group["block_lr_ratio"],
        )

    steps_shards = blocks.steps_shards(group)
    own = momenta, moments, scales, mantissas
    tasks = cache.get((id(group), steps_shards), params, grads, own, settled(groups), make)
    return tasks, grads, wanted.writes
