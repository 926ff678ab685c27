"""What bench/ measures with is right, as far as a machine without a GPU can tell."""

from __future__ import annotations

import types
from typing import Any

import bench_options
import bench_products
import bench_step
import measure
import pytest
import torch
from torch import nn

from muon_kernels import backends, reference
from muon_kernels.backends import cpu
from muon_kernels.cli.verify import steppers
from muon_kernels.coefficients import resolve


@pytest.mark.parametrize(("bytes_", "cache"), [(1, 0), (0, 7), (10, 49), (10, 50), (1000, 3), (40 << 20, 50 << 20)])
def test_a_ring_is_more_than_twice_the_cache(bytes_: int, cache: int) -> None:
    made: list[object] = []
    ring = measure.ring(lambda: made.append(object()) or made[-1], bytes_, cache)
    assert ring == made and max(bytes_, 1) * len(ring) > 2 * cache
    assert len(ring) == 1 or max(bytes_, 1) * (len(ring) - 1) <= 2 * cache


def test_a_pass_runs_every_call_in_turn() -> None:
    seen: list[int] = []
    run = measure.one_after_another([lambda i=i: seen.append(i) for i in range(3)], "cpu")
    assert measure.seconds(run, "cpu") > 0
    assert seen == [0, 1, 2]


def test_a_gpu_s_events_are_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append("event")

        def synchronize(self) -> None:
            queue.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.append("idle"))
    assert measure.seconds(lambda: queue.append("run"), "cuda") == 0.25
    assert queue == ["idle", "event", "run", "event", "wait"]


def assert_same_products(implementation: str, shape: tuple[int, int, int], device: str) -> None:
    """Of one and the same operands as torch's row."""
    results = []
    for name in (implementation, bench_products.TORCH):
        torch.manual_seed(0)
        calls = bench_products.calls(name, *shape, device)
        assert tuple(calls) == bench_products.PRODUCTS
        for call in calls.values():
            call.out.fill_(torch.nan)
        results.append(
            {product: (call.run(), call.out.to(torch.float32, copy=True))[1] for product, call in calls.items()}
        )
    for product, ours in results[0].items():
        torchs = results[1][product]
        # bf16's rounding, and the diagonals, a thousandth, which torch's do not have.
        assert float((ours - torchs).norm() / torchs.norm()) < 0.01, product


@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 70, 70)], ids=str)
def test_ours_and_torch_s_are_the_same_products(backend: str, shape: tuple[int, int, int]) -> None:
    assert_same_products(backend, shape, "cuda" if backend == "cuda" else "cpu")


def test_flops_are_of_the_triangle() -> None:
    assert [bench_products.flops(p, 3, 4, 5) for p in bench_products.PRODUCTS] == [3 * 20 * 5, 3 * 20 * 4, 3 * 2 * 80]


def test_percents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of each round's share, in which a slow round has a slow torch.matmul beside it."""
    rounds = [bench_products.Timed(*each) for each in ((2.0, 600.0), (1.0, 600.0), (4.0, 75.0))]
    monkeypatch.setattr(bench_products, "times", lambda *_: dict.fromkeys(bench_products.PRODUCTS, rounds))
    assert bench_products.percent("cpu", (3, 4, 5), "syrk", "cpu") == pytest.approx(100 * 300 / 1 / 600)


def test_rows_of_a_gpu_are_there_and_say_why_they_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {("cuda", "torch"), ("cuda", "cuda"), ("cuda", "triton")} <= {row[:2] for row in bench_products.ROWS}
    rows = {(device, name) for device, workload, name in bench_step.ROWS if workload == "GPT-2 124M, 12 layers"}
    others = {"torch.optim.Muon", "torch.optim.Muon, compiled", "batched loop, compiled"}
    assert {("cuda", name) for name in ("cuda", "triton", *others)} <= rows
    assert ("cpu", "GPT-2 124M, 2 of 12 layers", "torch, fp32") in bench_step.ROWS
    why = {"cuda": "no GPU; buy one", "triton": "no GPU either"}
    monkeypatch.setattr(backends, "unavailable", why.get)
    tests: list[tuple[Any, dict[str, Any]]] = [
        (bench_products.test_product, {"product": "syrk", "shape": (1, 8, 8)}),
        (bench_step.test_step, {"workload": "ragged"}),
    ]
    for test, options in tests:
        with pytest.raises(pytest.skip.Exception, match="cuda: no GPU; buy one; triton: no GPU either"):
            test(None, device="cuda", implementation="cuda", **options)


def test_implementations_step_what_they_are_given() -> None:
    params = measure.parameters([(6, 9, 2), (8, 4, 1)])
    for name, make in bench_step.implementations("cpu").items():
        copies = measure.copied(params, "cpu")
        assert all(torch.equal(p, c) and p.grad is not c.grad for p, c in zip(params, copies, strict=True))
        make(copies)()
        assert not any(torch.equal(p, c) for p, c in zip(params, copies, strict=True)), name
        assert all(isinstance(c, nn.Parameter) for c in copies)


