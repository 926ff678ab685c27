"""Agreement of ranks about a step: that each of them can take it, and that all of them take the same.

One message a team says what each rank would do, as numbers of which all ranks see the maximum and the minimum: whether
it can step, digests of its options and of its plan, and the kinds of its gradients. So a rank gets everything ready
before it speaks, and an error that only it can see reaches the others at once. A second message is needed only where
other gradients are missing on some ranks than in the step before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensors import is_dtensor, local
from .collectives import doing
from .missing import names
from .placement import Team

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from ..step.work import Task

Prepared = TypeVar("Prepared")
Facts = list[tuple[str, str]]  # (name, value), alike on all ranks of a team
GradOf = Callable[[Tensor], "Tensor | None"]

# What a rank thinks of a step, ordered by severity: all ranks take the maximum.
_READY, _UNREADY, _FOUND_INF, _REFUSED = range(4)
# Dtypes of gradients. A message has the place of a dtype in this list, counted from 1.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Added to the kind of a gradient that is placed otherwise than its parameter.
_PLACED_OTHERWISE = 1 << 8
_ABSENT = 1 << 62  # more than the number of any kind
# Types of options whose text is their value.
_SCALARS = frozenset((bool, float, int, str, type(None)))


def options_of(which: str, group: Mapping[str, Any], keys: Iterable[str]) -> Facts:
    """Return the options `keys` of a group, as far as it has them; `which` group it is, names say."""
    return [(f"{key} of {which}", _text(group[key])) for key in sorted(keys) if key in group]


def options_of_groups(groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor], keys: Collection[str]) -> Facts:
    """Return the options `keys` of the groups that have any of `params`."""
    wanted = set(map(id, params))  # a Tensor's hash takes longer
    having = [group for group in groups if not wanted.isdisjoint(map(id, group["params"]))]
    return [fact for i, group in enumerate(having) for fact in options_of(f"group {i}", group, keys)]


def _text(value: Any) -> str:
    if type(value) in _SCALARS:  # most are, and every step asks
        return repr(value)
    if isinstance(value, Tensor):  # whose own text is rounded
        value = value.tolist()
    if isinstance(value, Mapping):
        value = sorted(value.items())
    return repr(value)


def _digest(facts: Facts) -> int:
    """Return a number below 2^56 that other facts will hardly have."""
    return int.from_bytes(blake2b(repr(facts).encode(), digest_size=7).digest(), "big")


def _kind(p: Tensor) -> int:
    """Return the number of the kind of a parameter's gradient, 0 if it has none."""
    grad = p.grad
    if grad is None:
        return 0
    kind = 1 + _DTYPES.index(grad.dtype) if grad.dtype in _DTYPES else 1 + len(_DTYPES)
    if is_dtensor(p) and _placed_otherwise(p, grad):
        kind += _PLACED_OTHERWISE * (1 + crc32(repr(cast("DTensor", grad).placements).encode()))
    return kind


def _placed_otherwise(p: DTensor, grad: Tensor) -> bool:
    if not is_dtensor(grad):
        raise TypeError(f"the gradient of a DTensor should be one but is a {type(grad).__name__}")
    return grad.placements != p.placements


def _placed(p: Tensor) -> Tensor | None:
    """Return the gradient of a parameter, placed as the parameter is."""
    grad = p.grad
    if grad is not None and is_dtensor(p) and _placed_otherwise(p, grad):
        return cast("DTensor", grad).redistribute(p.device_mesh, p.placements)
    return grad


def _described(p: Tensor) -> str:
    """Return a text about a parameter's gradient."""
    grad = p.grad
    if grad is None:
        return "missing"
    return f"{grad.dtype}" + (f" placed {grad.placements}" if is_dtensor(grad) else "")


