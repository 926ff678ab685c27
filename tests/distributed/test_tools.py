"""Recorder of spectra and QK-Clip on parts and copies of matrices, against one process."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from test_layouts import CONTEXT, LAYOUTS, full, groups_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Partial, _StridedShard
from torch.optim import SGD, AdamW, Optimizer

from muon_kernels import Muon, MuonAdamW, max_logits, qk_clip_, spectra
from muon_kernels.cli.demo import GPT
from muon_kernels.spectra import shares


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ spectra


@contextmanager
def watched() -> Iterator[tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[Any]]]:
    """Sizes of what this rank measures and puts together, and what it is asked to agree on."""
    measured: list[tuple[int, ...]] = []
    gathered: list[tuple[int, ...]] = []
    asked: list[Any] = []
    before = shares.summary, DTensor.full_tensor, dist.all_gather_object
    shares.summary = lambda W: measured.append(tuple(W.shape)) or before[0](W)  # type: ignore[func-returns-value]
    DTensor.full_tensor = lambda t: gathered.append(tuple(t.shape)) or before[1](t)  # type: ignore
    dist.all_gather_object = lambda *args, **rest: asked.append(args[1]) or before[2](*args, **rest)  # type: ignore
    try:
        yield measured, gathered, asked
    finally:
        shares.summary, DTensor.full_tensor, dist.all_gather_object = before  # type: ignore[method-assign]


def record(layout: str, folder: str) -> tuple[list[spectra.Row], list[spectra.Row], list[int]]:
    """Rows of the second of three steps, here and in one process; what the steps measured and agreed on."""
    torch.manual_seed(0)
    model = GPT(40, 2, 4, CONTEXT)
    alone = copy.deepcopy(model)
    trained = LAYOUTS[layout](model)
    shared = {"process_group": dist.group.WORLD} if layout == "ddp" else {}
    optimizer = MuonAdamW(groups_of(trained), muon_options=shared)
    reference = MuonAdamW(groups_of(alone))
    named = getattr(trained, "module", trained).named_parameters()
    recorder = spectra.Recorder(optimizer, named, every=2, names="layers.*")
    expected = spectra.Recorder(reference, alone.named_parameters(), every=2, names="layers.*")
    counts = []
    for step in range(3):
        torch.manual_seed(100 + 10 * step + dist.get_rank())
        trained(torch.randint(256, (2, CONTEXT + 1))).backward()
        for p, q in zip(trained.parameters(), alone.parameters(), strict=True):
            q.grad = None if p.grad is None else full(p.grad).clone()
        reference.step()
        with watched() as (measured, gathered, asked):
            optimizer.step()
        counts.append((len(measured), len(gathered), len(asked)))
        optimizer.zero_grad()
    recorder.save(f"{folder}/{dist.get_rank()}.jsonl")
    expected.save(f"{folder}/alone-{dist.get_rank()}.jsonl")
    return recorder.rows, expected.rows, counts


SIZES = {"ddp": 3, "fsdp": 3, "hsdp": 4, "tp": 2, "fsdp and tp": 4}


@pytest.mark.parametrize("layout", SIZES)
def test_a_training_has_the_record_of_one_process(ranks: World, layout: str, tmp_path: Path) -> None:
    """On every rank; one of them writes the file; ranks share the work; other steps cost nothing."""
    found = ranks.run(SIZES[layout], record, layout, str(tmp_path))
    for rows, expected, _ in found:
        assert len(expected) == 3 * 8 and {row["step"] for row in expected} == {2}
        assert rows == expected
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == ["0.jsonl"]
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "alone-0.jsonl").read_bytes()


Placed = tuple[DeviceMesh, Sequence[Any]]


def placements() -> tuple[DeviceMesh, DeviceMesh]:
    """Four ranks in a line, and in a square."""
    return init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))


def nested(dim: int) -> list[Any]:
    """Sharded by the second dimension of the mesh, and what comes of it by the first, as FSDP2 does it."""
    return [_StridedShard(dim, split_factor=2), Shard(dim)]


def everywhere() -> list[tuple[Tensor, Placed]]:
    """Matrices, stacks and a convolution, cut evenly, unevenly, and so that ranks have nothing."""
    line, square = placements()
    both = [[Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Replicate()], nested(0), nested(1)]
    of_stacks = [[Shard(0), Shard(1)], [Shard(2), Shard(0)], [Replicate(), Shard(0)], nested(0), nested(1)]
    places: list[tuple[tuple[int, ...], Placed]] = [
        *(((rows, 6), (line, [Shard(0)])) for rows in (8, 7, 5, 3)),
        ((8, 5), (line, [Shard(1)])),
        ((8, 5), (line, [Replicate()])),
        ((9, 7), (line, [Shard(-1)])),
        *(((6, 4, 5), (line, [Shard(dim)])) for dim in range(3)),
        *(((5, 9), (square, at)) for at in both),
        *(((5, 4, 6), (square, at)) for at in of_stacks),
        ((6, 3, 2, 2), (line, [Shard(0)])),
        ((6, 3, 2, 2), (square, [Shard(1), Shard(0)])),
    ]
    return [(normal(*shape, seed=i), place) for i, (shape, place) in enumerate(places)]


def place(t: Tensor, where: Placed) -> DTensor:
    return distribute_tensor(t.clone(), *where, src_data_rank=None)


def stepped(params: Sequence[nn.Parameter], puts: Sequence[Any]) -> tuple[Optimizer, spectra.Recorder]:
    """A recorder of two steps of SGD, of which the second is recorded and the last parameter has no part in it."""
    optimizer = SGD(params, lr=0.1, momentum=0.9, foreach=False)
    recorder = spectra.Recorder(optimizer, every=2)
    for step in range(2):
        for i, (p, put) in enumerate(zip(params, puts, strict=True)):
            last = step and i + 1 == len(params)
            p.grad = None if last else put(normal(*p.shape, seed=100 + 50 * step + i))
        optimizer.step()
    return optimizer, recorder


def record_everywhere() -> list[str]:
    """Where rows differ from those of whole tensors, what was put together in vain, and unequal shares of the work."""
    cases = everywhere()
    puts = [lambda t, where=where: place(t, where) for _, where in cases]
    with watched() as (measured, gathered, _):
        recorder = stepped([nn.Parameter(put(t)) for (t, _), put in zip(cases, puts, strict=True)], puts)[1]
    expected = stepped([nn.Parameter(t.clone()) for t, _ in cases], [Tensor.clone] * len(cases))[1]
    wrong = [f"{a} instead of {b}" for a, b in zip(recorder.rows, expected.rows, strict=True) if a != b]
    if largest := [size for size in gathered if math.prod(size) > 9 * 9]:
        wrong.append(f"more than a matrix at a time: {largest}")
    mean = len(expected.rows) / dist.get_world_size()
    if not 0.6 * mean < len(measured) < 1.4 * mean:
        wrong.append(f"measured {len(measured)} matrices, on average {mean}")
    return wrong


def test_every_placement_has_the_rows_of_whole_tensors(ranks: World) -> None:
    for wrong in ranks.run(4, record_everywhere):
        assert not wrong


def copies(kind: str) -> tuple[bool, int, int]:
    """Whether rows of copies are those of one process, how many were measured here, and of how many."""
    shapes = [(6, 8)] * 5 + [(3, 4, 6)]

    def rows(ours: bool) -> list[spectra.Row]:
        params = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
        own: dict[str, Any] = {"process_group": dist.group.WORLD} if ours else {}
        optimizer = Muon(params, **own) if kind == "Muon" else AdamW(params)
        recorder = spectra.Recorder(optimizer, every=1, **(own if kind == "AdamW" else {}))
        for i, p in enumerate(params):
            p.grad = normal(*p.shape, seed=50 + i)
        optimizer.step()
        return recorder.rows

    with watched() as (measured, _, _):
        found = rows(True)
    return found == rows(False), len(measured), len(found)


@pytest.mark.parametrize("kind", ["Muon", "AdamW"])
def test_copies_are_measured_once(ranks: World, kind: str) -> None:
    """Momenta by their owners, where Muon has a process group; AdamW has all of them on all ranks."""
    found = ranks.run(3, copies, kind)
    assert all(same for same, _, _ in found)
    assert sum(own for _, own, _ in found) == found[0][2]
    assert max(own for _, own, _ in found) <= 0.5 * found[0][2]


def sent_for(where: str) -> set[str]:
    """Names of the collectives that a record takes."""
    line, square = placements()
    shape, place_of = {
        "experts": ((6, 4, 5), (line, [Shard(0)])),
        "experts of copies": ((6, 4, 5), (square, [Replicate(), Shard(0)])),
        "copies": ((4, 5), (line, [Replicate()])),
        "rows": ((4, 5), (line, [Shard(0)])),
    }[where]
    recorder = spectra.Recorder(SGD([nn.Parameter(place(normal(*shape), place_of))]), every=1)
    with CommDebugMode() as sent:
        recorder.record()
    return {str(name).split(".")[-1] for name, count in sent.get_comm_counts().items() if count}


@pytest.mark.parametrize("where", ["experts", "experts of copies", "copies", "rows"])
def test_only_parts_of_matrices_are_sent(ranks: World, where: str) -> None:
    for names in ranks.run(4, sent_for, where):
        assert names - {"allgather_", "allreduce_"} == ({"all_gather_into_tensor"} if where == "rows" else set())


def recorder_of(rows: int, **options: Any) -> tuple[list[nn.Parameter], Optimizer, spectra.Recorder]:
    size = dist.get_world_size()
    where = (placements()[1], [Replicate(), Shard(0)]) if size == 4 else (init_device_mesh("cpu", (size,)), [Shard(0)])
    params = [nn.Parameter(place(normal(rows, 4), where))]
    optimizer = AdamW(params, foreach=False)
    return params, optimizer, spectra.Recorder(optimizer, **{"every": 1, **options})


def fail_to_record(how: str) -> str:
    """What a rank says; rank 1 is the one that is different."""
    odd = dist.get_rank() == 1
    try:
        if how == "made alone":
            if odd:
                return "away"
            recorder_of(4)
        elif how == "another size":
            recorder_of(6 if odd else 8)
        elif how == "another pace":
            recorder_of(8, every=2 if odd else 1)
        params, optimizer, recorder = recorder_of(8)
        if how == "recorded alone":
            if odd:
                time.sleep(6)
                return "away"
            recorder.record()
        elif how == "another step":
            recorder.step += odd
        elif how == "no result":
            before = shares.summary

            def summary(W: Tensor) -> Any:
                shares.summary = before
                raise torch.linalg.LinAlgError("no convergence")

            shares.summary = summary if odd else before  # type: ignore[assignment]
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if how in ("another step", "no result"):
            assert not recorder.rows
    return ""


DIFFER = "ValueError: all ranks should record the same but rank 1 of a process group has "
SAID = {
    "made alone": ["RuntimeError: making a spectra.Recorder should be done on every rank that has a part or a", "away"],
    "recorded alone": ["RuntimeError: recording the spectra of step 0 should be done on every rank", "away"],
    "another size": [DIFFER + "0.0 of size (6, 4)"] * 2,
    "another pace": [DIFFER + "every=2 where rank 0 has every=1"] * 2,
    "another step": [DIFFER + "step 1 where rank 0 has step 2"] * 4,
    "no result": [
        "RuntimeError: recording the spectra of step 1: another rank could not measure",
        "_LinAlgError: no convergence",
    ],
}


@pytest.mark.parametrize("how", SAID)
def test_ranks_that_do_not_record_the_same_are_told(ranks: World, how: str) -> None:
    """All of them, in time. In a square of four ranks, one has another step; not all are in a group with it."""
    ranks.run(2, dist.get_rank)  # so that processes are there when time counts
    found = ranks.outcomes(len(SAID[how]), fail_to_record, how, timeout=4 if "alone" in how else 60)
    for (returned, said), expected in zip(found, SAID[how], strict=True):
        assert returned and said.startswith(expected), said


def part_without_momentum() -> list[float]:
    """Ranks of momenta of which one rank has no part yet: zeros are what it would have."""
    params, optimizer, recorder = recorder_of(8, tensors="momentum")
    if dist.get_rank() == 0:
        optimizer.state[params[0]]["exp_avg"] = torch.ones_like(params[0])
    recorder.record()
    (row,) = recorder.rows
    return [row["stable_rank"], row["rms"]]


def test_a_part_that_has_no_momentum_yet_is_zero(ranks: World) -> None:
    for found in ranks.run(2, part_without_momentum):
        assert found == pytest.approx([1.0, math.sqrt(1 / 2)])


def partial() -> str:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(DTensor.from_local(normal(4, 4), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"0\.0 should be sharded or replicated but has placements") as error:
        spectra.Recorder(SGD([p]), every=1)
    with pytest.raises(ValueError, match="q should be sharded or replicated but has placements"):
        qk_clip_(p, normal(4, 4), torch.ones(2))
    return str(error.value)


def test_partial_sums_are_no_weights(ranks: World) -> None:
    ranks.run(2, partial)


# ------------------------------------------------------------------------------------------------------------ QK-Clip

LOGITS = torch.tensor([50.0, 300.0, 101.0, 400.0, -7.0, -math.inf])


def weights_of_heads() -> dict[str, Tensor]:
    """Queries of 6 heads with bias and master, keys of 2 and of 1, a fused projection, and a latent one."""
    sizes = {"q": (24, 10), "two": (10, 10), "one": (3, 10), "fused": (24 + 8 + 8, 10), "fused_bias": (24 + 8 + 8,)}
    sizes |= {"bias": (24,), "latent": (6 * 7, 10), "latent_k": (6 * 5, 8), "stacked": (6, 4, 10)}
    found = {name: normal(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    return {**found, "q": found["q"].bfloat16(), "master": found["q"], "fused": found["fused"].bfloat16()}


def clip(w: dict[str, Tensor], maxima: Tensor, pairs: bool) -> list[Tensor]:
    """All kinds of weights; parts of them as pairs, or as views."""
    fused, bias, latent = w["fused"], w["fused_bias"], w["latent"]
    if pairs:
        of_head = torch.arange(6 * 7).view(6, 7)
        q, k = ([(t, slice(*at)) for t in (fused, bias)] for at in ((0, 24), (24, 32)))
        nope, rope = [(latent, of_head[:, :5].flatten())], [(latent, of_head[:, 5:].flatten().int())]
    else:
        q, k = ([t[slice(*at)] for t in (fused, bias)] for at in ((0, 24), (24, 32)))
        nope, rope = latent.view(6, 7, 10)[:, :5], latent.view(6, 7, 10)[:, 5:]
    return [
        qk_clip_([w["q"], w["bias"], w["master"]], w["two"], maxima, kv_heads=2, alpha=0.3),
        qk_clip_(w["stacked"], w["one"], maxima, kv_heads=1),
        qk_clip_(q, k, maxima, kv_heads=2),
        qk_clip_(nope, w["latent_k"], maxima, q_rope=rope, alpha=0.2),
    ]


def clip_everywhere() -> list[str]:
    """Weights that differ from whole ones, placements that send anything, and versions that stay."""
    line, square = placements()
    cases: list[Placed] = [(line, [at]) for at in (Shard(0), Shard(-1), Replicate())]
    cases += [
        (square, at)
        for at in (
            [Replicate(), Shard(0)],
            [Shard(0), Replicate()],
            [Shard(1), Shard(0)],
            [Shard(0), Shard(0)],
            nested(0),
        )
    ]
    whole = weights_of_heads()
    gammas = clip(whole, LOGITS, pairs=False)
    wrong = []
    for where in cases:
        fits = [name for name, t in whole.items() if t.ndim > 1 or Shard(1) not in where[1]]
        ours = {name: place(t, where) if name in fits else t for name, t in weights_of_heads().items()}
        with CommDebugMode() as sent:
            found = clip(ours, LOGITS, pairs=True)
        if sent.get_total_counts():
            wrong.append(f"{where}: {sent.get_comm_counts()}")
        wrong += [f"{where}: γ" for a, b in zip(found, gammas, strict=True) if not torch.equal(a, b)]
        for name, t in ours.items():
            if not torch.equal(full(t.detach()), whole[name]):
                wrong.append(f"{where}: {name}")
            if not t._version:
                wrong.append(f"{where}: version of {name}")
    return wrong


def test_clipped_to_the_bits_of_whole_weights(ranks: World) -> None:
    before, after = weights_of_heads(), weights_of_heads()
    clip(after, LOGITS, pairs=False)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    for wrong in ranks.run(4, clip_everywhere):
        assert not wrong


def maxima_of_ranks() -> None:
    """Each rank has seen other logits, or other heads."""
    line, square = placements()
    rank = dist.get_rank()
    seen = torch.stack([LOGITS.roll(r) - 10 * r for r in range(4)])
    square_of = DTensor.from_local(
        seen[rank].view(2, 3)[rank % 2].contiguous(), square, [Partial("max"), Shard(0)], run_check=False
    )
    heads = torch.cat([seen[::2, :3].amax(0), seen[1::2, 3:].amax(0)])
    for given, expected, options in [
        (seen[rank].clone(), seen.amax(0), {"group": dist.group.WORLD}),
        (DTensor.from_local(seen[rank], line, [Partial("max")], run_check=False), seen.amax(0), {}),
        (distribute_tensor(LOGITS, line, [Shard(0)]), LOGITS, {}),
        (distribute_tensor(LOGITS, line, [Replicate()]), LOGITS, {}),
        (square_of, heads, {}),
    ]:
        before = full(given) if isinstance(given, DTensor) else given.clone()
        q, k = normal(24, 10), normal(24, 10, seed=1)
        p, r = (place(t, (line, [Shard(0)])) for t in (q, k))
        gamma = qk_clip_(p, r, given, **options)
        assert torch.equal(gamma, qk_clip_(q, k, expected)) and not isinstance(gamma, DTensor)
        assert torch.equal(full(p), q) and torch.equal(full(r), k)
        assert torch.equal(full(given), before)

    q = place(normal(24, 10), (line, [Shard(0)]))
    nan = LOGITS.where(torch.arange(6) != rank, math.nan) if rank == 2 else LOGITS
    for given, options in [
        (nan, {"group": dist.group.WORLD}),
        (DTensor.from_local(nan, line, [Partial("max")], run_check=False), {}),
    ]:
        with pytest.raises(ValueError, match=r"of these heads are: \{2: inf\}; has the training diverged"):
            qk_clip_(q, q.clone(), given, **options)
    assert torch.equal(q.full_tensor(), normal(24, 10))
    with pytest.raises(ValueError, match=r"max_logits should be replicated, sharded, or Partial\('max'\) but has"):
        qk_clip_(q, q.clone(), DTensor.from_local(LOGITS, line, [Partial()], run_check=False))


def views() -> None:
    """Views share the memory of a DTensor, slices of a dimension that is sharded do not."""
    line, square = placements()
    for where in ((line, [Shard(0)]), (square, [Shard(1), Shard(0)]), (square, [Replicate(), Shard(0)])):
        whole, k = normal(4 * 7, 10), normal(4, 10, seed=1)
        maxima = LOGITS[:4]
        p, r = nn.Parameter(place(whole, where)), nn.Parameter(place(k, where))
        heads = p.view(4, 7, 10)
        qk_clip_(heads[:, :5], r, maxima, q_rope=heads[:, 5:])
        of_whole = whole.view(4, 7, 10)
        qk_clip_(of_whole[:, :5], k, maxima, q_rope=of_whole[:, 5:])
        assert torch.equal(full(p.detach()), whole) and torch.equal(full(r.detach()), k)
        with pytest.raises(
            ValueError, match=r"q .* is a copy of a part, which torch makes .*\[\(qkv.weight, slice\(0, d"
        ):
            qk_clip_(p[:12], r, maxima)
        with pytest.raises(ValueError, match=r"k should be in the memory of its parameter"):
            qk_clip_(p, p.detach()[12:], maxima)
        assert torch.equal(full(p.detach()), whole)
    p = nn.Parameter(place(normal(4 * 7, 10), (line, [Shard(1)])))
    before = full(p.detach())
    qk_clip_(p[:8], p[8:12], LOGITS[:4])  # views, as rows are whole
    assert not torch.equal(full(p.detach())[:12], before[:12]) and torch.equal(full(p.detach())[12:], before[12:])


def logits_of_parts() -> None:
    line, square = placements()
    for shape, keys, where, at in [
        ((4, 6, 9, 4), (4, 2, 9, 4), (square, [Shard(0), Shard(1)]), (Partial("max"), Shard(0))),
        ((4, 6, 9, 4), (4, 6, 7, 4), (line, [Shard(1)]), (Shard(0),)),
        ((3, 6, 9, 4), (3, 2, 9, 4), (line, [Shard(0)]), (Partial("max"),)),
        ((3, 6, 9, 4), (3, 2, 9, 4), (square, [Replicate(), Shard(-3)]), (Replicate(), Shard(0))),
    ]:
        q, k = normal(*shape), normal(*keys, seed=1)
        parts = place(q, where), place(k, where)
        with CommDebugMode() as sent:
            found = max_logits(*parts, causal=True)
        assert not sent.get_total_counts() and isinstance(found, DTensor) and found.placements == at
        torch.testing.assert_close(found.full_tensor(), max_logits(q, k, causal=True), rtol=1e-6, atol=0)
    q, k = normal(4, 6, 8, 4), normal(4, 3, 8, 4)
    along = place(q, (line, [Shard(2)]))
    refused = [
        (along, along, "sharded along batch or heads, or replicated, but have placements"),
        (place(q, (line, [Shard(0)])), q, "DTensors of the same mesh and placements, or plain, but are"),
        (place(q, (square, [Shard(1), Shard(0)])), place(k, (square, [Shard(1), Shard(0)])), "that the 2 ranks which"),
    ]
    for a, b, message in refused:
        with pytest.raises(ValueError, match=message):
            max_logits(a, b)


def absent() -> str:
    if dist.get_rank() == 1:
        time.sleep(6)
        return ""
    q, k = normal(24, 10), normal(24, 10, seed=1)
    try:
        qk_clip_(q, k, LOGITS, group=dist.group.WORLD)
    except RuntimeError as error:
        assert torch.equal(q, normal(24, 10))
        return str(error)
    return "nothing"


def test_maxima_of_all_ranks(ranks: World) -> None:
    ranks.run(4, maxima_of_ranks)


def test_views_of_weights(ranks: World) -> None:
    ranks.run(4, views)


def test_logits_of_parts_of_batch_and_heads(ranks: World) -> None:
    ranks.run(4, logits_of_parts)


def test_a_rank_that_does_not_clip(ranks: World) -> None:
    ranks.run(2, dist.get_rank)
    (returned, said), _ = ranks.outcomes(2, absent, timeout=4)
    assert returned and said.startswith(
        "qk_clip_ should be called on every rank that shares max_logits, but a collective failed"
    )
