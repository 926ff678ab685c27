"""Ranks that die, hang, differ or find what cannot be stepped: all others say so, in time."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checks import needs
from ranks import World, world
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muon_kernels import Muon, SpectralAdam
from muon_kernels.cli.demo import training
from muon_kernels.distributed import agreement, collectives, consensus, exchange, missing, second_moment
from muon_kernels.distributed.lots import Results
from muon_kernels.distributed.strategies.owner import OwnerRound
from muon_kernels.distributed.strategies.replicas import ReplicaRound
from muon_kernels.tensors import local

SHAPES = [(40, 64), (64, 24), (40, 64)]


def build(layout: str, shapes: Any = SHAPES, kind: type = Muon, **options: Any) -> tuple[list[Tensor], Any]:
    torch.manual_seed(0)
    whole = [torch.randn(shape) for shape in shapes]
    if layout == "group":
        params = [torch.nn.Parameter(t) for t in whole]
        return params, kind(params, lr=0.1, process_group=dist.group.WORLD, **options)
    hybrid = layout == "hybrid"
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2) if hybrid else (size,), mesh_dim_names=("a", "b")[: 1 + hybrid])
    placements = [Replicate(), Shard(0)] if hybrid else [Shard(0)]
    params = [torch.nn.Parameter(distribute_tensor(t, mesh, placements)) for t in whole]
    return params, kind(params, lr=0.1, **options)


def give(params: list[Tensor]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def die_in(layout: str, where: str) -> None:
    params, optimizer = build(layout)
    give(params)
    optimizer.step()
    missing._PATIENCE = 1.0
    if dist.get_rank() == 1:
        for kind in (OwnerRound, ReplicaRound):
            setattr(kind, where, lambda *_: os._exit(1))
    optimizer.step()


@pytest.mark.parametrize("layout", ["group", "rows"])
@pytest.mark.parametrize("where", ["begin", "iterate", "end"])
def test_a_rank_that_dies(ranks: World, layout: str, where: str) -> None:
    begun = time.monotonic()
    (first, said), (second, _), (third, too) = ranks.outcomes(3, die_in, layout, where, timeout=10)
    assert time.monotonic() - begun < 60
    assert not second
    if where == "end":  # it has done its part; who needs no more of it may end well
        return
    for returned, text in ((first, said), (third, too)):
        assert "; missing: rank 1, not heard of within 1 s" in text
        assert not returned and "RuntimeError: step 2 of Muon is incomplete" in text
        assert "x 40x64" in text or "x 24x64" in text, text
        assert "go on from the last checkpoint" in text


def die_in_a_gather(hybrid: bool) -> None:
    params, optimizer = build("hybrid" if hybrid else "group")
    give(params)
    optimizer.step()
    if dist.get_rank() == 1:
        collectives._gather = lambda *_: os._exit(1)
    optimizer.step()


@pytest.mark.parametrize(("hybrid", "size"), [(False, 3), (True, 4)])
def test_a_rank_that_dies_in_a_gather(hybrid: bool, size: int) -> None:
    """All that need its results say so; under hybrid sharding the ranks of its shard, and who waits for these.

    Its own processes: those of other tests have taken part in other numbers of meshes where one has died.
    """
    with world(size) as ranks:
        begun = time.monotonic()
        found = ranks.outcomes(size, die_in_a_gather, hybrid, timeout=10)
        assert time.monotonic() - begun < 60
    assert not found[1][0]
    for rank in [0, 2] if not hybrid else [3]:
        returned, text = found[rank]
        assert not returned and "RuntimeError: step 2 of Muon is incomplete" in text
        assert "gathering the results of the bucket of" in text


def late() -> None:
    params, optimizer = build("rows")
    give(params)
    missing._PATIENCE = 1.0
    if dist.get_rank() == 1:
        time.sleep(4)
        return
    optimizer.step()


def test_a_rank_that_does_not_come(ranks: World) -> None:
    (returned, text), _ = ranks.outcomes(2, late, timeout=2)
    assert not returned and "step 1 of Muon did not begin: asking all ranks for their gradients" in text
    assert "; missing: rank 1, not heard of within 1 s" in text


def raises_once(hybrid: bool) -> list[bool]:
    """Whether parameters are the same after a step in which no result was applied and one in which all were.

    The first stops, on all ranks, where its first results are to be applied; beside it nothing is applied for a step.
    """
    found = []
    for nothing in ({"side_effect": MemoryError}, {"return_value": None}):
        params, optimizer = build("hybrid" if hybrid else "group")
        give(params)
        with (
            mock.patch.object(exchange, "part_bytes", lambda cap: 1),  # several parts are under way, and others wait
            mock.patch.object(Results, "apply", **nothing),
            pytest.raises(MemoryError) if "side_effect" in nothing else nullcontext(),
        ):
            optimizer.step()
        for i, p in enumerate(params):  # another direction: results of the first step are not those of this one
            p.grad = torch.ones_like(p).cumsum(i % 2).cos()
        optimizer.step()
        found.append([local(p.detach()) for p in params])
    return [torch.equal(p, q) for p, q in zip(*found, strict=True)]


@pytest.mark.parametrize(("hybrid", "size"), [(False, 3), (True, 4)])
def test_a_step_after_one_that_raised(hybrid: bool, size: int) -> None:
    """Results of the first are not taken for the second's; in processes of its own, as above."""
    with world(size) as ranks:
        for same in ranks.run(size, raises_once, hybrid):
            assert all(same)


