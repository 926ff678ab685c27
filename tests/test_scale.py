"""Estimates of a step on many ranks: by hand on two nodes of two GPUs, and what must hold on any number."""

from __future__ import annotations

import itertools
import math
from operator import mul
from pathlib import Path

import pytest
import torch
import write_scaling
from torch import nn

from muon_kernels.cli import network, overlap, scale
from muon_kernels.cli.estimate import GPUS, Gpu, iteration_seconds, kernels_on, product_seconds
from muon_kernels.cli.layouts import LAYOUTS, Layouts
from muon_kernels.cli.models import MODELS, Model
from muon_kernels.cli.network import FACTS, NOTHING, Group, Network, Protocol, Seconds, loads
from muon_kernels.cli.overlap import Stage, Step, Timeline, in_turn, overlapped
from muon_kernels.cli.splitting import Splitting
from muon_kernels.coefficients import DEFAULT, resolve
from muon_kernels.distributed import alternatives, traffic
from muon_kernels.distributed.gathers import Run
from muon_kernels.distributed.traffic import Mesh, elements, rounds
from muon_kernels.distributed.zero.flat import Flat, length, meet
from muon_kernels.triton_kernels.configs import Shape

# Two nodes of two GPUs, with rates and latencies that are easy to multiply by hand.
SMALL = Network(
    near=100.0,
    node=2,
    far=10.0,
    all_to_all_near=0.5,
    all_to_all_far=0.5,
    begin=1.0,
    hop_near=2.0,
    hop_far=4.0,
    message=0.25,
)
ONE_PROTOCOL = {"one": Protocol((1.0, 2.0, 4.0), (1.0, 0.5, 1.0), 0.5, (math.inf, math.inf, math.inf))}
# 85 % of the rate of its memory are 100 bytes/s.
SLOW = Gpu(1.0, 100 / 0.85, 90, 132, "slow", 100.0, 1.0)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of one protocol, and an iteration of 3 s a matrix."""
    monkeypatch.setattr(network, "PROTOCOLS", ONE_PROTOCOL)
    monkeypatch.setattr(overlap, "_iteration", lambda plan, count, gpu, schedule: 3.0 * count)


def test_groups_are_where_ranks_are() -> None:
    """Ranks fill a node before the next."""
    assert SMALL.group(4) == Group(4, 2) and SMALL.group(4).nodes == 2
    assert SMALL.group(2) == Group(2, 2) and SMALL.group(2).nodes == 1
    assert SMALL.group(2, stride=2) == Group(2, 1) and SMALL.group(2, stride=2).nodes == 2
    full = Network(450e9)
    assert (
        full.group(64).nodes == 8 and full.group(4, stride=2) == Group(4, 4) and full.group(32, stride=64).nodes == 32
    )


def test_one_matrix_on_two_nodes_of_two(by_hand: None) -> None:
    """8x8 under FSDP2, owned by rank 0: 2 rows are 16 elements of 2 bytes and a norm, 40 bytes.

    Rank 0 gets 40 bytes from its neighbour, 0.8 s at 50 bytes/s, and at the same time 40 of each rank of the other
    node, 16 s at 5 bytes/s, in two messages, 1 + 4 + 0.25 s. The way back is the same.
    """
    (each,) = rounds([(8, 8, 1)], Mesh(rows=4))
    assert isinstance(each, traffic.SlicedRound)
    assert (each.records, each.taken, each.elements) == ([40] * 4, [1, 0, 0, 0], [16] * 4)
    there = loads(each.records, each.taken, 2)
    assert there.sent_near.tolist() == [0, 40, 0, 0] and there.sent_far.tolist() == [0, 0, 40, 40]
    assert there.got_near.tolist() == [40, 0, 0, 0] and there.got_far.tolist() == [80, 0, 0, 0]
    assert there.sends.tolist() == [0, 0, 1, 1] and there.gets.tolist() == [2, 0, 0, 0]
    assert there.seconds(SMALL) == Seconds(16.0, 5.25)
    step = Step(SLOW, SMALL, resolve(DEFAULT))
    stage = step.sliced(each, SMALL.group(4), SMALL.group(1, stride=4))
    # 14 bytes an element before, 10 after, of a rank's 16; the owner copies 64 elements there and back, 8 bytes each.
    assert stage.update.tolist() == pytest.approx([2.24] * 4) and stage.apply.tolist() == pytest.approx([1.6] * 4)
    assert stage.iterate.tolist() == pytest.approx([3 + 5.12, 0, 0, 0])
    assert stage.out == stage.back == Seconds(16.0, 5.25) and stage.gather == NOTHING
    timeline = overlapped([stage])
    assert timeline.seconds == pytest.approx(2.24 + 21.25 + 8.12 + 21.25 + 1.6)
    assert timeline.iterating == pytest.approx(8.12) and timeline.computing == pytest.approx(8.12 + 2.24 + 1.6)
    assert timeline.exchange == Seconds(32.0, 10.5)


def test_replicas_on_two_nodes(by_hand: None) -> None:
    """The same under hybrid sharding in a node: half of the matrix, 72 bytes, stays in it; replicas gather 72 each."""
    (each,) = rounds([(8, 8, 1)], Mesh(rows=2, replicas=2))
    assert isinstance(each, traffic.SlicedRound)
    assert (each.records, each.taken, each.by_replica) == ([72, 72], [1, 0, 0, 0], [1, 0])
    stage = Step(SLOW, SMALL, resolve(DEFAULT)).sliced(each, SMALL.group(2), SMALL.group(2, stride=2))
    assert stage.out == Seconds(72 / 50, 3.0)
    # A ring of two ranks in two nodes: half of 144 bytes over one card at 10 bytes/s, of which it reaches half.
    assert stage.gather == Seconds(72 / 5, 5.0)
    passes = (14 + 10) * 32 / 100  # every replica has all momenta and parameters of its half
    assert (stage.update + stage.apply).tolist() == pytest.approx([passes] * 4)
    assert overlapped([stage]).seconds == pytest.approx(passes + 2 * 4.44 + 8.12 + 19.4)


def test_copies_on_two_nodes(by_hand: None) -> None:
    """Four copies: rank 0 does it and sends 136 bytes around by two cards a node, at 10 a second."""
    (each,) = rounds([(8, 8, 1)], Mesh(replicas=4))
    assert isinstance(each, traffic.CopiedRound) and each.shares == [136, 0, 0, 0]
    step = Step(SLOW, SMALL, resolve(DEFAULT))
    stage = step.copied(each, SMALL.group(4))
    assert stage.back == Seconds(13.6, 1 + 2 * 2 + 4)
    # Its momentum is updated by its owner only, whose result is copied once; all update 64 elements.
    assert stage.iterate.tolist() == pytest.approx([3 + 64 * (14 + 4) / 100, 0, 0, 0])
    assert overlapped([stage]).seconds == pytest.approx(14.52 + 22.6 + 6.4)
    # Shares of 10 and 20 bytes, the second a hop later; then equal ones, three quarters of which a rank gets.
    parts = [[Run(0, 0, 0, 1), Run(2, 0, 0, 2)], [Run(rank, 0, 0, 1) for rank in range(4)]]
    assert step.gathered(parts[:1], [10], SMALL.group(4)) == Seconds(
        3.0, pytest.approx(1 + (4 - 4 / 3) * 2 + 4 / 3 * 4)
    )
    assert step.gathered(parts, [10], SMALL.group(4)).bytes == 6.0
    assert SMALL.broadcast(80, 1, SMALL.group(1)) == NOTHING


def test_rings_and_trees(by_hand: None) -> None:
    """Four ranks on two nodes, two cards each: 20 bytes/s, of which the protocol reaches half."""
    group = SMALL.group(4)
    assert SMALL.gather(80, group) == Seconds(6.0, 1 + 2 * 2 + 4)
    assert SMALL.gather(80, SMALL.group(2)) == Seconds(40 / 50, 3.0)
    assert SMALL.gather(80, SMALL.group(1)) == SMALL.reduce(80, SMALL.group(1)) == NOTHING
    assert SMALL.reduce(80, group) == Seconds(16.0, 1 + 2 * (0.5 + 1))  # a tree; the ring takes 12 + 17
    assert SMALL.reduce(800, group) == Seconds(120.0, 1 + 4 * 2 + 2 * 4)  # a ring; the tree takes 160 + 4


def test_the_faster_protocol_is_taken() -> None:
    """LL for a few bytes, LL128 for many, as NCCL does; LL is bounded by what Hopper reaches."""
    full = Network(450e9)
    group = full.group(16)
    few, many = full.gather(1600, group), full.gather(16e9, group)
    assert few.latency == pytest.approx(6.6e-6 + 14 * 0.6e-6 + 2.7e-6)
    assert many == Seconds(pytest.approx(15e9 / (400e9 * 0.92)), pytest.approx(14e-6 + 14 * 1.9e-6 + 4e-6))
    assert few.bytes == pytest.approx(1500 / 45e9)
    assert full.gather(8e9, full.group(8)).bytes == pytest.approx(7e9 / (450e9 * 0.92))
    # One rank a node has one card.
    assert full.gather(8e9, full.group(8, stride=8)).bytes == pytest.approx(7e9 / (50e9 * 0.92))


def stage(iterate: list[float], out: float, back: float, gather: float = 0.0) -> Stage:
    nothing = torch.zeros(len(iterate), dtype=torch.float64)
    times = torch.tensor(iterate, dtype=torch.float64)
    return Stage(nothing, Seconds(out, 0.0), times, Seconds(back, 0.0), Seconds(gather, 0.0), nothing)


def test_the_longer_of_both_counts() -> None:
    """Fill, three rounds and drain: 2 + 3 x 5 + 2 where multiplying takes longer; all exchanges where these do."""
    assert overlapped([stage([5], 2, 2)] * 3).seconds == 19
    assert overlapped([stage([2], 5, 5)] * 3).seconds == 30
    # The third and fourth rounds' slices go before the first result: 4 x 5, and 4 x 5 of results.
    assert overlapped([stage([0], 5, 5)] * 4).seconds == 40
    assert overlapped([stage([100], 5, 5)] * 4).seconds == 5 + 400 + 5
    # What replicas gather is waited for.
    assert overlapped([stage([5], 2, 2, 3)]).seconds == 2 + 5 + 2 + 3


def test_a_busy_round_of_one_rank_holds_up_no_other() -> None:
    """Ranks that have something to multiply in different rounds do so at the same time: 10, not 20."""
    assert overlapped([stage([10, 0], 1, 1), stage([0, 10], 1, 1)]).seconds == 1 + 1 + 10 + 1
    timeline = overlapped([stage([10, 0], 1, 1), stage([0, 7], 1, 1)])
    assert timeline.computing == 10 and timeline.exchange == Seconds(4.0, 0.0)


def test_gathers_one_after_the_other() -> None:
    """Four matrices, gathered in 2 and multiplied in 5, then the other way round."""
    assert in_turn([(4, Seconds(1.5, 0.5), 5.0)]) == Timeline(22.0, 20.0, 20.0, Seconds(6.0, 2.0))
    assert in_turn([(4, Seconds(5.0, 0.0), 2.0)]).seconds == 22.0


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 100])
def test_slices_are_those_of_zeromuon(ranks: int) -> None:
    """What each rank sends is what `ZeroMuon.bytes_sent` counts beside gradients and parameters."""
    shapes = [(8, 12, 5), (20, 4, 2), (7, 7, 3)]
    params = [nn.Parameter(torch.empty(m, n, device="meta")) for m, n, count in shapes for _ in range(count)]
    flat = Flat([tuple(p.shape) for p in params], ranks, [None] * len(params))
    costs = alternatives.sliced(shapes, ranks)
    whole = [
        2 * sum(length(meet(flat.needed[r], flat.slices[rank])) for r in range(ranks) if r != rank)
        for rank in range(ranks)
    ]
    assert [cost.sent for cost in costs] == whole and any(whole)
    assert [cost.buffers for cost in costs] == [2 * length(needed) + 4 * ranks * flat.share for needed in flat.needed]
    touched = [sum(bool(length(meet(m.at, own))) for m in flat.matrices) for own in flat.slices]
    assert sum(cost.flops > 0 for cost in costs) == sum(n > 0 for n in touched)
    square = alternatives.sliced([(8, 8, 6)], 4)  # a rank has one and a half: of its two matrices one is shared
    assert [cost.flops / traffic.flops([(8, 8, 1)])[0] for cost in square] == [2, 2, 2, 2]
    assert [cost.sent for cost in square] == [64, 64, 64, 64]


def test_padding() -> None:
    """Three of 6x4 on four ranks are four; 2 rows of 4 in bf16 go to three others, and back."""
    assert alternatives.padding(6, 4, 3, 4) == (1, 16)
    cost = alternatives.padded([(6, 4, 3)], 4)
    assert (cost.sent, cost.collectives, cost.buffers) == (2 * 16 * 3, 2, 2 * 64)
    assert cost.flops == traffic.flops([(6, 4, 1)])[0]
    assert alternatives.padded([(8, 4, 8)], 4).sent == 2 * 2 * 16 * 3


def test_batches_are_estimated_as_the_ledger_of_one_gpu_does() -> None:
    gpu, schedule = GPUS["h100"], resolve(DEFAULT)
    plan = traffic.plan_of(4096, 1024, schedule=schedule, backend="triton")
    one, eight = (iteration_seconds(plan, count, gpu, schedule) for count in (1, 8))
    gaps = plan.launches * 1.2e-6
    assert one < eight and eight - gaps < 0.9 * 8 * (one - gaps)  # a few tiles leave multiprocessors without any
    assert 8 * plan.flops / gpu.flops < eight
    assert Step(gpu, Network(gpu.nvlink), schedule).iterations(plan, [8, 0, 1]).tolist() == [eight, 0, one]


@pytest.mark.parametrize("name", ["gpt2", "llama-70b", "moonlight-16b"])
def test_more_ranks_never_compute_more(name: str) -> None:
    """Nor send more under FSDP2, but for the costliest matrix; and nothing is beneath the mean."""
    found = scale.rows(MODELS[name], (8, 64, 256, 1024), GPUS["h100"], resolve(DEFAULT))
    once = sum(traffic.flops(MODELS[name].shapes, backend="triton"))
    assert {row.name for row in found} <= LAYOUTS.keys()
    for layout in ("ZeroMuon, ZeRO-1", "padded, FSDP2", "owners, FSDP2", "owners, HSDP of 64", "owners, EP of 64"):
        rows = [row for row in found if row.name == layout]
        for before, after in itertools.pairwise(rows):
            assert after.cost.flops <= before.cost.flops and after.timeline.iterating <= before.timeline.iterating
        for row in rows:
            assert row.cost.flops * row.ranks >= once
    for row in found:
        timeline = row.timeline
        assert timeline.iterating <= timeline.computing <= timeline.seconds * (1 + 1e-12)
        assert timeline.exchange.both <= timeline.seconds * (1 + 1e-12)
        if not row.name.startswith("MuonBP"):
            assert timeline.seconds <= (timeline.exchange.both + timeline.computing) * 3


def test_experts_that_are_whole_do_not_travel() -> None:
    """On 64 ranks only the others are exchanged; on 128 two ranks have half of an expert's rows each.

    Of the others 64 of 128 ranks have a row each.
    """
    model = Model([(64, 64, 128)], experts=[(32, 64, 64)])
    gpu, schedule = GPUS["h100"], resolve(DEFAULT)

    def row(ranks: int, name: str) -> scale.Row:
        layouts = Layouts(model, ranks, gpu, schedule, Network(gpu.nvlink))
        return next(row for row in layouts.rows() if row.name == name)

    dense = traffic.owners(model.dense, Mesh(rows=64), schedule=schedule, backend="triton")
    assert row(64, "owners, EP of 64").cost.sent == max(cost.sent for cost in dense)
    half = traffic.owners([(32, 64, 1)], Mesh(rows=2), schedule=schedule, backend="triton")
    more = traffic.owners(model.dense, Mesh(rows=128), schedule=schedule, backend="triton")
    assert half[0].sent == half[1].sent == 16 * 64 * 2 + 8
    assert row(128, "owners, EP of 64").cost.sent == max(cost.sent for cost in more) + half[0].sent
    assert row(128, "owners, EP of 64").cost.state == 4 * 128 * 64 + 4 * 16 * 64


def test_shared_matrices_are_dealt_to_neighbours() -> None:
    """Each kind's as often as they are, to as many ranks as share one, which have equal parts of it."""
    splitting = Splitting(MODELS["llama-70b"], 1024, GPUS["h100"], resolve(DEFAULT))
    assert splitting.best is not None
    kinds, taken = splitting.best
    assert sorted((kind.rows, kind.cols, kind.matrices) for kind in kinds) == sorted(MODELS["llama-70b"].shapes)
    assert {(kind.rows, kind.cols) for kind in kinds if kind.between > 1} == {(28672, 8192), (8192, 28672)}
    for kind, own in zip(kinds, taken, strict=True):
        assert sum(own) == kind.matrices * kind.between
        teams = [own[i : i + kind.between] for i in range(0, 1024, kind.between)]
        assert all(len({*team}) == 1 for team in teams)
    each = [splitting.seconds(kind, 1) for kind in kinds]
    loads = [sum(map(mul, each, own)) for own in zip(*taken, strict=True)]
    assert max(loads) == pytest.approx(splitting.dealt(kinds)[1], rel=1e-6)
    assert max(loads) < splitting.dealt(splitting.kinds(1))[1]


