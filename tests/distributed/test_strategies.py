"""Other ways of stepping together than by owners: sums of Gram matrices, blocks.

Ranks run functions of this module, see ranks.py; what they return is compared here with one process and with float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checks import needs
from distributed.ranks import World, world
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from muon_kernels import COEFFICIENTS, Muon, backends, orthogonalize, spectral_power
from muon_kernels.checks.matrices import SPECTRA, factors, spectral_truth
from muon_kernels.checks.yardsticks import bf16_loop, relative_error
from muon_kernels.coefficients import resolve
from muon_kernels.distributed import collectives, exchange
from muon_kernels.distributed.strategies import gram
from muon_kernels.newton_schulz import ALGORITHMS, Square, squares_of
from muon_kernels.reference import newton_schulz

BACKENDS = [name for name in ("cpu", "eager") if not backends.unavailable(name)]
PLAIN = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "adjust_lr_fn": "none"}


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    with world() as processes:
        yield processes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def traffic() -> Iterator[list[tuple[str, int]]]:
    """(name, bytes that this rank sends) of every collective on numbers that are not int; reductions as in a ring."""
    found: list[tuple[str, int]] = []
    before = dist.all_reduce, dist.all_to_all_single, collectives._gather, collectives._reduce_scatter

    def all_reduce(t: Tensor, *args: Any, group: Any = None, **rest: Any) -> Any:
        if t.is_floating_point():
            found.append(("all_reduce", 2 * (group.size() - 1) * t.numel() * t.itemsize // group.size()))
        return before[0](t, *args, group=group, **rest)

    def all_to_all(out: Tensor, t: Tensor, received: Any, sent: Any, group: Any = None, **rest: Any) -> Any:
        found.append(("all_to_all", (sum(sent) - sent[group.rank()]) * t.itemsize))
        return before[1](out, t, received, sent, group=group, **rest)

    def all_gather(out: Tensor, t: Tensor, sizes: Sequence[int], group: Any) -> Any:
        found.append(("all_gather", (sum(sizes) - sizes[(group.rank() + 1) % group.size()]) * t.itemsize))
        return before[2](out, t, sizes, group)

    def reduce_scatter(out: Tensor, t: Tensor, *args: Any, group: Any = None, **rest: Any) -> Any:
        found.append(("reduce_scatter", (group.size() - 1) * out.numel() * t.itemsize))
        return before[3](out, t, *args, group=group, **rest)

    dist.all_reduce, dist.all_to_all_single = all_reduce, all_to_all  # type: ignore[assignment]
    collectives._gather, collectives._reduce_scatter = all_gather, reduce_scatter
    try:
        yield found
    finally:
        dist.all_reduce, dist.all_to_all_single = before[0], before[1]
        collectives._gather, collectives._reduce_scatter = before[2], before[3]


def cut(t: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    return distribute_tensor(t.clone(), mesh, placements)


def sent(optimizer: Muon) -> int:
    """What the rounds that a step settled on say."""
    return sum(task.bytes_sent for task in optimizer._tasks.kept if isinstance(task, exchange.Exchange))


Stepped = tuple[list[Tensor], list[Tensor], list[tuple[str, int]], int]


def stepped(
    matrices: Sequence[tuple[Tensor, int]],
    grads: Sequence[Sequence[Tensor]],
    mesh_shape: tuple[int, ...],
    options: dict[str, Any],
) -> Stepped:
    """Whole parameters and momenta after steps with these gradients; the traffic of the last, and what it should be.

    Args:
        matrices: (parameter, the dimension that the last dimension of the mesh cuts).
        grads: of every step.
        mesh_shape: all dimensions but the last replicate.
        options: of Muon.
    """
    names = tuple("abc"[: len(mesh_shape)])
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    placements = [[Replicate()] * (len(mesh_shape) - 1) + [Shard(dim)] for _, dim in matrices]
    params = [Parameter(cut(t, mesh, at)) for (t, _), at in zip(matrices, placements, strict=True)]
    optimizer = Muon(params, **options)
    for of_step in grads:
        for p, g, at in zip(params, of_step, placements, strict=True):
            p.grad = cut(g, mesh, at)
        with traffic() as found:
            optimizer.step()
    momenta = [optimizer.state[p]["momentum_buffer"].full_tensor() for p in params]
    return [p.detach().full_tensor() for p in params], momenta, found, sent(optimizer)


def alone(tensors: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], options: dict[str, Any]) -> Muon:
    """One process; the parameters are the optimizer's."""
    params = [Parameter(t.clone()) for t in tensors]
    optimizer = Muon(params, **options)
    for of_step in grads:
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# ------------------------------------------------------------------------------------------------------------ gram


