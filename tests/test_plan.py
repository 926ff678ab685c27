"""The plan says what a step does: FLOPs and launches against formulas and against the calls that are made."""

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import needs
from torch import nn

from muon_kernels import COEFFICIENTS, Muon, MuonAdamW, Plan, SpectralAdam, backends, memory
from muon_kernels.backends import cuda
from muon_kernels.backends.gpu import fused_parts
from muon_kernels.coefficients import resolve
from muon_kernels.distributed import exchange
from muon_kernels.segments import segments
from muon_kernels.step.plan import Bucket, plan_for_shapes

SHAPES = [(16, 16), (24, 100), (48, 64), (33, 130), (64, 700), (1, 9)]
GPUS = ("cuda", "triton")
VERBS = ("momentum_update", "syrk", "syrkx", "gemm", "apply_update")


def make(shapes: list[tuple[int, ...]], **options: Any) -> tuple[list[nn.Parameter], Muon]:
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return params, Muon(params, **options)


def square(m: int, k: int, symmetric: bool) -> int:
    """FLOPs of an m x m product over k: m (m + 1) / 2 elements of k multiply-adds, or all m² of them."""
    return m * (m + 1) * k if symmetric else 2 * m * m * k


def standard_flops(backend: str, m: int, n: int, name: str) -> int:
    half = backends.get(backend).symmetric_products
    total = 0
    for _, _, c in resolve(name, None).triples:
        total += square(m, n, half) + 2 * m * m * n  # X Xᵀ; B X
        if c:
            total += square(m, m, half)  # A²
    return total


def gram_flops(backend: str, m: int, n: int, name: str) -> int:
    """By segments of s steps: one step is the standard one; else R = X Xᵀ, s S = p(R), s - 1 Q S, s - 1 R S², Q X."""
    ops, schedule = backends.get(backend), resolve(name, None)
    half = ops.symmetric_products
    small = square(m, m, half)
    total = 0
    for start, stop in segments(schedule, m, ops.precise_squares):
        steps = stop - start
        total += square(m, n, half) + 2 * m * m * n
        if steps == 1:
            total += small * (schedule.triples[start][2] != 0)
            continue
        total += steps * small + (steps - 1) * small + (steps - 1) * 2 * small
    return total


FLOPS: dict[str, Callable[[str, int, int, str], int]] = {"standard": standard_flops, "gram": gram_flops}


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("algorithm", FLOPS)
def test_flops(backend: str, algorithm: str, name: str) -> None:
    for m, n in SHAPES:
        _, muon = make([(m, n), (n, m)], ns_coefficients=name, ns_algorithm=algorithm, ns_steps=None, backend=backend)
        assert muon.plan().flops == 2 * FLOPS[algorithm](backend, m, n, name)


def test_flops_of_the_default_in_closed_form() -> None:
    m, n = 64, 200
    _, muon = make([(m, n)], ns_algorithm="standard", backend="eager")
    assert muon.plan().flops == 5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)
    if not backends.unavailable("cpu"):
        _, muon = make([(m, n)], ns_algorithm="standard", backend="cpu")
        assert muon.plan().flops == 5 * (m * (m + 1) * n + m * (m + 1) * m + 2 * m * m * n)


def test_auto_is_the_cheaper(backend: str) -> None:
    chosen = set()
    for m, n in [*SHAPES, (48, 48), (64, 64), (32, 40)]:
        _, muon = make([(m, n)], backend=backend)
        (bucket,) = muon.plan().buckets
        flops = {name: of(backend, m, n, "keller") for name, of in FLOPS.items()}
        if backends.get(backend).precise_squares:
            assert bucket.flops == min(flops.values()) == flops[bucket.algorithm]
        else:
            assert bucket.algorithm == "standard"  # Gram would be less accurate there
        chosen.add(bucket.algorithm)
    assert len(chosen) == 1 + backends.get(backend).precise_squares


