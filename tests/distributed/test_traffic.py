"""What a plan says that a rank sends, keeps and holds: against what its process does, and the model's."""

from __future__ import annotations

import re
import time
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from muon_kernels import Muon
from muon_kernels.cli.models import MODELS
from muon_kernels.cli.network import loads
from muon_kernels.coefficients import resolve
from muon_kernels.distributed import alternatives, traffic
from muon_kernels.distributed.balance import assign_owners, least_load
from muon_kernels.distributed.exchange import Exchange
from muon_kernels.distributed.gathers import GATHERS, Run, cut, part_bytes, sent_by
from muon_kernels.distributed.slices import IN_FLIGHT, end_of, record_bytes, share_bytes
from muon_kernels.distributed.strategies.owner import OwnerRound
from muon_kernels.distributed.strategies.replicas import ReplicaRound
from muon_kernels.distributed.traffic import BESIDE, Mesh, elements, owners
from muon_kernels.step.plan import Plan

# Tall, wide and square; three ranks cut some unevenly, four leave the last one without a part of (5, 300) or (300, 5).
SHAPES = [(96, 160, 5), (160, 96, 3), (128, 128, 4), (300, 5, 2), (5, 300, 1), (50, 200, 1)]
LAYOUTS = {
    "DDP": lambda size: Mesh(replicas=size),
    "Shard(0)": lambda size: Mesh(rows=size),
    "Shard(1)": lambda size: Mesh(cols=size),
    "HSDP": lambda size: Mesh(rows=size // 2, replicas=2),
    "2-D": lambda size: Mesh(rows=2, cols=size // 2),
}


def parameters(layout: str, shapes: list[tuple[int, int, int]]) -> list[nn.Parameter]:
    """With gradients; the same on all ranks."""
    torch.manual_seed(0)
    size = dist.get_world_size()
    if layout in ("HSDP", "2-D"):
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b"))
        placements: Any = (Replicate(), Shard(0)) if layout == "HSDP" else (Shard(0), Shard(1))
    else:
        mesh = init_device_mesh("cpu", (size,))
        placements = (Shard(int(layout[-2])),) if layout != "DDP" else ()

    def placed(t: Tensor) -> Tensor:
        return t if layout == "DDP" else distribute_tensor(t, mesh, placements)

    made = []
    for rows, cols, count in shapes:
        for _ in range(count):
            made.append(nn.Parameter(placed(torch.randn(rows, cols))))
            made[-1].grad = placed(torch.randn(rows, cols))
    return made


def written() -> int:
    """Bytes that this process has handed to the system: to sockets, for it writes nothing else."""
    with open("/proc/self/io") as file:
        return int(re.findall(r"wchar: (\d+)", file.read())[0])


def shares_of(each: OwnerRound | ReplicaRound) -> list[int]:
    """Bytes of every replica's results in a round."""
    return [p.bytes for p in each.shares] if isinstance(each, OwnerRound) else [end_of(own) for own in each.places]


def relayed(after: int, ranks: int) -> int:
    """To how many a rank sends what gloo broadcasts from so many ranks before it: a binomial tree."""
    return sum(after < 2**i and after + 2**i < ranks for i in range(ranks))


def tree_not_ring(exchange: Exchange) -> int:
    """Bytes that gloo's broadcasts have this rank send more than a ring does, or less; of all ranks together none."""
    rank, ranks, found = exchange.team.replica, exchange.team.replica_count, 0
    for shares in map(shares_of, exchange.rounds) if ranks > 1 else ():
        ring = sum(shares) - shares[(rank + 1) % ranks]
        found += sum(share * relayed((rank - owner) % ranks, ranks) for owner, share in enumerate(shares)) - ring
    return found


def step(layout: str, shapes: list[tuple[int, int, int]], cap: int | None, measured: int = 2) -> dict[str, Any]:
    """What a rank says before steps, and what it did in each of the last."""
    params = parameters(layout, shapes)
    muon = Muon(
        params,
        process_group=dist.group.WORLD if layout == "DDP" else None,
        backend="eager",
        max_workspace_bytes=cap,
    )
    plan = muon.plan()
    sockets = []
    for i in range(1 + measured):
        if i:
            dist.barrier()
            before = written()
        muon.step()
        if i:
            sockets.append(written() - before)
    (exchange,) = [task for task in muon._tasks.kept if isinstance(task, Exchange)]
    momenta = [muon.state[p].get("momentum_buffer") for p in params]
    held = [m if layout == "DDP" else m.to_local() for m in momenta if m is not None]
    gathers = exchange._gathers
    assert gathers is not None
    buffers = [t for b in exchange._buffers for t in (b.slices, b.owned, b.norms)]
    return {
        "tree": tree_not_ring(exchange),
        "gathered": [t.untyped_storage().nbytes() for t in gathers._memory],
        "parts": sum(len(r.parts) for r in exchange.rounds),
        "shared": plan.shared[0],
        "plan": plan,
        "sockets": sockets,
        "state": sum(m.numel() * m.itemsize for m in held),
        "buffers": sum(t.untyped_storage().nbytes() for t in [*buffers, *gathers._memory]),
        "rounds": len(exchange.rounds),
        "cut": sum(isinstance(r, OwnerRound) for r in exchange.rounds),
        "workspace": sum(t.numel() * t.itemsize for t in muon._workspace._blocks.values()),
    }


def in_rounds(mesh: Mesh) -> list[float]:
    """Bytes that every rank sends, by the rounds that the times of `ledger --ranks` are estimated of; nodes of two."""
    sent = [0.0] * mesh.ranks
    for each in traffic.rounds(SHAPES, mesh, backend="eager"):
        if isinstance(each, traffic.CopiedRound):
            sent = [a + sum(each.shares) - b for a, b in zip(sent, each.shares[1:] + each.shares[:1], strict=True)]
            continue
        for replica in range(mesh.replicas):
            own = slice(replica * mesh.shards, (replica + 1) * mesh.shards)
            there = loads(each.records, each.taken[own], 2)
            both = there.sent_near + there.sent_far + there.got_near + there.got_far
            others = sum(each.by_replica) - each.by_replica[(replica + 1) % mesh.replicas]
            gathered = [(mesh.replicas > 1) * others * record for record in each.records]
            sent[own] = [a + b + c for a, b, c in zip(sent[own], both.tolist(), gathered, strict=True)]
    return sent


@pytest.mark.parametrize("cap", [None, 700_000])
@pytest.mark.parametrize(
    ("layout", "size"),
    [(layout, size) for layout in ("DDP", "Shard(0)", "Shard(1)") for size in (2, 3, 4)] + [("HSDP", 4), ("2-D", 4)],
)
def test_counted_as_sent(
    ranks: World, layout: str, size: int, cap: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cap that takes one matrix at a time makes more rounds of the same bytes."""
    found = ranks.run(size, step, layout, SHAPES, cap)
    if cap is not None:
        monkeypatch.setattr("muon_kernels.backends.eager.default_workspace_bytes", cap)
    model = owners(SHAPES, LAYOUTS[layout](size), backend="eager")
    assert len(model) == size
    for rank, cost in zip(found, model, strict=True):
        shared = rank["shared"]
        assert shared.ranks == size and shared.elements == elements(SHAPES)
        assert shared.matrices == sum(count for *_, count in SHAPES)
        assert shared.bytes_sent > 0
        for sockets in rank["sockets"]:
            # gloo writes 288 bytes with each message, and the ranks agree with an integer a parameter.
            assert 0 <= sockets - shared.bytes_sent - rank["tree"] <= 1000 * size * (shared.collectives + 2)
        assert shared.state_bytes == rank["state"]
        assert shared.buffer_bytes == rank["buffers"]
        assert shared.owned == sum(b.count for b in rank["plan"].buckets)
        assert rank["plan"].workspace_bytes == rank["workspace"]
        assert cost.sent == shared.bytes_sent
        assert cost.state == shared.state_bytes
        assert cost.buffers == shared.buffer_bytes
        assert cost.collectives == shared.collectives
        assert cost.workspace == rank["plan"].workspace_bytes
        assert cost.flops == rank["plan"].flops
    assert sum(rank["tree"] for rank in found) == 0
    assert in_rounds(LAYOUTS[layout](size)) == [rank["shared"].bytes_sent for rank in found]
    kinds = 1 if layout == "DDP" else len(SHAPES)
    assert found[0]["rounds"] == kinds if cap is None else found[0]["rounds"] >= kinds + (size == 2)
    assert sum(rank["shared"].owned for rank in found) == found[0]["shared"].matrices
    if layout.startswith("Shard"):  # 2 bytes there and 2 back of what a rank holds
        assert sum(rank["shared"].bytes_sent for rank in found) <= 4 * elements(SHAPES) * (size - 1) / size * 1.01


def test_copies_of_equal_cost_are_dealt_in_the_order_of_parameters(ranks: World) -> None:
    """The model's too, though one rank gets all of a shape then; in another order each would get one of either."""
    shapes = [(64, 64, 1), (32, 368, 1)] * 2
    found = ranks.run(2, step, "DDP", shapes, None)
    model = owners(shapes, LAYOUTS["DDP"](2), backend="eager")
    assert model[0].flops == model[1].flops and model[0].state != model[1].state
    for rank, cost in zip(found, model, strict=True):
        assert (cost.sent, cost.state) == (rank["shared"].bytes_sent, rank["shared"].state_bytes)
        assert (cost.workspace, cost.flops) == (rank["plan"].workspace_bytes, rank["plan"].flops)


def test_a_rank_without_a_part_says_so(ranks: World) -> None:
    """One matrix on two ranks: one multiplies, both send."""
    found = ranks.run(2, step, "Shard(0)", [(64, 96, 1)], None)
    assert sorted(rank["shared"].owned for rank in found) == [0, 1]
    for rank in found:
        # 32 rows of 96 elements in bf16, and their norm in double.
        assert rank["shared"].bytes_sent == 32 * 96 * 2 + 8
        assert str(rank["shared"]) in str(rank["plan"])
        assert bool(rank["plan"].buckets) == bool(rank["shared"].owned)
    assert str(found[0]["shared"]) == (
        f"2 ranks step 1 matrices together. This one multiplies {found[0]['shared'].owned}, sends 6.15 kB in 2 "
        f"collectives,\nkeeps 12.3 kB of momenta (AdamW under ZeRO-1: 24.6 kB) and holds "
        f"{found[0]['shared'].buffer_bytes / 1000:.3g} kB of buffers."
    )


def test_alone_nothing_is_sent() -> None:
    params = [nn.Parameter(torch.ones(8, 9))]
    plan = Muon(params).plan()
    assert plan.shared == () and plan.bytes_sent == plan.buffer_bytes == 0 and "ranks" not in str(plan)
    assert str(Plan(())) == "nothing to do: Muon was given no matrix"


WHOLE = ["gpt2", "llama-7b", "moonlight-16b", "experts"]


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("model", WHOLE)
def test_the_figures_to_reach(model: str, ranks: int) -> None:
    """4 bytes an element of a rank's part, 2 of copies; a rank keeps its share of momenta, give or take a matrix."""
    shapes = MODELS[model].shapes
    count, largest = elements(shapes), max(m * n for m, n, _ in shapes)
    fsdp, ddp = owners(shapes, Mesh(rows=ranks)), owners(shapes, Mesh(replicas=ranks))
    assert sum(cost.sent for cost in fsdp) <= 4 * count
    for cost in fsdp:
        assert cost.sent <= 4 * (count / ranks + largest)
        assert abs(cost.state - 4 * count / ranks) <= 4 * sum(n * c for m, n, c in shapes)  # a row of each matrix
    assert sum(cost.state for cost in fsdp) == sum(cost.state for cost in ddp) == 4 * count
    paper = alternatives.gathered(shapes, ranks)
    assert alternatives.adamw(shapes, ranks).state == 2 * paper.state == 8 * count / ranks
    # The paper's ZeRO-1: 4 + 2 + 4 bytes where AdamW sends 4 + 4.
    beside = BESIDE["ZeRO-1"] * count * (ranks - 1) / ranks
    assert 1 < (paper.sent + beside) / beside <= 1.25
    # Of copies a rank sends all but the next one's, however few matrices each has.
    assert max(cost.sent for cost in ddp) <= 2 * count + 16 * sum(n for *_, n in shapes)
    assert sum(cost.sent for cost in ddp) <= (2 * count + 16 * sum(n for *_, n in shapes)) * (ranks - 1)


def test_where_no_deal_is_better_the_even_one_is_kept() -> None:
    """Costly matrices for half of the ranks, and cheap ones: those are spread although that makes no rank faster."""
    dealt = assign_owners([9] * 4 + [1] * 8, 8)
    costly, cheap = set(dealt[:4]), dealt[4:]
    assert len(costly) == 4
    assert sorted(cheap) == sorted(2 * [rank for rank in range(8) if rank not in costly])


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
@pytest.mark.parametrize("model", WHOLE)
def test_the_slowest_owner(model: str, ranks: int) -> None:
    """At most 1.1 times the mean, or what no deal of whole matrices is below."""
    for mesh in (Mesh(rows=ranks), Mesh(replicas=ranks)):
        flops = [cost.flops for cost in owners(MODELS[model].shapes, mesh)]
        each = traffic.flops(MODELS[model].shapes)
        assert sum(flops) == sum(each)
        assert max(flops) <= max(1.1 * sum(each) / ranks, least_load(each, ranks))


def fits(sizes: tuple[int, ...], counts: tuple[int, ...], bins: int, cap: int) -> bool:
    """Whether so many pieces of these falling sizes go into so many bins: all ways to fill one, tried."""
    ways = [
        way
        for way in product(*(range(min(n, cap // s) + 1) for s, n in zip(sizes, counts, strict=True)))
        if sum(s * k for s, k in zip(sizes, way, strict=True)) <= cap
    ]

    @lru_cache(None)
    def needed(left: tuple[int, ...]) -> int:
        if not any(left):
            return 0
        first = next(i for i, n in enumerate(left) if n)
        possible = [tuple(n - k for n, k in zip(left, way, strict=True)) for way in ways if way[first]]
        return 1 + min(needed(rest) for rest in possible if min(rest) >= 0)

    return sizes[0] <= cap and needed(counts) <= bins


@pytest.mark.parametrize("ranks", [7, 13, 15, 16, 20, 25, 28, 32, 37, 48])
def test_near_the_best_deal_there_is(ranks: int) -> None:
    """GPT-2's 48 matrices on rank counts that do not suit them."""
    each = traffic.flops(MODELS["gpt2"].shapes)
    sizes = tuple(sorted(set(each), reverse=True))
    counts = tuple(each.count(size) for size in sizes)
    totals = [0] * ranks
    for cost, owner in zip(each, assign_owners(each, ranks), strict=True):
        totals[owner] += cost
    assert fits(sizes, counts, ranks, max(totals))
    mean = sum(each) / ranks
    if max(totals) > 1.1 * mean:
        assert not fits(sizes, counts, ranks, max(totals) - 1)
    assert least_load(each, ranks) <= max(totals)


@pytest.mark.parametrize(
    ("costs", "ranks", "expected"),
    [
        ([3, 3, 2, 2, 2], 2, 6),
        ([5, 5, 4, 4, 3, 3, 3], 3, 9),
        ([9], 4, 9),
        ([1] * 5, 4, 2),
        ([], 3, 0),
        ([4, 4, 4], 2, 8),
    ],
)
def test_a_deal(costs: list[int], ranks: int, expected: int) -> None:
    """Graham's examples: LPT alone gives 7 and 11."""
    totals = [0] * ranks
    for cost, owner in zip(costs, assign_owners(costs, ranks), strict=True):
        totals[owner] += cost
    assert max(totals) == expected
    assert least_load(costs, ranks) <= expected


def test_the_least_loaded_rank_gets_the_next_piece() -> None:
    """The first of equal ones; a piece that only some may have counts for the others, too."""
    ranks, costs = 7, [9, 9, 8, 7, 7, 7, 5, 5, 4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    among = [[2, 5] if i % 4 == 1 else None for i in range(len(costs))]
    totals, expected = [3, 0, 1, 0, 0, 2, 0], []
    for cost, some in zip(costs, among, strict=True):
        expected.append(min(some or range(ranks), key=totals.__getitem__))
        totals[expected[-1]] += cost
    assert max(totals) <= 1.1 * sum(totals) / ranks  # so that this deal is kept
    assert assign_owners(costs, ranks, among=among, loads=[3, 0, 1, 0, 0, 2, 0]) == expected


def test_a_deal_minds_what_ranks_have_and_may_have() -> None:
    assert sorted(assign_owners([3, 3, 2, 2, 2], 3, loads=[6, 0, 0])) in (
        [1, 1, 1, 2, 2],
        [1, 1, 2, 2, 2],
    )  # 6 each, by first fit
    assert assign_owners([1, 1, 1], 2, loads=[2, 0]).count(1) >= 2
    assert assign_owners([5, 1, 1], 2, among=[[1], None, None]) == [1, 0, 0]
    costs = [7, 7, 6, 6, 5, 5, 4, 4, 4]
    owners = assign_owners(costs, 3, among=[[2], *[None] * 7, [0, 1]], loads=[0, 0, 3])
    assert owners[0] == 2 and owners[-1] in (0, 1)
    assert assign_owners(costs, 3, loads=[9, 0, 0]) == assign_owners(list(costs), 3, loads=(9, 0, 0))
    assert (
        least_load([1], 2, [5, 0]) == 5
        and least_load([4, 4, 4], 2) == 8
        and least_load([6, 1], 2) == 6
        and least_load([3, 2], 2, [3]) == 4
    )


def test_many_matrices_are_dealt_soon() -> None:
    """Also where there are thousands of ranks: looking through all of them for each matrix would take minutes."""
    for model, ranks in (("moonlight-16b", 1024), ("deepseek-v3", 16384)):
        each = traffic.flops(MODELS[model].shapes)
        assert len(each) > 5000
        start = time.process_time()
        assign_owners(each, ranks)
        assert time.process_time() - start < 10


def test_moonlight_has_the_parameters_of_its_paper() -> None:
    assert round(elements(MODELS["moonlight-16b"].shapes) / 1e9, 2) == 15.29


def test_sums_and_blocks() -> None:
    """Matrices of 64x256 and 256x64 on four ranks, 64 columns each: five steps, 15 products, 5 sums of 64² in fp32."""
    keller = resolve("keller", 5)
    cost = alternatives.gram([(64, 256, 3), (256, 64, 1)], 4, schedule=keller, backend="eager")
    assert cost.collectives == 4 * 5
    assert cost.sent == 4 * 5 * 2 * (3 / 4) * 4 * 64 * 64
    assert cost.flops == 4 * 5 * (2 * 64 * 64 * 64 * 3)
    assert cost.state == 4 * 4 * 64 * 64
    whole = owners([(64, 256, 4)], Mesh(cols=4), schedule=keller, backend="eager")
    mean = alternatives.blockwise([(64, 256, 4)], Mesh(cols=4), 5, schedule=keller, backend="eager")
    for step, sometimes in zip(whole, mean, strict=True):
        assert sometimes.sent == step.sent / 5 and sometimes.collectives == step.collectives / 5
        assert sometimes.flops == (step.flops + 4 * 4 * 5 * 6 * 64**3) / 5
    whole_model = alternatives.gathered([(64, 256, 4)], 4, schedule=keller, backend="eager")
    assert whole_model.sent == 2 * 4 * 64 * 256 * 3 / 4
    assert whole_model.flops == 4 * 5 * (2 * 64 * 64 * 256 * 2 + 2 * 64**3)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("layout", "size"), [("DDP", 2), ("DDP", 3), ("DDP", 4), ("HSDP", 4)])
def test_few_matrices_are_not_sent_more_often(ranks: World, layout: str, size: int, count: int) -> None:
    """2 + 2 bytes an element of what a rank holds, however few matrices it has: nobody sends or holds padding."""
    shapes = [(96, 128, count)]
    found = ranks.run(size, step, layout, shapes, None)
    held = 96 * 128 * count // (2 if layout == "HSDP" else 1)
    for rank in found:
        assert rank["shared"].bytes_sent <= 4 * held + 100 * count
        # gloo's tree has the root of a broadcast among four send two copies.
        assert max(rank["sockets"]) <= (2 if layout == "DDP" else 2 + 2 + 2) * 2 * held + 5000 * size
        assert rank["gathered"] == [count * record_bytes(96 * 128 // (2 if layout == "HSDP" else 1))]
    # Of every result each replica but its owner gets one copy; slices of HSDP travel as under FSDP2.
    copies = 2 * held * (size - 1) if layout == "DDP" else 2 * 2 * held + 2 * 2 * held
    assert abs(sum(rank["shared"].bytes_sent for rank in found) - copies) <= 100 * count * size


@pytest.mark.parametrize("cap", [131_072, 200_000])
@pytest.mark.parametrize(("layout", "size"), [("DDP", 2), ("DDP", 3), ("DDP", 4), ("HSDP", 4)])
def test_what_replicas_gather_has_a_limit(
    ranks: World, layout: str, size: int, cap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts under way take the cap, or one matrix's results each; never one matrix of every owner."""
    found = ranks.run(size, step, layout, SHAPES, cap)
    monkeypatch.setattr("muon_kernels.backends.eager.default_workspace_bytes", cap)
    model = owners(SHAPES, LAYOUTS[layout](size), backend="eager")
    largest = record_bytes(128 * 128 // (2 if layout == "HSDP" else 1))
    for rank, cost in zip(found, model, strict=True):
        assert sum(rank["gathered"]) <= max(cap, GATHERS * largest)
        assert rank["parts"] > rank["rounds"] or cap > 131_072
        assert cost.buffers == rank["shared"].buffer_bytes == rank["buffers"]
        assert cost.sent == rank["shared"].bytes_sent
        assert cost.collectives == rank["shared"].collectives


@pytest.mark.parametrize(
    "mesh",
    [Mesh(replicas=16), Mesh(rows=2, replicas=8), Mesh(rows=16), Mesh(replicas=768), Mesh(rows=64, replicas=256)],
)
@pytest.mark.parametrize("model", ["moonlight-16b", "llama-70b"])
def test_held_memory_has_a_limit(model: str, mesh: Mesh) -> None:
    """The cap for the workspace and the buffers of rounds, or one matrix's; and once more for what replicas gather."""
    shapes, cap = MODELS[model].shapes, 1 << 30
    largest = max(rows * cols for rows, cols, _ in shapes)
    one = max(traffic.plan_of(m, n).workspace_bytes for m, n, _ in shapes) + IN_FLIGHT * 2 * 2 * largest
    here = 2 * -(-largest // mesh.shards)
    for cost in owners(shapes, mesh, backend="cuda"):
        gathered = max(cap, GATHERS * here) if mesh.replicas > 1 else 0
        rounded = IN_FLIGHT * 8 * sum(count for *_, count in shapes) * (2 + mesh.shards)  # norms, and their buffer
        assert 0 < cost.workspace + cost.buffers <= max(cap, one) + gathered + rounded


def test_shares_are_worth_a_collective() -> None:
    assert share_bytes(1 << 30, 2) == 16 << 20
    assert 0 < IN_FLIGHT * 1001 * share_bytes(1 << 30, 1000) <= 1 << 30


def test_parts_hold_every_matrix_once_in_order() -> None:
    """Three replicas with two lots, 30 bytes a part: it ends where no more fits; one matrix may be more."""
    found = cut([[2, 1], [0, 2], [3, 0]], [10, 25], 30)
    assert found == [
        [Run(0, 0, 0, 2)],
        [Run(0, 1, 0, 1)],
        [Run(1, 1, 0, 1)],
        [Run(1, 1, 1, 1)],
        [Run(2, 0, 0, 3)],
    ]
    assert cut([[1], [1]], [40], 30) == [[Run(0, 0, 0, 1)], [Run(1, 0, 0, 1)]]
    assert cut([[3], [3]], [10], 40) == [[Run(0, 0, 0, 3), Run(1, 0, 0, 1)], [Run(1, 0, 1, 2)]]
    assert cut([[0], [0]], [10], 40) == []
    assert GATHERS * part_bytes(1000) <= 1000
    assert [sent_by(rank, [5, 0, 7]) for rank in range(3)] == [12, 5, 7]


def test_replicas_get_about_as_many() -> None:
    """Of ranks that have as much, one of each replica comes first: six matrices on 2 x 4 ranks are three each."""
    for count, expected in ((6, [3, 3]), (3, [2, 1]), (8, [4, 4])):
        (each,) = traffic.rounds([(64, 64, count)], Mesh(rows=4, replicas=2), backend="eager")
        assert isinstance(each, traffic.SlicedRound)
        assert each.by_replica == expected and max(each.taken) == 1


def test_what_a_lone_holder_has_stays_there(ranks: World) -> None:
    """One row of 300 and one of 40, cut along rows: the first of two ranks has them whole."""
    shapes = [(1, 300, 3), (1, 40, 2), (64, 96, 2)]
    found = ranks.run(2, step, "Shard(0)", shapes, None)
    model = owners(shapes, Mesh(rows=2), backend="eager")
    assert [rank["shared"].owned for rank in found] in ([6, 1], [5, 2])
    for rank, cost in zip(found, model, strict=True):
        assert (cost.sent, cost.flops) == (rank["shared"].bytes_sent, rank["plan"].flops)
        assert rank["shared"].bytes_sent <= 4 * 64 * 96 + 100