def spread(X: Tensor, parts: int) -> Tensor:
    """(parts, m, width) of (m, n), the last padded with zeros."""
    width = -(-X.shape[1] // parts)
    padded = torch.zeros(X.shape[0], parts * width, dtype=X.dtype)
    padded[:, : X.shape[1]] = X
    return padded.view(X.shape[0], parts, width).transpose(0, 1).contiguous()


def summed_in_one_process(G: Tensor, name: str, parts: int, backend: str, algorithm: str) -> Tensor:
    """What `parts` ranks do, as a batch: sums over it take the place of the collective."""
    schedule, ops, m = resolve(name, None), backends.get(backend), G.shape[0]
    X = spread(G.double() / (G.double().norm() * schedule.margin), parts).bfloat16()
    packed = torch.empty(parts, *gram.packed_size(m))

    def square() -> Square:
        return Square(
            torch.empty(parts, m, m, dtype=torch.bfloat16),
            torch.empty(parts, m) if ops.precise_squares else None,
        )

    def add_up(of: Square, rest: Square, scale: Tensor | None) -> None:
        gram.pack([of, rest], scale, packed)
        packed.copy_(packed.sum(0, keepdim=True).expand_as(packed))
        gram.unpack(packed, of)

    squares = [square() for _ in range(squares_of(algorithm, schedule))]
    summed = gram.Summed(ops, square(), add_up)
    out = ALGORITHMS[algorithm].run(summed, X, torch.empty_like(X), squares, None, schedule)
    return out.transpose(0, 1).flatten(1)[:, : G.shape[1]]


@pytest.mark.parametrize("shape", [(48, 96), (64, 256), (129, 300)], ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize(
    "way", [way for way in (("cpu", "gram"), ("cpu", "standard"), ("eager", "standard")) if way[0] in BACKENDS], ids=str
)
def test_sums_keep_the_accuracy_rule(way: tuple[str, str], name: str, shape: tuple[int, int]) -> None:
    """1.3 times the error of torch's loop, or 2.5 %, for any number of parts: rounded sums of parts would not."""
    schedule = resolve(name, None)
    for spectrum in SPECTRA:
        if spectrum == "zero":
            continue
        U, s, V = factors(spectrum, *shape)
        G = ((U * s) @ V.mT).float()
        truth = spectral_truth(U, s, V, schedule.triples, schedule.margin)
        torchs = max(relative_error(bf16_loop(G[None], schedule, d)[0], truth) for d in (torch.bfloat16, torch.float32))
        for parts in (2, 5, 16):
            ours = relative_error(summed_in_one_process(G, name, parts, *way), truth)
            assert ours <= max(1.3 * torchs, 0.025), (spectrum, parts, ours, torchs)


@pytest.mark.parametrize("precise", [True, False])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9])
def test_packed_is_one_triangle(m: int, precise: bool) -> None:
    assert gram.packed_size(m)[0] * gram.packed_size(m)[1] == m * (m + 1) // 2

    def square(seed: int) -> Square:
        high = torch.randint(-50, 50, (2, m, m), generator=torch.Generator().manual_seed(seed))
        return Square((high + high.mT).bfloat16(), normal(2, m, seed=seed) if precise else None)

    def exact(of: Square) -> Tensor:
        return of.high.double() + (torch.diag_embed(of.diagonal.double()) if of.diagonal is not None else 0)

    A, B, scale = square(1), square(2), torch.tensor([2.0, 2.0**-70])
    packed = torch.full((2, *gram.packed_size(m)), torch.nan)
    gram.pack([A, B], scale, packed)
    truth = (exact(A) + exact(B)) * scale.double()[:, None, None] ** 2
    assert float(packed[0].double().sum()) == pytest.approx(float(truth[0].tril().sum()), rel=1e-5, abs=1e-3)
    back = square(3)
    gram.unpack(packed, back)
    assert torch.equal(back.high, back.high.mT)
    torch.testing.assert_close(back.high[0].double(), truth[0], rtol=2**-8, atol=0)
    if precise:
        diagonals = [t.diagonal(dim1=1, dim2=2) for t in (exact(back), truth)]
        torch.testing.assert_close(diagonals[0][0], diagonals[1][0], rtol=1e-5, atol=1e-4)