class _Seen(NamedTuple):
    """View that all ranks of a team have of each other.

    Attributes:
        verdict: the most severe.
        options_alike, plans_alike: whether digests are equal.
        kinds: of each parameter's gradients, the largest; 0 where no rank has one.
        kinds_alike: whether all ranks that have one have the same kind.
        partly: whether some ranks have one and others have not.
    """

    verdict: int
    options_alike: bool
    plans_alike: bool
    kinds: list[int]
    kinds_alike: list[bool]
    partly: list[bool]

    @property
    def lost(self) -> bool:
        """Whether some ranks lack a gradient that the others would have to exchange."""
        return any(some and kind >= _PLACED_OTHERWISE for kind, some in zip(self.kinds, self.partly, strict=True))


def _exchange(team: Team, verdict: int, options: int, plan: int, kinds: Sequence[int], device: torch.device) -> _Seen:
    """Tell the ranks of a team what this one would do, and return what all see."""
    lowest = [-kind if kind else -_ABSENT for kind in kinds]  # negatives, of which the maximum is the minimum
    said = [verdict, options, -options, plan, -plan, *kinds, *lowest, *(int(not kind) for kind in kinds)]
    numbers = torch.tensor(said, dtype=torch.int64, device=device)
    for group in team.groups:
        with doing(f"asking all ranks for their gradients of {len(kinds)} parameters", group):
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
            heard = numbers.tolist()  # where a device would tell of what has failed
    worst, most, least, most_plan, least_plan, *of_kinds = heard
    n = len(kinds)
    largest, smallest, missing = of_kinds[:n], of_kinds[n : 2 * n], of_kinds[2 * n :]
    partly = [bool(kind and lacks) for kind, lacks in zip(largest, missing, strict=True)]
    return _Seen(
        worst,
        most == -least,
        most_plan == -least_plan,
        largest,
        [kind in (0, -other) for kind, other in zip(largest, smallest, strict=True)],
        partly,
    )


class Agreement:
    """The agreements of the ranks of an optimizer, step by step."""

    def __init__(self) -> None:
        """Begin before the first step."""
        # Kinds of the gradients that only some ranks had in the last step; the same on all ranks.
        self._partly: dict[Tensor, int] = {}

    def reach(
        self,
        teams: Mapping[Team, Sequence[Tensor]],
        prepare: Callable[[GradOf], tuple[Prepared, Sequence[Task]]],
        options: Callable[[Sequence[Tensor]], Facts],
        found_inf: Tensor | None = None,
    ) -> Prepared | None:
        """Have all ranks of every team prepare the same step.

        Args:
            teams: each with the parameters that it steps together.
            prepare: gets a step ready and writes nothing; raises where this rank cannot step. It is given a function
                that returns the gradient of a parameter: zeros where only other ranks have one, None where no rank has.
                It returns what is to be returned here, and the tasks of the step.
            options: returns what should be alike on all ranks that step the given parameters.
            found_inf: what torch.amp.GradScaler found in this rank's gradients, if the step has to look at it.

        Returns:
            What `prepare` returned; None if the step is to be left out.

        Raises:
            Failed: a rank did not answer.
            ValueError: ranks differ in an option, in a gradient's kind, or in what they would exchange.
            RuntimeError: another rank cannot step. The rank that cannot raises what `prepare` raised.
        """
        if is_dtensor(found_inf):
            found_inf = found_inf.full_tensor()
        left_out = found_inf is not None and bool(found_inf)
        if not teams:
            return None if left_out else prepare(_placed)[0]
        # The widest team comes last, so that it hears what its ranks have heard in others.
        teams = dict(sorted(teams.items(), key=lambda item: item[0].ranks))
        proposal = _Proposal(prepare, options, _FOUND_INF if left_out else _READY)
        proposal.make(teams, self._partly, first=True)
        partly: dict[Tensor, int] = {}
        unforeseen: dict[Team, Sequence[Tensor]] = {}
        for team, params in teams.items():
            seen = proposal.compare(team, params)
            partly.update((p, kind) for p, kind, some in zip(params, seen.kinds, seen.partly, strict=True) if some)
            if seen.verdict == _UNREADY or not self._foresaw(params, seen):
                unforeseen[team] = params
                proposal.verdict = max(proposal.verdict, _UNREADY)
            elif seen.verdict == _READY and not seen.plans_alike:
                proposal.dispute(team, params)
        self._partly = partly
        proposal.settle_disputes()
        if proposal.verdict == _FOUND_INF:
            return None
        if unforeseen:
            proposal.make(unforeseen, partly, first=False)
            for team, params in unforeseen.items():
                if not proposal.compare(team, params).plans_alike:
                    proposal.dispute(team, params)
            proposal.settle_disputes()
        return proposal.prepared

    def _foresaw(self, params: Sequence[Tensor], seen: _Seen) -> bool:
        """Whether ranks without a gradient knew rightly which of these others have; all ranks return the same."""
        before = self._partly
        return all(
            before.get(p) == kind if some else kind or p not in before
            for p, kind, some in zip(params, seen.kinds, seen.partly, strict=True)
        )