def test_torch_s_batched_step_is_muon_s() -> None:
    params = measure.parameters([(6, 9, 2), (8, 4, 1)])
    copies = measure.copied(params, "cpu")
    bench_step.batched_step(copies)()
    for p, copy in zip(params, copies, strict=True):
        assert p.grad is not None
        direction = p.grad.double() * (0.05 + 0.95 * 0.05)
        update = reference.newton_schulz(direction, resolve("keller", 5).triples)
        ratio = max(1, p.shape[0] / p.shape[1]) ** 0.5
        torch.testing.assert_close(copy.double(), (1 - 1e-4) * p.double() - 1e-3 * ratio * update, rtol=0, atol=1e-6)


def test_a_table_compares_with_both_of_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_step.BY_DEVICE, "cpu", {"one": [(8, 16, 1)], "two": [(16, 8, 3)]})
    of_ours = {"one": 0.5, "two": 0.125}
    taken = {
        bench_step.TORCH: [4.0, 9.0, 1.0],
        bench_step.BATCHED: [1.0] * 3,
        "reference": [8.0] * 3,
        "eager": [4.0] * 3,
    }
    monkeypatch.setattr(bench_step, "times", lambda workload, device: {**taken, "cpu": [of_ours[workload]]})
    monkeypatch.setattr(bench_step.measure, "measured_peak", lambda device: 1e6)
    monkeypatch.setattr(bench_step.measure, "own", lambda device: ["cpu", "eager"])
    monkeypatch.setattr(cpu, "unavailable", lambda: None)  # the plan of a processor with kernels
    _, _, one, two, mean = bench_step.table("cpu").splitlines()
    assert "| 4000.0 | 1000.0 | 8000.0 | 500.0 | 4000.0 | **8.00** | **2.00** |" in one
    assert "| **32.00** | **8.00** |" in two and "| **16.00** | **4.00** |" in mean


def test_a_gpu_s_table_has_both_times_and_leaves_out_what_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the GPU: steps on the processor, graphs that are calls, of which one cannot be captured."""
    shapes = [(8, 16, 1), (16, 8, 2)]
    monkeypatch.setitem(bench_step.BY_DEVICE, "cuda", {"tiny": shapes})
    rivals = {**steppers.rivals("eager"), "broken": lambda params: lambda: params[99]}
    monkeypatch.setattr(steppers, "rivals", lambda: rivals)
    monkeypatch.setattr(measure, "own", lambda device: ["eager"])
    monkeypatch.setattr(measure, "copied", lambda params, device, real=measure.copied: real(params, "cpu"))
    monkeypatch.setattr(measure, "flusher", lambda device: None)
    monkeypatch.setattr(measure, "turns", lambda runs, *_, **__: {name: [0.004] for name in runs})
    monkeypatch.setattr(measure, "in_turns", lambda runs, *_, **__: {name: 0.002 for name in runs})
    monkeypatch.setattr(measure, "measured_peak", lambda device: 1e9)
    monkeypatch.setattr(bench_step, "plan_for_shapes", lambda *_, **__: types.SimpleNamespace(flops=1e6))
    captured: list[object] = []

    def one_after_another(calls: Any, device: str) -> Any:
        captured.append(calls)
        if len(captured) == 1:
            raise RuntimeError("torch's step is not to be captured")
        return calls[0]

    monkeypatch.setattr(measure, "one_after_another", one_after_another)
    with pytest.warns(UserWarning, match=r"broken: list index out of range|cannot be captured"):
        heading, _, line, _ = bench_step.table("cuda").splitlines()
    assert "eager: times faster than torch.optim.Muon | than batched loop, compiled" in heading
    assert line == (
        "| tiny | 4.000 (nan) | 4.000 (2.000) | 4.000 (2.000) | nan (nan) | 4.000 (2.000) | **1.00** | **1.00** | 25 |"
    )
    for function in (bench_step.steps, bench_step.times, bench_step.replays):
        function.cache_clear()


@pytest.mark.parametrize("isa", cpu.instruction_sets())
def test_percents_are_of_what_an_instruction_set_multiplies(isa: str) -> None:
    with cpu.forced(isa):
        assert measure.peak_dtype("cpu") == (torch.bfloat16 if isa in ("amx", "avx512bf16") else torch.float32)
    assert measure.peak_dtype("cuda") == torch.bfloat16


def test_options_are_measured_beside_a_step_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same parameters; the median of pairs, which a busy moment does not move."""
    monkeypatch.setitem(bench_options.WORKLOADS, "tiny", [(6, 9, 2), (8, 4, 1)])
    for option, options in bench_options.OPTIONS.items():
        without, with_ = bench_options.times.__wrapped__("tiny", option)
        assert len(without) == len(with_) == bench_options.ROUNDS
        dtype = torch.bfloat16 if {"stochastic_rounding", "master_weights"} & set(options) else torch.float32
        muon = bench_options.optimizer("tiny", dtype, **options)
        assert all(p.dtype == dtype and muon.state[p] for p in muon.param_groups[0]["params"])
    monkeypatch.setattr(bench_options, "times", lambda *_: ([1.0, 9.0, 2.0], [1.1, 9.0, 2.4]))
    assert bench_options.cost("tiny", "cautious") == pytest.approx(10)
    assert len(bench_options.LARGE) == 2