class Collectives:
    """Calls `before` with its number ahead of every collective of this rank."""

    def __init__(self, before: Callable[[int], object]) -> None:
        self._before, self.count = before, 0

    def __enter__(self) -> Collectives:
        self._own = collectives.doing
        for module in (collectives, agreement, second_moment):
            module.doing = self._counted
        return self

    def __exit__(self, *_: object) -> None:
        for module in (collectives, agreement, second_moment):
            module.doing = self._own

    def _counted(self, what: str, group: Any, since: float | None = None) -> Any:
        if since is None:  # it begins
            self._before(self.count)
            self.count += 1
        return self._own(what, group, since)


def missing_at(layout: str, at: int | None, how: str) -> int:
    """The number of collectives of a step; rank 1 comes late to one of them, or to all, hangs or dies."""
    params, optimizer = build(layout, backend="cpu", second_moment="neuron" if how == "dies" else None)
    give(params)
    optimizer.step()
    missing._PATIENCE = 5.0 if how == "is late" else 0.5

    def before(index: int) -> None:
        if dist.get_rank() == 1 and at in (None, index):
            if how == "dies" and at is not None:
                os._exit(1)
            time.sleep(0.1 if at is None else 3.0)

    with Collectives(before) as calls:
        optimizer.step()
    return calls.count


@needs.cpu_kernels
@pytest.mark.parametrize("layout", ["group", "rows"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("is late", r"; rank 1 came last, [234]\.\d s after the first"),
        ("hangs", r"; missing: rank 1, not heard of within 0\.5 s"),
        ("dies", r"; missing: rank 1, not heard of within 0\.5 s"),
    ],
    ids=["late", "hangs", "dies"],
)
def test_a_rank_that_is_missing_at_any_collective(ranks: World, layout: str, how: str, said: str) -> None:
    """Whichever it is, the other rank says in time which step, matrices and rank it is about."""
    count, _ = ranks.run(2, missing_at, layout, None, how)
    assert count >= 2
    for index in range(count):
        begun = time.monotonic()
        timeout = 20.0 if how == "dies" else 1.5  # what dies is noticed at once
        (returned, text), (_, of_late) = ranks.outcomes(2, missing_at, layout, index, how, timeout=timeout)
        assert time.monotonic() - begun < 30
        if returned:  # the last results may have been on their way already
            assert index == count - 1
            continue
        assert re.search(said, text), (index, text)
        if how == "is late":  # and hears why it was not waited for
            assert re.search(said, of_late), (index, of_late)
        if index:
            assert "step 2 of Muon is incomplete" in text and ("x 40x64" in text or "x 24x64" in text), (index, text)
        else:
            assert "step 2 of Muon did not begin: asking all ranks" in text