def test_a_shared_matrix_takes_its_sums() -> None:
    """An iteration on 3584 columns; at each of two visits their product again, and a sum of half of 8192² in fp32."""
    splitting = Splitting(MODELS["llama-70b"], 64, GPUS["h100"], resolve(DEFAULT))
    assert splitting.best is None  # ranks have about the same
    kind, gpu = splitting.kinds(8)[0], GPUS["h100"]
    assert kind.plan.shape == (8192, 3584) and (kind.between, kind.visits) == (8, 2)
    again = product_seconds(Shape(3, 8192, 8192, 3584, True), kernels_on(gpu)[0], gpu)
    summed = splitting.network.reduce(3 * 4 * 8192 * 8193 / 2, splitting.network.group(8)).both
    iteration = splitting.step.iteration(kind.plan, 3)
    assert splitting.seconds(kind, 3) == pytest.approx(iteration + 2 * (again + summed))
    assert splitting.seconds(kind, 0) == 0
    for sharded in (True, False):  # all of them on the first team, which also copies and, of copies, updates momenta
        stages = list(splitting.stages([kind._replace(matrices=1)], [[1] * 8 + [0] * 56], sharded))
        passes = (overlap.COPY_BYTES if sharded else overlap.UPDATE_BYTES + overlap.COPY_BYTES // 2) * 8192 * 3584
        expected = [splitting.seconds(kind, 1) + splitting.step.passing(passes)] * 8 + [0] * 56
        assert len(stages) == 1 and stages[0].iterate.tolist() == pytest.approx(expected)


def test_what_is_shared_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of GPT-2 and of Llama 70B on 1,024 ranks; the others take long."""
    monkeypatch.setattr(write_scaling, "ESTIMATED", ("llama-70b",))
    monkeypatch.setattr(write_scaling, "SHARED", (64, 1024))
    printed, page = list(write_scaling.shared()), section("shared")
    assert [line for line in printed if line not in page] == []
    assert sum("28672x8192 and 8192x28672, 2 ranks a matrix" in line for line in printed) == 2
    assert all(line.endswith("| none |  |") for line in printed if line.startswith("| gpt2"))


def test_a_training_step() -> None:
    """6 FLOPs a token and active parameter: 6 x 2.24e9 x 4096 at 0.4 x 989e12."""
    assert scale.training_seconds(MODELS["moonlight-16b"], GPUS["h100"]) == pytest.approx(0.13915, rel=1e-4)
    assert scale.training_seconds(Model([(8, 8, 1)]), GPUS["h100"]) == 6 * 64 * 4096 / (0.4 * 989e12)


def test_models_have_the_parameters_of_their_papers() -> None:
    """With embeddings and head: 671 G (arXiv 2412.19437); 69 G (Llama 2)."""
    assert round((elements(MODELS["deepseek-v3"].shapes) + 2 * 129280 * 7168) / 1e9) == 671
    assert round((elements(MODELS["llama-70b"].shapes) + 2 * 32000 * 8192) / 1e9) == 69
    for model in MODELS.values():
        assert all(count % 64 == 0 for *_, count in model.experts) and (model.source or not model.experts)


def test_remarks_say_from_which_ranks_on() -> None:
    model, gpu = MODELS["gpt2"], GPUS["h100"]
    found = scale.rows(model, (8, 64, 256), gpu, resolve(DEFAULT))
    said = "\n".join(scale.remarks(model, found, gpu))
    assert "From 64 ranks on there are more ranks than the 48 matrices" in said and "1.58 times the mean" in said
    assert said.count("Estimated fastest whole Muon that fits") == 3
    assert "fits" not in "\n".join(scale.remarks(model, found, gpu._replace(memory=1.0))).replace("Muon fits.", "")


def test_from_where_on_something_holds() -> None:
    """To the last; what holds on few ranks only is not said."""
    rows = list(Layouts(MODELS["experts"], 8, GPUS["h100"], resolve(DEFAULT), Network(450e9)).rows())[:3]
    first, second, third = rows
    assert scale._from(rows, [False, True, True]) is second and scale._from(rows, [True, False, True]) is third
    assert scale._from(rows, [True, True, True]) is first and scale._from(rows, [True, True, False]) is None


PAGE = write_scaling.PAGE.read_text()


def section(name: str) -> list[str]:
    begin, end = write_scaling.marks(name)
    return PAGE.split(begin)[1].split(end)[0].strip().splitlines()


@pytest.mark.parametrize("name", ["slowest", "layouts", "moonlight-16b", "llama-70b"])
def test_the_page_is_what_is_printed(name: str) -> None:
    assert section(name) == list(write_scaling.SECTIONS[name]())


def test_the_largest_model_of_the_page_is_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 1,024 ranks, for more would take a quarter of a minute."""
    monkeypatch.setattr(write_scaling, "RANKS", (64, 256, 1024))
    printed = [line for line in write_scaling.estimated("deepseek-v3") if "|" in line or not line.startswith("- ")]
    assert len(printed) > 30
    page = section("deepseek-v3")
    assert [line for line in printed if line not in page] == []
    ranks = [line.split()[1] for line in page if line.startswith("| ")]
    assert [each for each in dict.fromkeys(ranks) if each.isdigit()] == ["64", "256", "1024", "4096", "16384"]


def test_the_page_says_what_is_estimated() -> None:
    assert PAGE.startswith("# On many ranks: estimated, not measured\n") and Path(write_scaling.__file__).exists()
    for name in write_scaling.ESTIMATED:
        lines = section(name)
        assert lines[0].startswith("### Estimates of ") and any("estimates, not measurements" in line for line in lines)
        for fact in (*FACTS.values(), scale.TOKENS, scale.MFU):
            assert any(fact.source in line for line in lines)
