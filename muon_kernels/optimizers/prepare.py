"""Preparation of a step: groups that are stepped as one, their state, operands and tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Size, Tensor

from ..distributed.exchange import divide
from ..distributed.placement import batch_ranges
from ..distributed.ranks import Ranks
from ..distributed.strategies import blocks
from ..step.cache import TaskCache
from ..step.numbers import first_numbers, numbers_of
from ..step.operands import Operand
from ..step.options import StepOptions, alike, settled, splits, transposes
from ..step.work import Scalars, Task
from ..tensors import any_dtensor, is_dtensor, local
from .scalars import scalars_of
from .state import StateOfGroups, Writes


class ReadyBatch(NamedTuple):
    """Groups that are stepped as one, when nothing is left to do but to write.

    Attributes:
        groups: the groups.
        scalars: the numbers that their step takes.
        tasks: what is to be run.
        grads: gradients, which tasks take.
        writes: state that is to be kept before.
    """

    groups: list[dict[str, Any]]
    scalars: Scalars
    tasks: list[Task]
    grads: list[Tensor]
    writes: Writes


def batches_of(groups: Sequence[dict[str, Any]], ranks: Ranks) -> list[tuple[list[dict[str, Any]], Scalars]]:
    """Return the groups that a step does as one, because nothing that matters to it differs between them.

    Groups stay by themselves that have steps of two kinds, and those of parameters that other ranks have shards or
    copies of: ranks have not agreed on the numbers of these.

    Returns:
        Lists of groups, each with the numbers that their step takes.
    """
    batches: list[tuple[list[dict[str, Any]], Scalars]] = []
    by_numbers: dict[Scalars, list[list[dict[str, Any]]]] = {}
    for group in groups:
        scalars = scalars_of(group)
        shared = bool(ranks.teams) and ranks.shares(group["params"])
        alone = shared or group["strategy"] == "blocks"
        others = [] if alone else by_numbers.setdefault(scalars, [])
        batch = next((same for same in others if alike(same[0], group)), None)
        if batch is not None:
            batch.append(group)
            continue
        batches.append(([group], scalars))
        others.append(batches[-1][0])
    return batches


def prepared(
    groups: Sequence[dict[str, Any]],
    among: Sequence[dict[str, Any]],
    grad_of: Callable[[Tensor], Tensor | None],
    state_of: Mapping[Tensor, Mapping[str, Any]],
    ranks: Ranks,
    cache: TaskCache,
) -> tuple[list[Task], list[Tensor], Writes]:
    """Return the tasks of a step of `groups`, its gradients, and what it would write into the state.

    Args:
        groups: groups that are stepped as one.
        among: all groups of the optimizer.
        grad_of: returns the gradient of a parameter, or None.
        state_of: the optimizer's state.
        ranks: the ranks that step parameters together.
        cache: tasks of earlier steps, which are taken again where nothing has changed.

    Raises:
        ValueError, TypeError, RuntimeError: a parameter, its gradient or its state that cannot be stepped.
    """
    group, wanted, nothing = groups[0], StateOfGroups(groups, ranks), dict[str, Any]()
    candidates = [p for each in groups for p in each["params"]]
    spread = bool(ranks.placements) or any_dtensor(candidates)  # most are not: spare them the questions
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
    given = params
    if spread:
        params, grads = list(map(local, params)), list(map(local, grads))

    def make() -> list[Task]:
        named = [pair for each in groups for pair in zip(splits(each), transposes(each), strict=True)]
        numbered = zip(named, _first_numbers(groups, among), strict=True)
        said = [(split, turned, first) for ((p, split), turned), first in numbered if grad_of(p) is not None]
        none = [None] * len(params)
        kept = zip(params, grads, momenta, scales or none, mantissas or none, moments or none, strict=True)
        of_each = zip(kept, said, given, strict=True)
        return divide(
            [
                _placed(
                    Operand(p, g, momentum, scale, mantissa, moment, split, turned), whole, first, group["flatten"]
                )._replace(momentum_dtype=wanted.momentum_dtype(g))
                for (p, g, momentum, scale, mantissa, moment), (split, turned, first), whole in of_each
            ],
            placements,
            StepOptions.of(group),
            strategy=group["strategy"],
            steps_shards=steps_shards,
            shard_lr_factor=group["block_lr_ratio"],
        )

    steps_shards = blocks.steps_shards(group)
    own = momenta, moments, scales, mantissas
    decided = {**settled(groups), "listed": _listed(groups, among)}
    tasks = cache.get((id(group), steps_shards), params, grads, own, decided, make)
    return tasks, grads, wanted.writes


def _listed(
    groups: Sequence[dict[str, Any]], among: Sequence[dict[str, Any]]
) -> list[tuple[int, list[tuple[int, Size]]]] | None:
    """Return what the numbers of matrices depend on, beside options; None without stochastic rounding."""
    if not groups[0]["stochastic_rounding"]:
        return None
    index = {id(group): i for i, group in enumerate(among)}
    return [(index[id(group)], [(id(p), p.shape) for p in group["params"]]) for group in groups]


def _first_numbers(groups: Sequence[dict[str, Any]], among: Sequence[dict[str, Any]]) -> list[int] | list[None]:
    """Return for every parameter of `groups` the number of its first matrix, None without stochastic rounding."""
    if not groups[0]["stochastic_rounding"]:
        return [None] * sum(len(group["params"]) for group in groups)
    index = {id(group): i for i, group in enumerate(among)}
    return [number for group in groups for number in first_numbers(group, index[id(group)])]


def _placed(operand: Operand, p: Tensor, first: int | None, flatten: bool | None) -> Operand:
    """Return an operand with the size of the whole parameter `p`, and the numbers of what this rank has of it.

    Without stochastic rounding `first`, the number of its first matrix, is None, and there are no numbers.
    """
    held = batch_ranges(p, flatten) if is_dtensor(p) else None
    whole = None if held is None else tuple(p.shape)
    numbers = () if first is None else numbers_of(first, tuple(p.shape), flatten, operand.split, held)
    return operand._replace(whole=whole, numbers=numbers)