class _Proposal(Generic[Prepared]):
    """A step as this rank would take it.

    Attributes:
        verdict: what this rank thinks of it, or what others have said that is worse.
        prepared: what `prepare` has returned.
        disputed: the teams in which a rank cannot step or ranks differ.
    """

    def __init__(
        self,
        prepare: Callable[[GradOf], tuple[Prepared, Sequence[Task]]],
        options: Callable[[Sequence[Tensor]], Facts],
        verdict: int,
    ) -> None:
        self._prepare, self._options, self.verdict = prepare, options, verdict
        self.prepared: Prepared | None = None
        self.disputed: dict[Team, Sequence[Tensor]] = {}
        self._tasks: Sequence[Task] = ()
        self._kinds: dict[Team, list[int]] = {}
        self._facts: dict[Team, Facts] = {}
        self._refusal: Exception | None = None

    def make(self, teams: Mapping[Team, Sequence[Tensor]], partly: Mapping[Tensor, int], first: bool) -> None:
        """Prepare the step, with gradients of these kinds in place of those that only other ranks have.

        Gradients that are placed otherwise than their parameters are exchanged, of which all ranks have to know: not
        before the first message.
        """
        self.prepared, self._tasks = None, ()  # to be given back before as much is made again
        found: dict[int, Tensor | None] = {}  # by id: a Tensor's hash takes longer

        def grad(p: Tensor) -> Tensor | None:
            if id(p) not in found:
                placed = _placed(p)
                if placed is None and p in partly:
                    placed = torch.zeros_like(p, dtype=_DTYPES[partly[p] - 1])
                found[id(p)] = placed
            return found[id(p)]

        try:
            self._kinds.update((team, [_kind(p) for p in params]) for team, params in teams.items())
            if first and any(kind >= _PLACED_OTHERWISE for kinds in self._kinds.values() for kind in kinds):
                self.verdict = max(self.verdict, _UNREADY)
                self._look_at_options(teams)
                return
            if not first:
                self.verdict = _READY
                for params in teams.values():  # in the order in which all ranks do it
                    for p in params:
                        grad(p)
            self.prepared, self._tasks = self._prepare(grad)
            self._look_at_options(teams)
        except Exception as error:  # to be raised when the others know
            self._refusal, self.verdict = error, _REFUSED

    def _look_at_options(self, teams: Mapping[Team, Sequence[Tensor]]) -> None:
        """Take down the options of all teams before the first of them is told: an option may have no text."""
        self._facts.update((team, self._options(params)) for team, params in teams.items())

    def compare(self, team: Team, params: Sequence[Tensor]) -> _Seen:
        """Exchange one message with a team."""
        refused = self._refusal is not None
        seen = _exchange(
            team,
            self.verdict,
            0 if refused else _digest(self._facts[team]),
            0 if self.prepared is None else _digest(self._plan(team)),
            [0] * len(params) if refused else self._kinds[team],
            local(params[0]).device,
        )
        if seen.verdict >= _FOUND_INF:
            self.verdict = max(self.verdict, seen.verdict)
        if seen.verdict == _REFUSED or not seen.options_alike or not all(seen.kinds_alike) or seen.lost:
            self.dispute(team, params)
        return seen

    def dispute(self, team: Team, params: Sequence[Tensor]) -> None:
        """Note that the ranks of a team do not step; the next teams hear of it."""
        self.disputed[team] = params
        self.verdict = _REFUSED

    def _plan(self, team: Team) -> Facts:
        """Return what this rank would exchange with a team."""
        found = [task.facts(team) for task in self._tasks]
        exchanges = enumerate(facts for facts in found if facts)
        return [(f"{name} of exchange {i}", value) for i, facts in exchanges for name, value in facts]

    def settle_disputes(self) -> None:
        """Raise, on every rank of a team that is disputed, what is the matter. All of them have to call this."""
        said = [self._ask(team, params) for team, params in self.disputed.items()]
        if self._refusal is not None:
            raise self._refusal
        for everybody in said:
            _raise_dispute(everybody)
        if self.verdict == _REFUSED:  # which a rank of another team has said
            raise RuntimeError("another rank cannot take this step, and says why; nothing has been stepped on this one")

    def _ask(self, team: Team, params: Sequence[Tensor]) -> dict[int, _Said]:
        """Return what every rank of a team says of its step, by its number among all ranks."""
        refused = self._refusal is not None
        own = _Said(
            f"{type(self._refusal).__name__}: {self._refusal}" if refused else "",
            [] if refused else self._facts[team],
            [] if refused else [(_kind(p), _described(p)) for p in params],
            [] if refused else self._plan(team),
        )
        everybody = {dist.get_rank(): own}
        for group in team.groups:
            gathered: list[Any] = [None] * group.size()
            with doing("asking all ranks what keeps them from a step", group):
                dist.all_gather_object(gathered, everybody, group=group)
            everybody = {rank: said for some in gathered for rank, said in some.items()}
        return dict(sorted(everybody.items()))


