"""Ranks that would step otherwise than the others: all of them say which option, gradient or plan it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import needs
from ranks import World
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from muon_kernels import Muon, MuonAdamW, SpectralAdam, backends
from muon_kernels.options import OPTIONS
from muon_kernels.step.workspace import Workspace

SHAPES = [(40, 64), (64, 24), (40, 64)]
# Another value of each option, which a rank alone has.
OTHER: dict[str, Any] = {
    "lr": 0.2,
    "weight_decay": 0.3,
    "momentum": 0.9,
    "nesterov": False,
    "ns_coefficients": "polar_express",
    "eps": 1e-6,
    "ns_steps": 4,
    "adjust_lr_fn": "match_rms_adamw",
    "use_addmm": True,
    "dampened": False,
    "flatten": True,
    "split": "heads(4)",
    "transposed": True,
    "ns_algorithm": "standard",
    "backend": "eager",
    "max_workspace_bytes": 40_000,
    "workspace_dtype": "float16",
    "momentum_dtype": "bfloat16",
    "maximize": True,
    "power": 0.5,
    "weight_decay_form": "scheduled",
    "peak_lr": 0.7,
    "cautious": True,
    "stochastic_rounding": True,
    "sign_momentum": True,
    "exact_rms": True,
    "master_weights": True,
    "second_moment": "neuron",
    "beta2": 0.5,
    "strategy": "blocks",
    "block_period": 7,
    "block_lr_ratio": 0.5,
}
# What the options of these need of the dtype or of each other, so that a rank can step with them.
DTYPES = {"stochastic_rounding": torch.bfloat16, "master_weights": torch.bfloat16}


def build(
    layout: str, kind: Any = Muon, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **options: Any
) -> tuple[list[Tensor], Any]:
    torch.manual_seed(0)
    whole = [torch.randn(shape).to(dtype) for shape in shapes]
    if layout == "group":
        params = [torch.nn.Parameter(t) for t in whole]
        options["process_group"] = dist.group.WORLD
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        params = [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in whole]
    for p in params:
        p.grad = torch.ones_like(p)
    return params, kind(params, lr=0.1, **options)


def here(t: Tensor) -> Tensor:
    return t.detach().to_local() if isinstance(t, DTensor) else t.detach()


def attempt(params: list[Tensor], optimizer: Any) -> tuple[str, bool]:
    """(What a step said, or nothing; whether all stayed as it was.)"""
    before = [here(p).clone() for p in params]
    kept = {p: {key: here(t).clone() for key, t in state.items()} for p, state in optimizer.state.items()}
    said = ""
    try:
        optimizer.step()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    same = all(torch.equal(a, here(p)) for a, p in zip(before, params, strict=True))
    state = {p: {key: here(t) for key, t in of.items()} for p, of in optimizer.state.items()}
    same &= kept.keys() == state.keys()
    same = same and all(torch.equal(state[p][key], t) for p, of in kept.items() for key, t in of.items())
    return said, same


def differing(layout: str) -> dict[str, tuple[str, bool]]:
    """What is said of each option that rank 1 alone has changed."""
    found = {}
    for name, value in OTHER.items():
        params, optimizer = build(layout, dtype=DTYPES.get(name, torch.float32))
        optimizer.step()
        if dist.get_rank() == 1:
            optimizer.param_groups[0][name] = value
        found[name] = attempt(params, optimizer)
    return found


@pytest.mark.parametrize("layout", ["group", "rows"])
def test_any_option_that_differs_is_named(ranks: World, layout: str) -> None:
    """No value of an option on one rank harms another rank's process."""
    assert OTHER.keys() == OPTIONS.keys()
    for found in ranks.run(2, differing, layout):
        for name, (said, same) in found.items():
            assert same, name
            assert said.startswith(f"ValueError: all ranks should step with the same options but {name} of group 0 is ")
            assert " on rank 0, " in said and f"{OTHER[name]!r} on rank 1; nothing has been stepped" in said, said