@pytest.mark.parametrize("algorithm", ["standard", "gram", "auto"])
@pytest.mark.parametrize("name", ["keller", "cubic5", "polar_express", "deepseek_v4"])
def test_launches_are_the_calls_made(backend: str, name: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    module = backends.get(backend)

    def counted(verb: str) -> Callable[..., Any]:
        real = getattr(module, verb)
        return lambda *args, **options: calls.update([verb]) or real(*args, **options)

    for verb in VERBS:
        monkeypatch.setattr(module, verb, counted(verb))
    monkeypatch.setattr(module, "program", lambda run: run)  # which would not ask for products again
    shapes = [(20, 60), (60, 20), (5, 20, 60), (33, 40), (300, 256)]
    _, muon = make(
        shapes,
        ns_coefficients=name,
        ns_steps=None,
        ns_algorithm=algorithm,
        max_workspace_bytes=6 << 20,
        backend=backend,
    )
    for cap in (6 << 20, muon.plan().buckets[2].workspace_bytes):
        muon.param_groups[0]["max_workspace_bytes"] = cap
        muon.step()  # the first one is rehearsed
        calls.clear()
        muon.step()
        plan = muon.plan()
        assert calls.total() == plan.launches
        assert calls["momentum_update"] == calls["apply_update"] == sum(len(b.chunks) for b in plan.buckets)


@pytest.mark.parametrize(
    ("rows", "cols", "count", "parts", "triton"),
    [
        (64, 768, 144, 1, True),
        (64, 64, 1, 1, True),
        (16, 1024, 64, 1, True),
        (16, 1024, 1, 1, True),
        (64, 768, 12, 8, True),
        (64, 16384, 1, 43, False),
        (64, 16384, 8, 13, False),
        (64, 16384, 1000, 1, True),
        (128, 4096, 8, 13, False),
        (128, 4096, 60, 1, False),
        (128, 16384, 1, 0, False),
    ],
)
def test_few_wide_matrices_are_not_left_to_few_multiprocessors(
    rows: int, cols: int, count: int, parts: int, triton: bool
) -> None:
    """On cuda in so many parts, or not fused; on triton whole or not at all."""
    plans = {b: plan_for_shapes([(rows, cols, count)], device="cuda", backend=b, available=False) for b in GPUS}
    (divided,), (whole,) = (plans[b].buckets for b in GPUS)
    assert divided.fused * divided.parts == parts and (whole.fused, whole.parts) == (triton, 1)
    if parts > 1:
        assert divided.launches == 2 and divided.workspace_bytes == count * parts * cuda.partial_bytes(rows)
        assert f"{parts} parts, and the fused step into two launches" in str(plans["cuda"])
    elif parts:
        assert divided.launches == -(-count // cuda.FUSED_CAPACITY) and divided.workspace_bytes == 0


@pytest.mark.parametrize("rows", [1, 16, 64, 128])
def test_every_part_has_columns_and_a_multiprocessor(rows: int) -> None:
    for count in (1, 2, 7, 53, 54, 55, 108, 500):
        for cols in {rows, 33, 128, 129, 1000, 4097, 2**20 + 1}:
            parts, tiles = fused_parts(rows, cols, count), -(-cols // 32)
            assert parts == 1 or ((parts - 1) * -(-tiles // parts) < tiles and parts * count <= 108)


def test_parts_fit_into_the_workspace_that_there_may_be() -> None:
    each = cuda.partial_bytes(64)
    for cap, parts in ((12 * 8 * each, 8), (12 * 8 * each - 1, 6), (12 * each, 1), (1, 1)):
        options: dict[str, Any] = {"backend": "cuda", "available": False, "max_workspace_bytes": cap}
        (bucket,) = plan_for_shapes([(64, 768, 12)], device="cuda", **options).buckets
        assert bucket.fused and bucket.parts == parts and bucket.workspace_bytes <= cap


@needs.cpu_kernels
def test_a_fused_bucket_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = backends.get("cpu").fused_step
    monkeypatch.setattr(
        backends.get("cpu"), "fused_step", lambda *a, **k: (memory.rehearsing() or calls.append(0), real(*a, **k))
    )
    _, muon = make([(8, 20, 60), (20, 60)], backend="cpu")
    (bucket,) = muon.plan().buckets
    assert bucket.fused and bucket.chunks == (9,) and bucket.slots == 2
    assert bucket.bytes == 9 * 20 * 60 * 4 * 5  # no workspace goes to memory
    muon.step()
    assert len(calls) == muon.plan().launches == 1
    muon.param_groups[0]["max_workspace_bytes"] = bucket.workspace_bytes - 1
    assert not muon.plan().buckets[0].fused
    assert muon.plan().workspace_bytes < bucket.workspace_bytes


def test_chunks_multiply_launches_only(backend: str) -> None:
    _, muon = make([(7, 20, 60)], backend=backend)
    whole = muon.plan()
    muon.param_groups[0]["max_workspace_bytes"] = 3 * whole.workspace_bytes // 7
    cut = muon.plan()
    assert whole.buckets[0].chunks == (7,) and len(cut.buckets[0].chunks) == 3
    assert sum(cut.buckets[0].chunks) == 7 and cut.workspace_bytes == 3 * whole.workspace_bytes // 7
    assert (cut.launches, cut.flops, cut.bytes) == (3 * whole.launches, whole.flops, whole.bytes)


def test_buckets(backend: str) -> None:
    """Tall and wide, alone and stacked, matrices and convolutions, if they are of one size."""
    _, muon = make([(12, 36), (36, 12), (4, 12, 36), (2, 36, 12), (12, 4, 3, 3), (9, 9)], backend=backend)
    assert [(b.shape, b.count) for b in muon.plan().buckets] == [((12, 36), 9), ((9, 9), 1)]
    assert {b.backend for b in muon.plan().buckets} == {backend}

    params = [nn.Parameter(torch.ones(12, 36, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float32)]
    assert [b.count for b in Muon(params, backend=backend).plan().buckets] == [2, 1]  # dtypes do not mix
    groups = [{"params": [p]} for p in params]
    assert [b.count for b in Muon(groups, backend=backend).plan().buckets] == [2, 1]  # groups do, if they are alike
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
    assert [b.count for b in Muon(groups, backend=backend).plan().buckets] == [1, 1, 1]


@pytest.mark.parametrize(
    ("flatten", "expected"), [(None, ((20, 30), 6)), (False, ((20, 30), 6)), (True, ((6, 600), 1))]
)
def test_three_dimensions(flatten: bool | None, expected: tuple[tuple[int, int], int]) -> None:
    (bucket,) = make([(6, 20, 30)], flatten=flatten)[1].plan().buckets
    assert (bucket.shape, bucket.count) == expected


def test_bytes(backend: str) -> None:
    """Gradient read; momentum and parameter read and written; the bf16 workspace written and read."""
    for dtype, momentum, each in [
        (torch.float32, None, 4 + 2 * 4 + 2 * 4 + 2 * 2),
        (torch.bfloat16, None, 2 + 2 * 2 + 2 * 2 + 2 * 2),
        (torch.bfloat16, torch.float32, 2 + 2 * 4 + 2 * 2 + 2 * 2),
    ]:
        p = nn.Parameter(torch.ones(3, 20, 30, dtype=dtype))
        assert Muon([p], momentum_dtype=momentum, backend=backend).plan().bytes == 3 * 20 * 30 * each


def test_str_is_a_table(backend: str) -> None:
    _, muon = make([(20, 60), (60, 20), (9, 9), (3, 8, 400)], backend=backend)
    plan = muon.plan()
    lines = str(plan).splitlines()
    assert lines[len(lines) - len(plan.notes) :] == list(plan.notes)
    del lines[len(lines) - len(plan.notes) :]
    note = lines.pop()
    assert "a call of a kernel" in lines.pop()
    header, rows, total = lines[0], lines[2:-2], lines[-1]
    assert header.split() == "matrices algorithm backend launches FLOPs bytes moved workspace".split()
    assert "taller than wide" in note and "transpose" in note
    assert len(rows) == len(plan.buckets) == 3
    for row, bucket in zip(rows, plan.buckets, strict=True):
        assert row.startswith(f"{bucket.count} x {bucket.shape[0]}x{bucket.shape[1]}")
        assert row.split()[3:6] == [bucket.algorithm, backend, str(bucket.launches)]
    assert total.split()[:2] == ["total", str(plan.launches)]
    assert {len(line) for line in lines} == {len(header)}


def test_a_plan_without_matrices_says_so() -> None:
    optimizer = MuonAdamW([{"params": [nn.Parameter(torch.ones(3))], "use_muon": False}])
    assert str(optimizer.plan()) == str(Plan(())) == "nothing to do: Muon was given no matrix"
    assert Plan(()).workspace_bytes == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (7, "7 B"), (999, "999 B"), (1000, "1 kB"), (54_321, "54.3 kB"), (999_600, "1 MB"), (2.5e9, "2.5 GB")],
)
def test_small_models_have_figures_too(value: float, shown: str) -> None:
    bucket = Bucket(
        (1, 1), 1, "standard", 0.0, "eager", torch.bfloat16, False, (1,), 1, 1, value, value, value, 0, value
    )
    *_, total, _ = str(Plan((bucket,))).splitlines()
    assert total.endswith(shown) and total.count(shown) == 2
    assert shown.removesuffix("B").strip() in total.replace(shown, "")


def test_plan_only_looks(backend: str) -> None:
    params, muon = make([(20, 60), (3, 9, 9)], backend=backend)
    before = [p.detach().clone() for p in params]
    first = muon.plan()
    assert not muon.state and all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    muon.step()
    assert muon.plan() == first
    buffers = [muon.state[p]["momentum_buffer"].clone() for p in params]
    muon.plan()
    assert all(torch.equal(muon.state[p]["momentum_buffer"], b) for p, b in zip(params, buffers, strict=True))


@pytest.mark.parametrize("kind", [Muon, MuonAdamW, SpectralAdam], ids=lambda kind: kind.__name__)
def test_the_hosts_time_is_the_median_of_the_last_steps(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a step moves by its number of seconds, and a closure by an hour, which is not the step's."""
    p = nn.Parameter(torch.ones(4, 6))
    optimizer = kind([{"params": [p], "use_muon": True}]) if kind is MuonAdamW else kind([p])
    clock, steps, update = [0.0], [0], kind._update

    def closure() -> float:
        clock[0] += 3600.0
        p.grad = torch.ones_like(p)
        return 0.0

    def slow(self: Any) -> None:
        update(self)
        steps[0] += 1
        clock[0] += 100.0 if steps[0] == 2 else steps[0]

    monkeypatch.setattr(kind, "_update", slow)
    monkeypatch.setattr("muon_kernels.closures.perf_counter", lambda: clock[0])
    assert optimizer.plan().host_seconds is None and "host" not in str(optimizer.plan())
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.plan().host_seconds == 3.0
    assert "The host took 3000.00 ms for a step, the median of the last." in str(optimizer.plan())
    for _ in range(32):
        optimizer.step(closure)
    assert optimizer.plan().host_seconds == 19.5  # of steps 4 to 35
    assert copy.deepcopy(optimizer).plan().host_seconds is None
    with pytest.raises(ValueError, match="should be >= 0"):
        optimizer.param_groups[0]["lr"] = -1.0
        optimizer.step()
    assert len(optimizer._durations) == 32 and optimizer.host_seconds == 19.5


def test_a_plan_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the momentum that a first step would make, which is as large as the parameters."""
    made, zeros_like = [], torch.zeros_like

    def noted(*args: Any, **options: Any) -> torch.Tensor:
        t = zeros_like(*args, **options)
        made.append(weakref.ref(t))
        return t

    params, muon = make([(20, 60), (3, 9, 9)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", noted)
        muon.plan()
    assert len(made) == len(params) and not any(t() is not None for t in made)


def test_plan_for_shapes_is_the_optimizers(backend: str) -> None:
    _, muon = make([(20, 60), (60, 20), (3, 9, 9)], backend=backend)
    assert plan_for_shapes([(20, 60, 2), (9, 9, 3)], backend=backend) == muon.plan()


def test_a_step_is_settled_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = exchange.prepare
    monkeypatch.setattr(exchange, "prepare", lambda *args, **options: calls.append(1) or real(*args, **options))
    params, muon = make([(20, 60), (60, 20), (9, 9)], backend=backend)
    group = muon.param_groups[0]

    def prepared(**changed: Any) -> int:
        calls.clear()
        group.update(changed)
        muon.step()
        return len(calls)

    muon.init_state()  # settles what a step would
    assert len(calls) == 1
    assert prepared() == 0
    for p in params:  # another gradient of the same kind
        p.grad = p.grad.clone()
    assert prepared() == 0
    for changed in ({"lr": 0.5}, {"lr": torch.tensor(0.1)}, {"weight_decay": 0.0}, {"momentum": 0.1}, {"eps": 1e-5}):
        assert prepared(**changed) == 0, changed
    assert prepared(nesterov=False, maximize=True, dampened=False) == 0

    for changed in (
        {"ns_steps": 3},
        {"ns_coefficients": (2.0, -1.5, 0.5)},
        {"adjust_lr_fn": "spectral"},
        {"ns_algorithm": "standard"},
        {"max_workspace_bytes": 1 << 20},
    ):
        assert prepared(**changed) == 1, changed
        assert prepared() == 0
    params[1].grad = None
    assert prepared() == 1
    assert prepared() == 0
    params[1].grad = torch.ones(60, 20)
    assert prepared() == 1
    params[1].grad = torch.ones(20, 60).T
    assert prepared() == 1
    params[0].data = params[0].data.clone()
    assert prepared() == 1
    muon.state[params[0]]["momentum_buffer"] = torch.zeros(20, 60)
    assert prepared() == 1
    assert prepared() == 0


def test_a_plan_says_what_auto_could_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.get("cpu"), "unavailable", lambda: "it is gone; bring it back")
    p = nn.Parameter(torch.ones(3, 4))
    assert "cpu was not chosen: it is gone; bring it back" in str(Muon([p]).plan())
    assert "not chosen" not in str(Muon([p], backend="eager").plan())
    monkeypatch.undo()
    lacking = backends.unavailable("cpu")
    refused = f"cpu was not chosen: {lacking or 'expected float32'}"
    assert refused in str(plan_for_shapes([(3, 4, 1)], dtype=torch.float64))
    assert ("not chosen" in str(plan_for_shapes([(3, 4, 1)]))) == bool(lacking)
    if backends.unavailable("cuda"):
        assert f"cuda was not chosen: {backends.unavailable('cuda')}" in str(
            plan_for_shapes([(3, 4, 1)], device="cuda")
        )