SILENT = ": dead, hanging, or waiting for one that is"


class Hanging:
    """A store that takes a word and does not answer."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool:
        time.sleep(60)
        return True


def said_by(store: Any, words: dict[int, tuple[str, float]], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said on rank 0 of the ranks 0, 2, 5 and 7, of which others have given their words."""
    for rank, word in words.items():
        store.set(missing._key(rank), json.dumps(word))
    fake = SimpleNamespace(get_rank=lambda: 0, get_process_group_ranks=lambda group: [0, 2, 5, 7])
    monkeypatch.setattr(missing, "dist", fake)
    of_all = SimpleNamespace(_get_default_group=lambda: None, _get_process_group_store=lambda group: store)
    monkeypatch.setattr(missing, "distributed_c10d", of_all)
    monkeypatch.setattr(missing, "_given", None)
    monkeypatch.setattr(missing, "_PATIENCE", 0.3)
    return missing.missing(SimpleNamespace(group_name="own"), 100.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "; missing: ranks 2, 5 and 7, not heard of within 0.3 s" + SILENT),
        ({5: ("own", 100.0), 7: ("own", 100.0)}, "; missing: rank 2, not heard of within 0.3 s" + SILENT),
        ({2: ("own", 100.0), 5: ("own", 101.6), 7: ("own", 99.0)}, "; rank 5 came last, 2.6 s after the first"),
        ({2: ("own", 100.0), 5: ("own", 100.1), 7: ("own", 99.9)}, "; all ranks came to it, and it failed on all"),
        (
            {2: ("own", 100.0), 5: ("copies", 1.0), 7: ("own", 100.0)},
            "; missing: rank 5, where a collective with other ranks has failed",
        ),
    ],
)
def test_what_is_said_of_ranks_that_are_missing(
    words: dict[int, tuple[str, float]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said_by(dist.HashStore(), words, monkeypatch) == said


def test_a_failure_that_was_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a collective has completed, a rank's word of the last failure is not taken for one of the next."""
    store = dist.HashStore()
    said_by(store, {}, monkeypatch)
    assert store.check([missing._key(0)])
    with collectives.doing("summing", None):  # type: ignore[arg-type]
        pass
    assert not store.check([missing._key(0)])


@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError])
def test_an_error_of_ones_own(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is called, and nobody is said to be missing."""
    monkeypatch.setattr(collectives, "missing", lambda group, since: "; missing: rank 1")
    with pytest.raises(collectives.Failed, match=r"^summing: own$"), collectives.doing("summing", None):  # type: ignore[arg-type]
        raise error("own")


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be on the rank that died; the error comes all the same, in twice the time."""
    unknown = "; which rank is missing is not known, as the store of the process group does not answer"
    assert said_by(None, {}, monkeypatch) == unknown
    begun = time.monotonic()
    assert said_by(Hanging(), {}, monkeypatch) == unknown
    assert time.monotonic() - begun < 20


def infinite_alone() -> list[int]:
    """GradScaler leaves the step out on the rank that has the infinity, without asking others."""
    params, optimizer = build("group")
    give(params)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    if dist.get_rank() == 1:
        params[1].grad.fill_(torch.inf)
    scaler.step(optimizer)
    time.sleep(6)
    return [len(optimizer.state)]


def test_an_infinity_on_one_rank_alone(ranks: World) -> None:
    """Gradients should be the same on all; the others say what may be the matter, in time."""
    (returned, text), other = ranks.outcomes(2, infinite_alone, timeout=2)
    assert not returned and "step 1 of Muon did not begin: asking all ranks" in text
    assert "GradScaler leaves out where gradients of one rank alone are not finite" in text and other == (True, [0])


def refuse(layout: str, kind: type) -> list[Any]:
    params, optimizer = build(layout, kind=kind)
    give(params)
    before = [p.detach().clone() for p in params]
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["lr"] = float("nan")
    try:
        optimizer.step()
    except Exception as error:
        same = all(torch.equal(a, b) for a, b in zip(before, [p.detach() for p in params], strict=True))
        return [f"{type(error).__name__}: {error}", same, len(optimizer.state)]
    return []


@pytest.mark.parametrize("kind", [Muon, SpectralAdam], ids=lambda kind: kind.__name__)
def test_what_one_rank_cannot_step_no_rank_steps(ranks: World, kind: type) -> None:
    first, second = ranks.run(2, refuse, "rows", kind)
    assert first == [
        "RuntimeError: rank 1 cannot take this step; nothing has been stepped on any rank. It says: ValueError: "
        f"{'Learning rate' if kind is Muon else 'lr'} should be >= 0 but is: nan",
        True,
        0,
    ]
    assert second[1:] == [True, 0] and "should be >= 0 but is: nan" in second[0]


def differ(what: str) -> str:
    shapes, options = list(SHAPES), {}
    if dist.get_rank() == 1:
        if what == "a size":
            shapes[1] = (64, 32)
        elif what == "a parameter less":
            shapes.pop()
        else:
            options = {"momentum": 0.9}
    try:
        build("group", shapes, **options)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "a size",
            "rank 1 of the process group gave parameter 1 of size (64, 32) and torch.float32 where rank 0 gave "
            "parameter 1 of size (64, 24) and torch.float32",
        ),
        ("a parameter less", "gave nothing more where rank 0 gave parameter 2 of size (40, 64)"),
        ("an option", "gave momentum=0.9 where rank 0 gave momentum=0.95"),
    ],
)
def test_ranks_that_differ_are_told_at_construction(ranks: World, what: str, said: str) -> None:
    for text in ranks.run(3, differ, what):
        assert text.startswith("all ranks should give the optimizer the same parameters") and said in text