class NoText:
    """A value of no option, of which nothing can be told."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def beyond_text(strange: str) -> tuple[str, bool, float]:
    """A `flatten` that rank 1 alone has, which ranks compare before anything else has been looked at."""
    params, optimizer = build("rows")
    optimizer.step()
    if dist.get_rank() == 1:
        group = optimizer.param_groups[0]
        values: dict[str, Any] = {
            "no text": NoText(),
            "meta": torch.empty(1, device="meta"),
            "not supported": {1: 2, "a": 3},
        }
        if strange == "'flatten'":
            del group["flatten"]
        else:
            group["flatten"] = values[strange]
    begun = time.monotonic()
    return *attempt(params, optimizer), time.monotonic() - begun


@pytest.mark.parametrize("strange", ["no text", "meta", "not supported", "'flatten'"])
def test_options_that_have_no_text_or_are_gone(ranks: World, strange: str) -> None:
    """The other rank is told, and does not wait for its timeout."""
    (told, unmoved, waited), (said, same, _) = ranks.run(2, beyond_text, strange)
    assert same and unmoved and waited < 20 and strange in said
    assert "rank 1 cannot take this step; nothing has been stepped on any rank" in told and strange in told


def vector_rates() -> tuple[str, bool]:
    """AdamW's learning rate on rank 1 alone."""
    params = [torch.nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    groups: list[dict[str, Any]] = [{"params": [p], "use_muon": i == 0} for i, p in enumerate(params)]
    optimizer = MuonAdamW(groups, muon_options={"process_group": dist.group.WORLD})
    optimizer.step()
    if dist.get_rank() == 1:
        groups[1]["lr"] = 0.5
    return attempt(params, optimizer)


def test_options_of_adamw_are_the_same_too(ranks: World) -> None:
    for said, same in ranks.run(2, vector_rates):
        assert same and "lr of AdamW's group 0 is 0.001 on rank 0, 0.5 on rank 1" in said


def only_seen_here(what: str, layout: str) -> tuple[str, bool, float]:
    """Something that rank 1 alone finds when it gets ready."""
    params, optimizer = build(layout, shapes=[(8, 6, 4), (8, 4, 4)], flatten=True)
    optimizer.step()
    nothing: Any = mock.patch.object(Workspace, "stacks", Workspace.stacks)
    if dist.get_rank() == 1 and what == "strides":
        grad = torch.ones_like(here(params[1])).mT  # rows of no matrix
        params[1].grad = DTensor.from_local(grad, params[1].device_mesh, [Shard(0)], run_check=False)
    if dist.get_rank() == 1 and what == "memory":
        nothing = mock.patch.object(Workspace, "reserve", side_effect=RuntimeError("no memory is left"))
    begun = time.monotonic()
    with nothing:
        return *attempt(params, optimizer), time.monotonic() - begun


@pytest.mark.parametrize(("what", "layout"), [("strides", "rows"), ("memory", "rows"), ("memory", "group")])
def test_what_only_one_rank_can_see_reaches_the_others(ranks: World, what: str, layout: str) -> None:
    """In seconds, not at the timeout, which is 60 s here."""
    (told, unmoved, waited), (said, same, _) = ranks.run(2, only_seen_here, what, layout)
    assert same and unmoved and waited < 20
    assert {"strides": "should be contiguous", "memory": "no memory is left"}[what] in said
    assert told == f"RuntimeError: rank 1 cannot take this step; nothing has been stepped on any rank. It says: {said}"


def other_plan(layout: str, what: str) -> tuple[str, bool]:
    """A rank whose backend takes another workspace by default, or whose gradients are of another dtype."""
    params, optimizer = build(layout, dtype=torch.bfloat16, shapes=4 * SHAPES, backend="eager")
    optimizer.step()
    other: Any = mock.patch.object(Workspace, "stacks", Workspace.stacks)
    if dist.get_rank() == 1 and what == "workspace":
        other = mock.patch.object(backends.get("eager"), "default_workspace_bytes", 1)
        optimizer._tasks.clear()
    if dist.get_rank() == 1 and what == "dtype":
        params[1].grad_dtype = None
        params[1].grad = params[1].grad.float()
    with other:
        return attempt(params, optimizer)


@pytest.mark.parametrize("layout", ["group", "rows"])
def test_plans_and_gradients_that_differ(ranks: World, layout: str) -> None:
    for said, same in ranks.run(2, other_plan, layout, "workspace"):
        assert same and said.startswith("ValueError: all ranks should plan the same exchange but the step of ")
        assert "of an owner at a time on rank 0, " in said and "max_workspace_bytes" in said
    for said, same in ranks.run(2, other_plan, layout, "dtype"):
        assert same and "that of parameter 1 is torch.bfloat16" in said and "on rank 0, torch.float32" in said


def later_plan(layout: str) -> tuple[str, bool]:
    """As before, in a step of which rank 1 lacks a gradient: its plan is compared by the second message."""
    params, optimizer = build(layout, shapes=4 * SHAPES, backend="eager")
    optimizer.step()
    if dist.get_rank() == 0:
        return attempt(params, optimizer)
    ones, params[1].grad = params[1].grad, None
    first, tried, eager = optimizer._prepare, [], backends.get("eager")

    def prepare(groups: Any, grad_of: Any) -> Any:
        """The first time as rank 0 does, then in less memory."""
        tried.append(groups)
        if len(tried) == 1:
            return first(groups, lambda p: ones if p is params[1] else grad_of(p))
        optimizer._tasks.clear()
        with mock.patch.object(eager, "default_workspace_bytes", 1):
            return first(groups, grad_of)

    with mock.patch.object(optimizer, "_prepare", prepare):
        said = attempt(params, optimizer)
    assert len(tried) == 2
    return said


def test_plans_are_compared_by_the_second_message_too(ranks: World) -> None:
    for said, same in ranks.run(2, later_plan, "rows"):
        assert same and said.startswith("ValueError: all ranks should plan the same exchange"), said


def of_a_wider_team() -> tuple[str, bool, float]:
    """Ranks in pairs that each share a parameter, of which all share another; rank 1 fails at its second preparation.

    Of the pair's it lacks a gradient, which is why there is one. In the team of all nothing is amiss but that.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pairs", "pair"))
    everybody = init_device_mesh("cpu", (4,))
    whole = [torch.randn(12, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    params = [
        torch.nn.Parameter(distribute_tensor(t, on, [Shard(0)], src_data_rank=None))
        for t, on in zip(whole, (mesh["pair"], everybody), strict=True)
    ]
    optimizer = Muon(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    first, tried = optimizer._prepare, []

    def prepare(*args: Any) -> Any:
        tried.append(args)
        if len(tried) > 1:
            raise RuntimeError("no memory is left")
        return first(*args)

    if dist.get_rank() == 1:
        params[0].grad = None
        optimizer._prepare = prepare
    begun = time.monotonic()
    said, same = attempt(params, optimizer)
    assert dist.get_rank() != 1 or len(tried) == 2
    return said, same, time.monotonic() - begun


def test_a_wider_team_hears_of_the_second_message(ranks: World) -> None:
    """In seconds: a rank that does not hear of it begins to step, and waits for those that do not until the timeout."""
    for rank, (returned, found) in enumerate(ranks.outcomes(4, of_a_wider_team, timeout=15)):
        assert returned, found
        said, same, waited = found
        assert same and waited < 10
        assert ("no memory is left" in said) and ("rank 1 cannot take this step" in said) == (rank != 1), said


def messages(run: Callable[[], Any]) -> int:
    """How often `run` asks all ranks for a maximum."""
    count = 0
    reduce = dist.all_reduce

    def counted(t: Tensor, op: Any = dist.ReduceOp.SUM, **rest: Any) -> Any:
        nonlocal count
        count += op == dist.ReduceOp.MAX
        return reduce(t, op, **rest)

    with mock.patch.object(dist, "all_reduce", counted):
        run()
    return count


# Of parameter 1 in each step: gradients on all ranks, on rank 1 alone, or on none.
GIVEN = ["all", "one", "one", "none", "all", "all", "none", "none", "one", "one", "all"]


def missing(layout: str) -> tuple[list[int], bool]:
    """(Messages of each step, whether parameters are those of zeros in place of what is missing.)"""
    params, optimizer = build(layout)
    same, expected = build(layout)
    counts, alike = [], True
    for given in GIVEN:
        for p in (params[1], same[1]):
            p.grad = None if given == "none" else torch.full_like(p, float(given == "all" or dist.get_rank()))
        if given == "one" and layout == "group":  # where copies share gradients, so rank 0's are zero as well
            same[1].grad.zero_()
            params[1].grad = torch.zeros_like(params[1]) if dist.get_rank() else None
        elif given == "one" and not dist.get_rank():
            params[1].grad = None
        counts.append(messages(optimizer.step))
        expected.step()
        alike &= all(torch.equal(here(p), here(q)) for p, q in zip(params, same, strict=True))
    return counts, alike


@pytest.mark.parametrize("layout", ["group", "rows"])
def test_gradients_that_come_and_go(ranks: World, layout: str) -> None:
    """A second message only where ranks could not know from the step before who lacks a gradient."""
    for counts, alike in ranks.run(2, missing, layout):
        assert alike and counts == [1, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1]


def partial_gradients(of_rank_1: str) -> tuple[str, bool, bool]:
    """Gradients that are still to be summed over ranks, as DTensor's own operations leave them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
    q = torch.nn.Parameter(whole.clone())
    optimizer, alone = Muon([p], lr=0.1, backend="cpu"), Muon([q], lr=0.1, backend="cpu")
    mine = [torch.randn(12, 16, generator=torch.Generator().manual_seed(1 + r)) for r in range(2)]
    p.grad = DTensor.from_local(mine[dist.get_rank()], mesh, [Partial()], run_check=False)
    q.grad = mine[0] + mine[1]
    if of_rank_1 == "missing" and dist.get_rank():
        p.grad = None
    if of_rank_1 == "replicated" and dist.get_rank():
        p.grad = DTensor.from_local(mine[1], mesh, [Replicate()], run_check=False)
    said, unmoved = attempt([p], optimizer)
    alone.step()
    return said, unmoved, torch.equal(p.detach().full_tensor(), q.detach())


@needs.cpu_kernels
def test_gradients_that_are_placed_otherwise(ranks: World) -> None:
    """They are exchanged if all ranks have one; a rank that has none does not hang the others."""
    for said, _, stepped in ranks.run(2, partial_gradients, ""):
        assert not said and stepped
    others = {"missing": "missing on rank 1", "replicated": "torch.float32 placed (Replicate(),) on rank 1"}
    for other, text in others.items():
        for said, unmoved, _ in ranks.run(2, partial_gradients, other):
            assert unmoved
            assert f"that of parameter 0 is torch.float32 placed (Partial(sum),) on rank 0, {text}" in said


def of_spectral_adam() -> tuple[str, bool]:
    params, optimizer = build("rows", kind=SpectralAdam)
    optimizer.step()
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["betas"] = (0.9, 0.9)
    return attempt(params, optimizer)


def test_options_of_spectral_adam(ranks: World) -> None:
    for said, same in ranks.run(2, of_spectral_adam):
        assert same and "betas of group 0 is (0.9, 0.95) on rank 0, (0.9, 0.9) on rank 1" in said


def numbered(rounding: bool) -> tuple[str, bool]:
    """Rank 1 has a matrix of its own before one that both have."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shared = torch.nn.Parameter(distribute_tensor(torch.ones(12, 16).bfloat16(), mesh, [Shard(0)], src_data_rank=None))
    own = [torch.nn.Parameter(torch.ones(4, 4).bfloat16())] * dist.get_rank()
    for p in (shared, *own):
        p.grad = torch.ones_like(p)
    return attempt([shared], Muon([*own, shared], stochastic_rounding=rounding))


def test_numbers_of_matrices_that_differ(ranks: World) -> None:
    """Random bits depend on them: copies would no longer be any."""
    for said, same in ranks.run(2, numbered, True):
        assert same and "the numbers of lot 0's matrices in their param groups of exchange 0 is" in said
        assert "stochastic_rounding the same parameters before these in param_groups" in said
    for said, same in ranks.run(2, numbered, False):
        assert not said and not same


def of_groups(what: str) -> tuple[str, bool]:
    """Rank 1 has another lr in the second group; parameters of the first may be its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [torch.randn(12, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    shared = [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)) for t in whole]
    if what == "a group of its own":
        shared[1] = torch.nn.Parameter(whole[1])
    for p in shared:
        p.grad = torch.ones_like(p)
    rates = 0.1, 0.3 if dist.get_rank() else 0.2
    optimizer = Muon([{"params": [p], "lr": 0.1} for p in shared])
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    return attempt(shared, optimizer)


def test_options_of_a_second_group(ranks: World) -> None:
    for said, same in ranks.run(2, of_groups, "shared"):
        assert same and "lr of group 1 is 0.2 on rank 0, 0.3 on rank 1" in said


def test_a_group_of_another_team_may_differ(ranks: World) -> None:
    """What a rank steps alone is its own affair."""
    for said, same in ranks.run(2, of_groups, "a group of its own"):
        assert not said and not same


def of_two_teams(how: str) -> tuple[str, bool]:
    """A parameter of which ranks have parts beside one of which they have copies, or one that is rank 0's own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [torch.randn(12, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    first = distribute_tensor(whole[0], mesh, [Shard(0)], src_data_rank=None)
    second = distribute_tensor(whole[1], mesh, [Replicate()], src_data_rank=None)
    params = [torch.nn.Parameter(first), torch.nn.Parameter(second)]
    plain = [torch.nn.Parameter(t.clone()) for t in whole[:2]]
    if how == "own" and dist.get_rank() == 0:
        params.insert(0, torch.nn.Parameter(whole[2]))
    optimizer, alone = Muon(params, lr=0.1, backend="cpu"), Muon(plain, lr=0.1, backend="cpu")
    for p in (*params, *plain):
        p.grad = torch.ones_like(p)
    if how == "missing":  # zeros in place of rank 1's part
        if dist.get_rank() == 1:
            params[0].grad = None
        plain[0].grad[6:] = 0
    if how == "lr" and dist.get_rank() == 1:
        optimizer.param_groups[0]["lr"] = 0.3
    said, unmoved = attempt(params, optimizer)
    alone.step()
    same = [torch.equal(p.detach().full_tensor(), q.detach()) for p, q in zip(params[-2:], plain, strict=True)]
    return said, unmoved if said else all(same)


@needs.cpu_kernels
@pytest.mark.parametrize("how", ["missing", "own", "lr"])
def test_two_teams_of_the_same_ranks(ranks: World, how: str) -> None:
    """What is missing in one, or is a rank's own, is no difference in the other."""
    for said, right in ranks.run(2, of_two_teams, how):
        assert right and bool(said) == (how == "lr"), said


def stepped_once(flatten: bool | None, kind: type) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """A matrix and a stack, both cut along their first dimension."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((12, 16), (6, 4, 5))]
    params = [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)) for t in whole]
    optimizer = kind([{"params": params[:1]}, {"params": params[1:], "flatten": flatten}], lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return params, optimizer


def flattened(before: bool | None, after: bool | None, whose: list[int], kind: type) -> tuple[str, bool, float]:
    """`flatten` of a stack changes on some ranks, beside a matrix that they share; its cut is of experts or of rows."""
    params, optimizer = stepped_once(before, kind)
    if dist.get_rank() in whose:
        optimizer.param_groups[1]["flatten"] = after
    begun = time.monotonic()
    return *attempt(params, optimizer), time.monotonic() - begun


@pytest.mark.parametrize("kind", [Muon, SpectralAdam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("before", "after"), [(None, True), (True, None)])
def test_teams_that_one_rank_alone_would_make_or_leave(
    ranks: World, before: bool | None, after: bool | None, kind: type
) -> None:
    """It is said in the teams that there have been; where all ranks have changed, they step in those that there are."""
    for returned, found in ranks.outcomes(2, flattened, before, after, [1], kind, timeout=15):
        assert returned, found
        said, same, waited = found
        assert same and waited < 10
        text = "new flatten 0" if before is None else "flatten of group 1"
        assert f"but {text} is {'missing' if before is None else before} on rank 0, {after} on rank 1" in said, said
    for said, same, _ in ranks.run(2, flattened, before, after, [0, 1], kind):
        assert not said and not same


def mended(before: bool | None, after: bool | None, kind: type) -> list[tuple[str, bool]]:
    """Steps after one rank's `flatten` was refused: it takes it back; it changes it again; all have it."""
    params, optimizer = stepped_once(before, kind)
    found = []
    for flatten in (after if dist.get_rank() == 1 else before, before) * 2 + (after,):
        optimizer.param_groups[1]["flatten"] = flatten
        found.append(attempt(params, optimizer))
    return found


@pytest.mark.parametrize("kind", [Muon, SpectralAdam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("before", "after"), [(None, True), (True, None)])
def test_a_step_after_one_ranks_teams_were_refused(
    ranks: World, before: bool | None, after: bool | None, kind: type
) -> None:
    for refused, back, again, _, everywhere in ranks.run(2, mended, before, after, kind):
        assert all("flatten" in said and same for said, same in (refused, again))
        assert not any(said or same for said, same in (back, everywhere))


def of_vectors() -> tuple[str, bool]:
    """A gradient that AdamW's half cannot step, on rank 1 alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(12, 16), mesh, [Shard(0)])) for _ in range(2)]
    optimizer = MuonAdamW([{"params": [p], "use_muon": i == 0} for i, p in enumerate(params)])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    if dist.get_rank():
        optimizer.param_groups[1]["betas"] = (1.5, 0.9)
    return attempt(params, optimizer)


def test_vectors_that_one_rank_cannot_step(ranks: World) -> None:
    (told, unmoved), (said, same) = ranks.run(2, of_vectors)
    assert unmoved and same and "rank 1 cannot take this step" in told and said in told and "beta" in said


def of_three() -> tuple[str, bool]:
    params, optimizer = build("group")
    optimizer.param_groups[0]["lr"] = 0.5 if dist.get_rank() == 1 else torch.tensor(0.1)
    return attempt(params, optimizer)


def test_ranks_are_listed_by_value(ranks: World) -> None:
    for said, same in ranks.run(3, of_three):
        assert same and "lr of group 0 is 0.10000000149011612 on ranks 0 and 2, 0.5 on rank 1; " in said