def test_scales_whose_squares_are_no_fp32_number() -> None:
    A = Square(torch.full((1, 2, 2), 2.0**100, dtype=torch.bfloat16))
    packed = torch.empty(1, *gram.packed_size(2))
    gram.pack([A], torch.tensor([2.0**-75]), packed)
    assert torch.equal(packed, torch.full_like(packed, 2.0**-50))


GRAM = [((48, 100), 1), ((100, 48), 0), ((40, 40), 0), ((40, 40), 1), ((5, 3), 0), ((3, 5, 7), 2), ((9, 2, 2, 2), 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gram_is_muon(ranks: World, size: int, backend: str) -> None:
    """Tall, wide, square, stacks, convolutions, parts that are uneven or empty; momenta to the bit."""
    matrices = [(normal(*shape, seed=1), dim) for shape, dim in GRAM]
    grads = [[normal(*shape, seed=seed) for shape, _ in GRAM] for seed in (2, 3)]
    options = {"lr": 0.1, "weight_decay": 0.1, "backend": backend}
    results = ranks.run(size, stepped, matrices, grads, (size,), {**options, "strategy": "gram"})
    one = alone([t for t, _ in matrices], grads, options)
    for params, momenta, found, expected in results:
        assert {name for name, _ in found} == ({"all_reduce"} if size > 1 else set())
        assert sum(bytes_ for _, bytes_ in found) == expected
        for p, M, own, before in zip(params, momenta, params_of(one), [t for t, _ in matrices], strict=True):
            torch.testing.assert_close(M, one.state[own]["momentum_buffer"], rtol=1e-6, atol=1e-7)
            assert relative_error(p - before, own.detach().double() - before) < 0.03, p.shape


def test_gram_orthogonalizes_every_spectrum(ranks: World) -> None:
    schedule = resolve("keller", 5)
    for shape, dim in (((64, 200), 1), ((200, 64), 0)):
        wholes = []
        for spectrum in SPECTRA:
            U, s, V = factors(spectrum, *shape)
            wholes.append((((U * s) @ V.mT).float(), spectral_truth(U, s, V, schedule.triples, schedule.margin)))
        matrices = [(torch.zeros(shape), dim) for _ in wholes]
        for backend in BACKENDS:
            options = {**PLAIN, "strategy": "gram", "backend": backend}
            for params, *_ in ranks.run(3, stepped, matrices, [[G for G, _ in wholes]], (3,), options):
                for p, (G, truth), spectrum in zip(params, wholes, SPECTRA, strict=True):
                    if spectrum == "zero":
                        assert not p.any()
                        continue
                    torchs = max(
                        relative_error(bf16_loop(G[None], schedule, dtype)[0], truth)
                        for dtype in (torch.bfloat16, torch.float32)
                    )
                    assert relative_error(-p, truth) <= max(1.3 * torchs, 0.025), spectrum


def sums_and_squares(
    matrices: Sequence[tuple[Tensor, int]], options: dict[str, Any]
) -> tuple[list[Tensor], int, float]:
    """What a step of `stepped` makes: all squares at its end, visits to X, and the largest error of the first sum.

    That of an element of R relative to √(R_aa R_bb), from R in float64 of what is multiplied.
    """
    before, kept, visits, worst = gram.GramRound._together, [], 0, 0.0
    unpack, truth, before_sum = gram.unpack, torch.empty(0), dist.all_reduce

    def counted(packed: Tensor, square: Square) -> None:
        nonlocal visits, worst
        unpack(packed, square)
        if visits == 0:
            sum_ = Square(torch.empty_like(truth))
            unpack(packed, sum_)
            d = truth.diagonal(dim1=1, dim2=2).sqrt()
            worst = float(((sum_.high - truth).abs() / (d[:, :, None] * d[:, None, :])).max())
        visits += 1

    def together(self: Any, stacks: Any, scale: Any, buffers: Any) -> Callable[[], Tensor]:
        program = before(self, stacks, scale, buffers)

        def run() -> Tensor:
            nonlocal truth
            X = stacks.X.double() * scale.double()[:, None, None]
            truth = X @ X.mT
            before_sum(truth)
            result = program()
            kept.extend(square.high.clone() for square in stacks.squares)
            return result

        return run

    gram.unpack, gram.GramRound._together = counted, together  # type: ignore[method-assign]
    try:
        stepped(matrices, [[t for t, _ in matrices]], (dist.get_world_size(),), options)
    finally:
        gram.unpack, gram.GramRound._together = unpack, before  # type: ignore[method-assign]
    return kept, visits, worst


@pytest.mark.parametrize(("backend", "visits"), [pytest.param("cpu", 3, marks=needs.cpu_kernels), ("eager", 5)])
def test_all_ranks_have_the_same_squares(ranks: World, backend: str, visits: int) -> None:
    """To the bit; with cut columns of another width on every rank. X is visited as seldom as the accuracy allows."""
    matrices = [(normal(33, 101, seed=i), 1) for i in range(2)]
    options = {**PLAIN, "strategy": "gram", "backend": backend}
    first, *others = ranks.run(4, sums_and_squares, matrices, options)
    assert first[1] == visits
    assert first[2] < 2**-16
    assert first[0]
    for squares, _, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(first[0], squares, strict=True))


@needs.cpu_kernels
def test_gram_in_many_rounds_is_gram_in_one(ranks: World) -> None:
    matrices = [(normal(24, 50, seed=i), 1) for i in range(7)]
    grads = [[normal(24, 50, seed=10 + i) for i in range(7)]]
    options = {"strategy": "gram", "backend": "cpu"}
    capped = {**options, "max_workspace_bytes": 40000}
    (one, _, of_one, _), (many, _, of_many, expected) = (
        ranks.run(2, stepped, matrices, grads, (2,), given)[1] for given in (options, capped)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
    assert len(of_many) > 2 * len(of_one)
    assert sum(bytes_ for _, bytes_ in of_many) == expected


@needs.cpu_kernels
@pytest.mark.parametrize("count", [1, 3])
def test_replicas_share_what_is_summed(ranks: World, count: int) -> None:
    """Also where there are fewer matrices than replicas."""
    matrices = [(normal(24, 50, seed=i), 1) for i in range(count)]
    grads = [[normal(24, 50, seed=10 * step + i) for i in range(count)] for step in (1, 2)]
    options = {"lr": 0.1, "strategy": "gram", "backend": "cpu"}
    results = ranks.run(4, stepped, matrices, grads, (2, 2), options)
    shards = ranks.run(2, stepped, matrices, grads, (2,), options)
    for params, momenta, found, expected in results:
        assert all(torch.equal(a, b) for a, b in zip(params, shards[0][0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(momenta, shards[0][1], strict=True))
        assert sum(bytes_ for _, bytes_ in found) == expected
        assert found[-1][0] == "all_gather"
    sums = [sum(name == "all_reduce" for name, _ in found) for _, _, found, _ in results]
    assert sums == [4, 4, 4 * (count > 1), 4 * (count > 1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_any_scale(ranks: World, backend: str) -> None:
    """One rank's part far below or above another's; zeros; what is not finite spoils its own matrix."""
    G = normal(16, 60, seed=1)
    uneven, tiny, huge = G.clone(), G.clone(), G.clone()
    uneven[:, :20] *= 1e-25
    tiny[:, 40:] *= 1e-20
    nan, inf = G.clone(), G.clone()
    nan[3, 50] = torch.nan
    inf[3, 5] = torch.inf
    gone = G.clone()
    gone[:, :40] = 0
    grads = [G, G * 1e-28, G * 1e28, uneven, tiny * 1e-12, huge * 1e10, gone, torch.zeros_like(G), nan, inf]
    matrices = [(torch.zeros(16, 60), 1) for _ in grads]
    options = {**PLAIN, "strategy": "gram", "backend": backend}
    for params, *_ in ranks.run(3, stepped, matrices, [grads], (3,), options):
        *sound, zero_, of_nan, of_inf = params
        for p, g in zip(sound, grads, strict=False):
            truth = newton_schulz(g.double(), resolve("keller", 5).triples)
            assert relative_error(-p, truth) < 0.03
        assert torch.equal(sound[1], sound[0]) or relative_error(sound[1], sound[0].double()) < 0.01
        assert not zero_.any()
        assert of_nan.isnan().all()
        assert of_inf.isnan().all()


@needs.cpu_kernels
def test_powers_of_what_is_summed(ranks: World) -> None:
    G = normal(32, 80, seed=1)
    options = {**PLAIN, "strategy": "gram", "backend": "cpu", "power": 0.5}
    truth = spectral_power(G.double(), 0.5, exact="svd")
    for params, *_ in ranks.run(3, stepped, [(torch.zeros(32, 80), 1)], [[G]], (3,), options):
        assert relative_error(-params[0], truth) < 0.03


@needs.cpu_kernels
def test_parts_of_a_split_are_summed_apart(ranks: World) -> None:
    """Heads along the dimension that is not cut, and along the one that is, where each is on a rank or two."""
    G = [normal(24, 40, seed=1), normal(60, 8, seed=2)]
    options = {**PLAIN, "backend": "cpu", "split": "heads(3)"}
    matrices = [(torch.zeros(24, 40), 1), (torch.zeros(60, 8), 0)]
    one = alone([t for t, _ in matrices], [G], options)
    for params, *_ in ranks.run(4, stepped, matrices, [G], (4,), {**options, "strategy": "gram"}):
        for p, own in zip(params, params_of(one), strict=True):
            assert relative_error(p, own.detach().double()) < 0.02


def flops_of(mesh_shape: tuple[int, ...], count: int, options: dict[str, Any]) -> int:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=tuple("abc"[: len(mesh_shape)]))
    placements = [Replicate()] * (len(mesh_shape) - 1) + [Shard(1)]
    params = [Parameter(cut(torch.zeros(20, 100), mesh, placements)) for _ in range(count)]
    return Muon(params, **options).plan().flops


def test_a_plan_counts_what_a_rank_does(ranks: World) -> None:
    """Standard steps on eager: of X Xᵀ the second product too, of 50 columns or of what is left; and m x m products."""
    options = {"strategy": "gram", "backend": "eager"}
    for mesh, count, columns in (((2,), 1, [50, 50]), ((3,), 2, [34, 34, 32]), ((2, 2), 3, [50, 50, 50, 50])):
        found = ranks.run(len(columns), flops_of, mesh, count, options)
        shares = [2, 2, 1, 1] if len(mesh) == 2 else [count] * len(columns)
        steps = [5 * (2 * 20 * 20 * n * 3 + 2 * 20**3) for n in columns]
        assert found == [share * flops for share, flops in zip(shares, steps, strict=True)]


def plan_of(shape: tuple[int, int], dim: int, options: dict[str, Any]) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return str(Muon([Parameter(cut(torch.zeros(shape), mesh, [Shard(dim)]))], **options).plan())


def test_what_cannot_be_summed_goes_to_owners(ranks: World) -> None:
    """Not in silence."""
    matrices, grads = [(normal(30, 70, seed=1), 0)], [[normal(30, 70, seed=2)]]
    results = [ranks.run(3, stepped, matrices, grads, (3,), {"strategy": s})[0] for s in ("gram", "owner")]
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert [name for name, _ in results[0][2]] == ["all_to_all"] * 2
    for text in ranks.run(3, plan_of, (30, 70), 0, {"strategy": "gram"}):
        assert "strategy='gram' is for matrices that are cut along their longer dimension" in text
        assert "10x70" in text
    for text in ranks.run(3, plan_of, (30, 70), 1, {"strategy": "gram"}):
        assert "strategy" not in text


# ---------------------------------------------------------------------------------------------------------- blocks

BLOCKS = {"lr": 0.1, "weight_decay": 0.1, "strategy": "blocks", "block_period": 3, "backend": "cpu"}


def written_out(
    W: Tensor, grads: Sequence[Tensor], cuts: Callable[[Tensor], Sequence[Tensor]], ratio: Callable[[int, int], float]
) -> Tensor:
    """MuonBP in float64 with lr 0.1, period 3 and Muon's defaults, with the iteration as it is in one process."""
    W, M = W.double(), torch.zeros_like(W)
    for step, g in enumerate(grads):
        M = M.lerp(g, 0.05)
        D = g.lerp(M, 0.95)
        W = W * (1 - 0.1 * 0.1)
        for part, of in zip(*((cuts(t) if step % 3 else [t]) for t in (W, D)), strict=True):
            part.sub_(0.1 * ratio(*part.shape) * orthogonalize(of, backend="cpu").double())
    return W


@needs.cpu_kernels
@pytest.mark.parametrize(("shape", "dim"), [((30, 70), 0), ((30, 70), 1), ((70, 30), 0), ((5, 3), 0)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blocks_between_whole_steps(ranks: World, size: int, shape: tuple[int, int], dim: int) -> None:
    """The first step is whole; factors of the learning rate are those of what is orthogonalized."""
    W, grads = normal(*shape, seed=1), [normal(*shape, seed=seed) for seed in range(2, 7)]
    options = {**BLOCKS, "adjust_lr_fn": "match_rms_adamw", "block_lr_ratio": 0.5}
    width = -(-shape[dim] // size)

    def ratio(rows: int, cols: int) -> float:
        parts = (rows, cols) != shape
        return 0.2 * max(rows, cols) ** 0.5 * (0.5 if parts else 1.0)

    expected = written_out(W, grads, lambda t: t.split(width, dim), ratio)
    for steps in (1, 2, 5):
        found = ranks.run(size, stepped, [(W, dim)], [[g] for g in grads[:steps]], (size,), options)
        for params, _, calls, _ in found:
            whole = steps % 3 == 1 and size > 1
            assert bool(calls) == whole
            if steps == 5:
                assert relative_error(params[0], expected) < 2e-3
    if size > 1:
        plain = ranks.run(size, stepped, [(W, dim)], [[g] for g in grads], (size,), {**options, "strategy": "owner"})
        assert relative_error(plain[0][0][0], expected) > 1e-2


def parts_alone(shape: tuple[int, int], dim: int, options: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether a step of blocks is, to the bit, `Muon`'s of this rank's part as a parameter of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = Parameter(cut(normal(*shape, seed=1), mesh, [Shard(dim)]))
    optimizer = Muon([p], **options)
    for seed in (2, 3):
        p.grad = cut(normal(*shape, seed=seed), mesh, [Shard(dim)])
        if seed == 3:
            own = Parameter(p.to_local().detach().clone())
            apart = Muon([own], **second)
            apart.state[own]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].to_local().clone()
            own.grad = p.grad.to_local().clone()
            apart.step()
        optimizer.step()
    return torch.equal(p.to_local(), own) and bool(own.numel())


@needs.cpu_kernels
@pytest.mark.parametrize("split", [None, "heads(6)"])
def test_a_block_is_stepped_as_a_matrix(ranks: World, split: str | None) -> None:
    """Of heads(6) along rows that three ranks share, each has two."""
    options = {"lr": 0.1, "backend": "cpu"}
    own = {**options, "split": "heads(2)" if split else None}
    assert all(ranks.run(3, parts_alone, (36, 70), 0, {**options, "strategy": "blocks", "split": split}, own))


def test_momentum_alone_has_no_blocks(ranks: World) -> None:
    """Where the direction is the update, its factor is that of the parameter."""
    matrices, grads = [(normal(30, 7, seed=1), 0)], [[normal(30, 7, seed=seed)] for seed in (2, 3)]
    results = [
        ranks.run(2, stepped, matrices, grads, (2,), {"power": 1.0, "strategy": strategy, "block_lr_ratio": 0.5})[0]
        for strategy in ("owner", "blocks")
    ]
    assert torch.equal(results[0][0][0], results[1][0][0])


def resumed(whole_steps: int, total: int) -> tuple[Tensor, int, list[str]]:
    """The parameter after `total` steps with a checkpoint on the way, the count in it, and collectives of the last."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = Parameter(cut(normal(20, 30, seed=1), mesh, [Shard(0)]))
    optimizer = Muon([p], **BLOCKS)
    saved = None
    for step in range(total):
        if step == whole_steps:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = Muon([p], **{**BLOCKS, "block_period": 1})
            optimizer.load_state_dict(saved)
        p.grad = cut(normal(20, 30, seed=10 + step), mesh, [Shard(0)])
        with traffic() as found:
            optimizer.step()
    assert saved is not None
    return p.detach().full_tensor(), saved["param_groups"][0]["step"], [name for name, _ in found]


@needs.cpu_kernels
def test_a_checkpoint_knows_when_the_next_whole_step_is(ranks: World) -> None:
    for stop in (2, 3):
        (a, steps, found), *_ = ranks.run(2, resumed, stop, 4)
        (b, *_), *_ = ranks.run(2, resumed, 1, 4)
        assert steps == stop
        assert torch.equal(a, b)
        assert found == ["all_to_all"] * 2


def copies(options: dict[str, Any]) -> tuple[Tensor, list[str]]:
    p = Parameter(normal(20, 30, seed=1))
    optimizer = Muon([p], process_group=dist.group.WORLD, **options)
    for seed in (2, 3):
        p.grad = normal(20, 30, seed=seed)
        with traffic() as found:
            optimizer.step()
    return p.detach(), [name for name, _ in found]


def test_copies_have_no_blocks(ranks: World) -> None:
    """Nor parts to sum: replicas share the work as ever."""
    results = [ranks.run(2, copies, {"strategy": strategy})[0] for strategy in ("owner", "gram", "blocks")]
    for p, found in results:
        assert torch.equal(p, results[0][0])
        assert found == ["all_gather"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"strategy": "ring"}, "strategy should be one of 'owner', 'gram', 'blocks' but is: 'ring'"),
        ({"strategy": None}, "strategy should be one of"),
        ({"block_period": 0}, "block_period should be an int >= 1 but is: 0"),
        ({"block_period": True}, "block_period should be an int >= 1 but is: True"),
        ({"block_period": 2.0}, "block_period should be an int >= 1 but is: 2.0"),
        ({"block_lr_ratio": -1.0}, "block_lr_ratio should be >= 0 but is: -1.0"),
    ],
    ids=str,
)
def test_options_that_there_are_not(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Muon([Parameter(torch.zeros(2, 2))], **options)