class _Said(NamedTuple):
    """Words of a rank about a step that it cannot take, or takes otherwise than others."""

    refusal: str
    options: Facts
    gradients: list[tuple[int, str]]  # kinds and descriptions
    plan: Facts


def _raise_dispute(everybody: Mapping[int, _Said]) -> None:
    """Raise what the ranks of a team disagree about, the same on all of them but those that cannot step."""
    for rank, said in everybody.items():
        if said.refusal:
            raise RuntimeError(
                f"rank {rank} cannot take this step; nothing has been stepped on any rank. It says: {said.refusal}"
            )
    options = _first_difference({rank: said.options for rank, said in everybody.items()})
    if options:
        raise ValueError(f"all ranks should step with the same options but {options}; nothing has been stepped")
    for i, found in enumerate(zip(*(said.gradients for said in everybody.values()), strict=True)):
        kinds = {kind for kind, _ in found}
        if len(kinds - {0}) > 1 or (0 in kinds and max(kinds) >= _PLACED_OTHERWISE):
            by_rank = _by_rank({rank: text for rank, (_, text) in zip(everybody, found, strict=True)})
            raise ValueError(
                f"all ranks should have gradients of one dtype, placed alike, but that of parameter {i} is {by_rank}; "
                "nothing has been stepped"
            )
    plan = _first_difference({rank: said.plan for rank, said in everybody.items()})
    if plan:
        raise ValueError(
            f"all ranks should plan the same exchange but {plan}; nothing has been stepped. Give all ranks the same "
            "backend and max_workspace_bytes, where they differ in processors or in what `tune` kept, and with "
            "stochastic_rounding the same parameters before these in param_groups"
        )


def _first_difference(facts: Mapping[int, Facts]) -> str:
    """Return a text of the first fact that differs between ranks, or an empty one."""
    columns = [dict(own) for own in facts.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        values = {rank: column.get(name, "missing") for rank, column in zip(facts, columns, strict=True)}
        if len(set(values.values())) > 1:
            return f"{name} is {_by_rank(values)}"
    return ""


def _by_rank(values: Mapping[int, str]) -> str:
    """Return a text such as "0.1 on rank 0, 0.2 on ranks 1 and 2"."""
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {names(of)}" for value, of in ranks.items())