def scaled(layout: str) -> tuple[list[bool], list[float], int]:
    """Three steps with GradScaler; in the second a NaN, of DTensors on one rank alone.

    Under DistributedDataParallel, which plain tensors are for, a NaN of one rank is in the gradients of all.
    """
    params, optimizer = build(layout)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    moved, scales = [], []
    for step in range(3):
        give(params)
        for p in params:
            p.grad.mul_(scaler.get_scale())
        scaler.scale(torch.zeros(()))
        part = params[1].grad
        if step == 1 and not isinstance(part, DTensor):
            part.view(-1)[0] = torch.nan
        elif step == 1 and dist.get_rank() == 1:
            part.to_local().view(-1)[0] = torch.nan
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        moved.append(not any(torch.equal(a, p.detach()) for a, p in zip(before, params, strict=True)))
        scales.append(scaler.get_scale())
    finite = all(bool((p.to_local() if isinstance(p, DTensor) else p).isfinite().all()) for p in params)
    return moved, scales, finite


def test_a_nan_on_one_rank_skips_the_step_of_all(ranks: World) -> None:
    """GradScaler tells all ranks that have a part of a DTensor."""
    for layout in ("rows", "group"):
        for moved, scales, finite in ranks.run(2, scaled, layout):
            assert moved == [True, False, True] and scales == [16.0, 8.0, 16.0] and finite


def lacking(layout: str) -> tuple[bool, bool]:
    """A gradient that only one rank has, and one that none has, against zeros and nothing in their place."""
    params, optimizer = build(layout)
    give(params)
    params[2].grad = None
    if dist.get_rank() == 1:
        params[0].grad = None
    optimizer.step()
    same, expected = build(layout)
    give(same)
    same[2].grad = None
    if dist.get_rank() == 1:
        same[0].grad.zero_()
    expected.step()
    kept = torch.equal(params[2].detach(), build(layout)[0][2].detach())
    return all(torch.equal(p.detach(), q.detach()) for p, q in zip(params, same, strict=True)), kept


def test_gradients_that_some_ranks_lack(ranks: World) -> None:
    assert ranks.run(3, lacking, "rows") == [(True, True)] * 3


def begun(layout: str) -> tuple[bool, bool, bool]:
    """Whether init_state moves nothing, makes this rank's state of a step, and changes no step."""
    params, optimizer = build(layout, second_moment="neuron")
    same, expected = build(layout, second_moment="neuron")
    optimizer.init_state()
    unmoved = all(torch.equal(p.detach(), q.detach()) for p, q in zip(params, same, strict=True))
    made = [set(optimizer.state.get(p, {})) for p in params]
    for tensors, each in ((params, optimizer), (same, expected)):
        give(tensors)
        each.step()
    alike = all(torch.equal(p.detach(), q.detach()) for p, q in zip(params, same, strict=True))
    return unmoved, any(made) and made == [set(expected.state.get(p, {})) for p in same], alike


@pytest.mark.parametrize("layout", ["rows", "group"])
def test_state_before_the_first_step(ranks: World, layout: str) -> None:
    assert ranks.run(2, begun, layout) == [(True, True, True)] * 2


def changed(how: str) -> tuple[bool, str]:
    """(whether two steps are those of one process, what was said) where `how` comes between them."""
    whole = [torch.randn(8, 12, 10, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = {"lr": 0.1, "backend": "cpu"}
    if how == "flatten, once True":
        options["flatten"] = True
    params = [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)) for t in whole]
    plain = [torch.nn.Parameter(t.clone()) for t in whole]
    if how.startswith("a group"):
        params = [torch.nn.Parameter(t.clone()) for t in whole]
        options["process_group"] = dist.group.WORLD
    optimizer = Muon(params, **options)
    alone = Muon(plain, **{key: value for key, value in options.items() if key != "process_group"})
    said = ""
    for step in range(2):
        for p, q in zip(params, plain, strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(10 + step))
            p.grad = q.grad.clone()
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(q.grad, mesh, [Shard(0)], src_data_rank=None)
        try:
            optimizer.step()
            alone.step()
            if step == 0 and how.startswith("flatten"):
                optimizer.param_groups[0]["flatten"] = alone.param_groups[0]["flatten"] = not options.get("flatten")
            elif step == 0 and how == "a copy":
                optimizer, params = copy.deepcopy((optimizer, params))
            elif step == 0 and how == "a group's copy":
                copy.deepcopy(optimizer)
            elif step == 0 and how == "a group's power":
                optimizer.param_groups[0]["power"] = 1.0
            elif step == 0:
                optimizer.param_groups[0]["momentum_dtype"] = alone.param_groups[0]["momentum_dtype"] = torch.int8
        except (TypeError, ValueError) as error:
            said = str(error)
            break
    got = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]
    return all(map(torch.equal, got, [q.detach() for q in plain])), said


@needs.cpu_kernels
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("flatten, once True", ""),
        ("flatten", ""),
        ("a copy", ""),
        ("a group's copy", "an optimizer with a process_group should not be copied or pickled"),
        ("a group's power", "power should not become 1 with a process_group"),
        ("eight bits", ""),
    ],
)
def test_what_changes_between_steps(ranks: World, how: str, said: str) -> None:
    for same, text in ranks.run(2, changed, how):
        assert same and text.startswith(said) and bool(text) == bool(said)


def ask_alone() -> str:
    params, optimizer = build("group")
    give(params)
    optimizer.step()
    consensus._PATIENCE = timedelta(seconds=1)
    if dist.get_rank() == 0:
        begun = time.monotonic()
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            return str(error) if time.monotonic() - begun < 4 else "too late"
    else:
        time.sleep(8)
    return ""


def test_a_checkpoint_asked_for_on_one_rank(ranks: World) -> None:
    assert "state_dict() should be called on every rank" in ranks.outcomes(2, ask_alone)[0][1]


def saved_alone(kind: type) -> list[Any]:
    """What rank 2 has after consolidation, alone; what others say; and that a step makes it old."""
    params, optimizer = build("group", kind=kind)
    give(params)
    optimizer.step()
    whole = optimizer.state_dict()
    optimizer.consolidate_state_dict(to=2)
    before = torch.distributed.all_gather_object  # which nobody may call now
    torch.distributed.all_gather_object = None  # type: ignore[assignment]
    try:
        found = optimizer.state_dict()
        torch.testing.assert_close(found["state"], whole["state"], rtol=0, atol=0)
        said = "" if found["state"] else "nothing"
    except RuntimeError as error:
        said = str(error)
    finally:
        torch.distributed.all_gather_object = before
    again = build("group", kind=kind)[1]
    optimizer.step()
    stepped = optimizer.state_dict()  # of all ranks again
    again.load_state_dict(stepped)
    torch.testing.assert_close(again.state_dict()["state"], stepped["state"], rtol=0, atol=0)
    try:
        optimizer.consolidate_state_dict(to=3)
    except ValueError as error:
        return [said, str(error)]
    return [said]


@pytest.mark.parametrize("kind", [Muon, SpectralAdam], ids=lambda kind: kind.__name__)
def test_a_checkpoint_on_one_rank_only(ranks: World, kind: type) -> None:
    found = ranks.run(3, saved_alone, kind)
    for _, wrong in found:
        assert wrong == "to should be a rank of the process group, 0 to 2, but is: 3"
    assert found[2][0] == ""
    for said, _ in found[:2]:
        assert said.startswith("state_dict() should be called on rank 2 of the process group, to which consolidate")


def on_the_way() -> list[str]:
    """What rank 1 does with the state of others as it comes: messages, and moves to the host."""
    params, optimizer = build("group", 2 * SHAPES)
    give(params)
    optimizer.step()
    done: list[str] = []
    got: list[Tensor] = []
    receive, to_host = dist.recv, Tensor.cpu

    def received(t: Tensor, **rest: Any) -> Any:
        done.append("received")
        got.append(t)
        return receive(t, **rest)

    def moved(t: Tensor) -> Tensor:
        done.extend("moved" for other in got if t is other)  # torch moves its messages, too
        return to_host(t)

    dist.recv, Tensor.cpu = received, moved  # type: ignore[assignment, method-assign]
    try:
        optimizer.consolidate_state_dict(to=1)
    finally:
        dist.recv, Tensor.cpu = receive, to_host  # type: ignore[method-assign]
    return done


def test_consolidated_state_goes_to_the_host(ranks: World) -> None:
    """Piece by piece: a GPU need not have room for what all ranks keep, nor for two pieces."""
    others, found = ranks.run(2, on_the_way)
    assert others == []
    assert len(found) >= 4 and found == ["received", "moved"] * (len(found) // 2)


def of_empty_groups(what: str) -> str:
    """What is said where rank 1 alone has no parameter in a second group, or another option in an empty one."""
    params, alone = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(2)], dist.get_rank() == 1
    group: dict[str, Any] = {"params": params[1:]}
    if what == "no parameter" and alone:
        group["params"] = []
    elif what == "an option":
        group = {"params": [], "momentum": 0.5 if alone else 0.9}
    try:
        Muon([{"params": params[:1]}, group], process_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no parameter", "gave nothing more where rank 0 gave parameter 0 of size (4, 6)"),
        ("an option", "gave momentum=0.5 where rank 0 gave momentum=0.9"),
        ("nothing", ""),
    ],
)
def test_groups_that_are_empty_on_one_rank(ranks: World, what: str, said: str) -> None:
    for returned, text in ranks.outcomes(2, of_empty_groups, what, timeout=10):
        assert returned and said in text and bool(text) == bool(said), text


class Turns:
    """A run of the demo that takes no time."""

    stopped, steps = False, 8

    def __init__(self, cost: float) -> None:
        self.losses: list[float] = []
        self.cost = lambda: cost

    def step(self, text: Any) -> None:
        self.losses.append(0.0)


def taken(seconds: list[float]) -> list[int]:
    runs: list[Any] = [Turns(1e-3), Turns(1e-3 if dist.get_rank() else 1.0)]
    training.train(runs, [torch.empty(0)] * 8, training.Clock(seconds[dist.get_rank()]), lambda run: None)
    return [len(run.losses) for run in runs]


@pytest.mark.parametrize(("first", "steps"), [(1e6, [8, 8]), (12.0, [8, 3]), (0.0, [1, 1])])
def test_ranks_of_a_demo_stop_together(ranks: World, first: float, steps: list[int]) -> None:
    """Whatever the other one's clock says."""
    assert ranks.run(2, taken, [first, 1e6]) == [steps, steps]
