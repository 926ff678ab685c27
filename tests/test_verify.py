"""`python -m muon_kernels verify` on a processor: its checks have teeth, its stages run, and it says what it found."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checks import needs
from torch import Tensor, nn

from muon_kernels import Muon, backends, options
from muon_kernels.backends import cpu, cuda, eager
from muon_kernels.backends.gpu import fused_parts
from muon_kernels.checks import Wrong, agree, products, steps, within
from muon_kernels.cli import main, verify
from muon_kernels.cli.verify import correct, emulation, facts, models, report, steppers, sweeps, timing, tools, traces
from muon_kernels.cli.verify import exercise as exercises
from muon_kernels.cli.verify.runner import Record, Runner
from muon_kernels.cli.verify.stage import Context, Place, Result, Skipped, Stage
from muon_kernels.cli.verify.stages import STAGES
from muon_kernels.cli.verify.workloads import CPU, FULL, TINY, WORKLOADS

HERE = Place("cpu", "cpu", ("eager",))
SMALL = TINY._replace(biased=(), zoo=(("keller", (24, 40)),))


class Where(NamedTuple):
    backend: str
    device: str = "cpu"
    capture: Any = None
    replay: Any = None


# Checks of products: each fault of a product is noticed by the check that is there for it.


def sound(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    """A product that is right: float64, rounded once."""
    get = lambda name, default: default if options.get(name) is None else options[name]
    values = {name: t.double() for name, t in options.items() if name[1:] == "_diagonal" and t is not None}
    square = lambda t, name: t.double() + (values[name].diag_embed() if name in values else 0)
    A = square(a, "a_diagonal")
    B = square(b, "b_diagonal")
    C = get("c", None)
    sums = get("alpha", 1.0) * (A @ (B.mT if get("b_transposed", False) else B))
    if C is not None:
        sums = sums + get("beta", 0.0) * square(C, "c_diagonal" if C is not a else "a_diagonal")
    if get("gamma", 0.0):
        sums = sums + get("gamma", 0.0) * torch.eye(sums.shape[-1])
    scale = get("scale", None)
    if scale is not None:
        sums = sums * (scale**2 if get("b_transposed", False) else scale)[:, None, None]
    if get("symmetric", False):
        sums = sums.tril() + sums.tril(-1).mT
    out.copy_(sums)
    if (of_out := options.get("out_diagonal")) is not None:
        of_out.copy_(sums.diagonal(dim1=1, dim2=2) - out.double().diagonal(dim1=1, dim2=2))


def last_column_lost(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    a = a.clone()
    a[..., -1:] = 0
    sound(a, b, out, **options)


def written_beside(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    sound(a, b, out, **options)
    out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()


def not_symmetric(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    sound(a, b, out, **{**options, "symmetric": False})


def addend_lost(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    sound(a, b, out, **{**options, "c": None})


def corrections_lost(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    sound(a, b, out, **{**options, "a_diagonal": None, "b_diagonal": None} if "a_diagonal" in options else options)


def nan_everywhere(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    sound(a, b, out, **options)
    out.fill_(torch.nan if out.isnan().any() else 1.0)


def nan_lost(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    sound(a.nan_to_num(), b.nan_to_num(), out, **options)


def rounded_twice(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    sound(a, b, out, **options)
    out.mul_(1 + 2**-7)


def truncated(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
    sound(a, b, out, **options)
    options["out_diagonal"].add_(-(2**-10))


EXACT = lambda run: products.any_shape(run, 2, 20, 24)
ROUNDED = lambda run: products.one_rounding(run, 1, 20, 24)
TEETH: list[tuple[Callable[[products.Run], object], Any, str]] = [
    (EXACT, last_column_lost, "X Xᵀ: .* differ; at .* expected"),
    (EXACT, written_beside, "beside the result"),
    (EXACT, addend_lost, "A X - 4 C"),
    (ROUNDED, rounded_twice, "are out of bounds"),
    (ROUNDED, addend_lost, "are out of bounds"),
    (lambda run: products.roughly(run, 1, 20, 24), last_column_lost, "are out of bounds"),
    (lambda run: products.roughly(run, 1, 20, 24), written_beside, "beside the result"),
    (products.result_is_symmetric, not_symmetric, "its transpose"),
    (products.result_is_symmetric, rounded_twice, "lower triangle"),
    (lambda run: products.parts_of_squares(run, 17, 2, torch.bfloat16), corrections_lost, "A B"),
    (lambda run: products.precise_squares(run, 17), corrections_lost, "diagonal of R"),
    (lambda run: products.one_less_aligned(run, "a", 8), last_column_lost, "a at 8 bytes"),
    (products.odd_distance_of_matrices, last_column_lost, "A X"),
    (lambda run: products.without_columns(run, 5), addend_lost, "2 C"),
    (products.nan_stays_in_its_matrix, nan_everywhere, "in other matrices"),
    (products.nan_stays_in_its_matrix, nan_lost, "is lost"),
    (lambda run: products.diagonal_bias(run, 8, 256), truncated, "expected errors up to 80"),
]


@pytest.mark.parametrize(("check", "fault", "says"), TEETH, ids=[f"{i}-{t[1].__name__}" for i, t in enumerate(TEETH)])
def test_checks_of_products_have_teeth(check: Callable[[products.Run], object], fault: Any, says: str) -> None:
    torch.manual_seed(0)
    check(products.twice(sound) if "diagonal_bias" not in check.__code__.co_names else sound)
    with pytest.raises(Wrong, match=says):
        check(fault)


def test_a_product_that_differs_the_second_time_is_noticed() -> None:
    made: list[int] = []

    def run(a: Tensor, b: Tensor, out: Tensor, **options: Any) -> None:
        out.fill_(len(made))
        made.append(0)

    with pytest.raises(Wrong, match="other bits"):
        products.twice(run)(*(torch.zeros(1, 2, 2) for _ in range(3)))
    kept = lambda a, b, out, **_: None  # what is not written would be right from the first time
    with pytest.raises(Wrong, match="other bits"):
        products.twice(kept)(*(torch.ones(1, 2, 2) for _ in range(3)))


def test_errors_name_the_first_place() -> None:
    right = torch.zeros(2, 3)
    agree(right, right, "all")
    with pytest.raises(Wrong, match=r"sums: 2 of 6 differ; at \(0, 1\) expected 0, got nan"):
        agree(torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 1.0]]), right, "sums")
    within(right + 0.5, right, 0.5, "all")
    with pytest.raises(Wrong, match=r"sums: 1 of 6 are out of bounds; at \(1, 2\) expected 0 ± 0.5, got 1"):
        within(torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 1.0]]), right, 0.5, "sums")
    with pytest.raises(Wrong, match="got nan"):
        within(right * math.nan, right, torch.ones(2, 3), "sums")


# Checks of steps.

STEPS: dict[str, Callable[[Where], object]] = {
    "exact": lambda where: steps.steps_are_exact(where, SMALL.steps),
    "bf16": lambda where: steps.steps_are_exact(where, SMALL.steps, dtype=torch.bfloat16),
    "huge": lambda where: steps.steps_are_exact(where, SMALL.steps, factor=1e30, steps=1),
    "tiny": lambda where: steps.steps_are_exact(where, SMALL.steps, factor=1e-30, steps=1),
    "strided": lambda where: steps.steps_are_exact(where, SMALL.steps, strided=True, steps=1),
    "momentum": lambda where: steps.momentum_is_torchs(where, SMALL.steps),
    "zero and NaN": lambda where: steps.zero_and_nan(where, (24, 40)),
    "lr": lambda where: steps.lr_on_the_device(where, SMALL.steps),
    "zoo": lambda where: steps.zoo(where, "keller", (24, 40)),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_right(backend: str, name: str) -> None:
    STEPS[name](Where(backend))


def spoil(monkeypatch: pytest.MonkeyPatch, verb: str, change: Callable[[Any], None], before: bool = False) -> None:
    """Let eager's verb do more than it should."""
    real = getattr(eager, verb)

    def spoilt(args: Any, *rest: Any) -> Any:
        if before:
            change(args)
        out = real(args, *rest)
        if not before:
            change(args)
        return out

    monkeypatch.setattr(eager, verb, spoilt)


# What a verb may get wrong, and which of the checks notice.
FAULTS: dict[str, tuple[str, Callable[[Any], None], bool, str]] = {
    "momentum: an ulp": ("momentum_update", lambda a: a.momentum[0].tensor.mul_(1 + 2**-22), False, "momentum"),
    "update: 20 % more": ("apply_update", lambda a: a.x.mul_(1.2), True, "exact"),
    "update: 20 % more, of bf16": ("apply_update", lambda a: a.x.mul_(1.2), True, "bf16"),
    "update: nothing": ("apply_update", lambda a: a.x.zero_(), True, "huge"),
    "update: nothing, of little": ("apply_update", lambda a: a.x.zero_(), True, "tiny"),
    "update: of others": ("apply_update", lambda a: a.x.copy_(a.x.flip(0, 1)), True, "strided"),
    "update: NaN for all": ("apply_update", lambda a: a.x.add_(a.x.sum() * 0), True, "zero and NaN"),
    "update: NaN for the last": ("apply_update", lambda a: a.x[-1].add_(a.x.sum() * 0), True, "zero and NaN"),
    "update: no zero": ("apply_update", lambda a: a.x.add_(0.01), True, "zero and NaN"),
    "update: NaN lost": ("apply_update", lambda a: a.x.nan_to_num_(), True, "zero and NaN"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_checks_of_steps_have_teeth(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    verb, change, before, check = FAULTS[name]
    spoil(monkeypatch, verb, change, before)
    with pytest.raises(Wrong):
        STEPS[check](Where("eager"))


def test_a_learning_rate_that_only_a_number_can_be_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "on_host", lambda value: not isinstance(value, Tensor))
    spoil(monkeypatch, "apply_update", lambda a: a.x.mul_(2 if isinstance(a.lr, Tensor) else 1), True)
    with pytest.raises(Wrong, match="with a tensor, and with a number"):
        STEPS["lr"](Where("eager"))


def test_the_zoo_says_which_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "orthogonalize", lambda G, *_, **__: G)
    with pytest.raises(Wrong, match=r"flat: 0\.\d+, torch 0\.\d+; .*one large"):
        steps.zoo(Where("eager"), "keller", (24, 40))


class Recorded:
    """What stands in for a graph: steps within `capture` are kept, and done by `replay`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: str = "") -> None:
        self.fault, self.kept, self.capturing = fault, [], False
        real = Muon.step

        def step(muon: Muon) -> None:
            if self.capturing:
                torch.empty(1)
                self.kept.append(muon)
            else:
                real(muon)

        monkeypatch.setattr(Muon, "step", step)
        self.where = Where("eager", "cpu", self.capture, self.replay)

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False
        if self.fault == "runs while it is captured":  # here, where nobody looks whether the host waits
            self.replay()

    def replay(self) -> None:
        for muon in self.kept if self.fault != "replays nothing" else ():
            muon.step()


@pytest.mark.parametrize("check", [steps.captured_steps_replay, steps.replays_after_growth])
@pytest.mark.parametrize("fault", ["", "replays nothing", "runs while it is captured"])
def test_replays_are_compared(monkeypatch: pytest.MonkeyPatch, check: Any, fault: str) -> None:
    where = Recorded(monkeypatch, fault).where
    more = {"bytes_": 64, "larger": (136, 140)} if check is steps.replays_after_growth else {}
    ran = fault == "runs while it is captured" and check is steps.captured_steps_replay
    with pytest.raises(Wrong, match="also ran" if ran else "") if fault else nullcontext():
        check(where, SMALL.steps, **more)


def test_foreign_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    taken: list[Tensor] = []
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *a, **k: taken.append(full(*a, **k)) or taken[-1])
    where = recorded.where._replace(replay=lambda: (recorded.replay(), taken[-1].zero_()))
    with pytest.raises(Wrong, match="others have allocated"):
        steps.replays_after_growth(where, SMALL.steps, (136, 140), 64)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def test_streams_are_compared(monkeypatch: pytest.MonkeyPatch, streams: None) -> None:
    steps.on_a_side_stream(Where("eager"), SMALL.steps)
    made: list[float] = []
    spoil(monkeypatch, "apply_update", lambda a: a.x.mul_(1 + len(made)) if made.append(0) is None else None, True)
    with pytest.raises(Wrong, match="side stream"):
        steps.on_a_side_stream(Where("eager"), SMALL.steps)


# The command.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of the executor, on the processor."""
    monkeypatch.setattr("muon_kernels.cli.verify.workloads.CPU", SMALL)


@needs.cpu_kernels
def test_verify_on_a_processor(tmp_path: Path, capsys: pytest.CaptureFixture[str], small: None) -> None:
    file = tmp_path / "found.json"
    assert main(["verify", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "there is no GPU here" in out and "all right" in out and f"all of it: {file}" in out
    assert "nothing is wrong in what was run: facts, products, steps" in out
    found = json.loads(file.read_text())
    assert {stage["name"]: stage["status"] for stage in found["stages"]} == {
        stage.name: "ok" if stage.name in ("facts", "products", "steps") else "needs a GPU" for stage in STAGES
    }
    assert not found["wrong"] and found["place"] == "cpu"
    of_products, of_steps = (found["stages"][i]["data"] for i in (2, 3))
    native = {f"cpu, {isa}, bf16" for isa in cpu.instruction_sets()}
    assert of_products["cases by implementation"].keys() == {*native, "eager, bf16", "eager, f16"}
    assert of_products["checks"] > 15 and of_steps["checks"] > 15
    assert not of_products["left out"] and not of_steps["left out"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_wrong_kernel_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], small: None
) -> None:
    gemm = eager.gemm
    monkeypatch.setattr(eager, "gemm", lambda A, X, **k: gemm(A, X, **{**k, "alpha": 1.1}))
    monkeypatch.setattr(verify, "_here", lambda: nullcontext(HERE))
    file = tmp_path / "found.json"
    assert main(["verify", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "something is wrong: products" in out
    assert "products: eager, bf16: roughly, 2 of 24x40, 16 bytes: A X: " in out
    found = json.loads(file.read_text())
    assert found["wrong"] and found["stages"][2]["status"] == "WRONG" and found["stages"][2]["wrong"]


@pytest.mark.parametrize("minutes", ["0", "-1", "inf", "nan", "soon"])
def test_minutes_that_cannot_be(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["verify", "--minutes", minutes])
    assert exit_.value.code == 2
    assert f"--minutes: should be a number of minutes > 0 but is: {minutes}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing/found.json", "folder"])
def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Known before anything is run."""
    (tmp_path / "folder").mkdir()
    assert main(["verify", "--json", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert "--json should be a file that can be written, in a folder that is there, but is: " in captured.err
    assert "facts" not in captured.out and list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_emulated_needs_the_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(emulation, "missing", lambda real=emulation.missing: real(tmp_path))
    assert main(["verify", "--emulated"]) == 2
    assert f"needs tools/ptx beside the package, but {tmp_path} has none" in capsys.readouterr().err


def test_emulated_needs_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "needs nvcc on PATH" in str(emulation.missing())


def test_the_executor_leaves_the_backend_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error, or Ctrl-C."""
    runtime = types.SimpleNamespace(
        options=lambda any_memory: nullcontext(), capture=nullcontext, replay=lambda: 1, pretend=lambda *_: None
    )
    monkeypatch.setattr(emulation, "build", lambda: (None, runtime))
    before = cuda._device, options.on_host
    with pytest.raises(KeyboardInterrupt), emulation.place() as place:
        assert isinstance(cuda._device, emulation.OnTheCpu) and not options.on_host(torch.zeros(1))
        assert place.graph is not None
        with pytest.raises(RuntimeError, match="CUDA error 1"):
            place.graph().replay()
        raise KeyboardInterrupt
    assert (cuda._device, options.on_host) == before


def test_the_command_says_what_a_gpu_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "unavailable", lambda name: "no" if name == "triton" else None)
    monkeypatch.setattr("muon_kernels.backends.cuda.refuses", lambda *_: None)
    with verify._here() as place:
        assert place[:3] == ("gpu", "cuda", ("cuda", "eager")) and place.graph is not None
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: "replayed"))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: ("capture of", graph.replay()))
        graph = place.graph()
        assert graph.capture() == ("capture of", "replayed") and graph.replay() == "replayed"  # type: ignore[comparison-overlap]


# The runner.


def stage(name: str, run: Callable[[Context], Result], seconds: float = 1.0, **options: bool) -> Stage:
    return Stage(name, seconds, f"{name}?", run, **{"timed": False, **options})


FINE = lambda context: Result("fine", {"value": 1})


def statuses(runner: Runner) -> dict[str, str]:
    return {record.name: record.status for record in runner.records}


GPU = Place("gpu", "cuda", ())


@pytest.fixture
def gpu_lives(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A GPU that is lost when a test says so."""
    state = {"lost": False}
    monkeypatch.setattr("muon_kernels.cli.verify.runner.lost", lambda place: state["lost"])
    return state


def test_what_fails_is_kept_and_the_rest_goes_on(gpu_lives: dict[str, bool]) -> None:
    def fails(context: Context) -> Result:
        raise ValueError("no luck\nat all")

    def skips(context: Context) -> Result:
        raise Skipped("no tool")

    def looks(context: Context) -> Result:
        assert context.found["first"] == {"value": 1}
        return Result("", {})

    all_ = [
        stage("first", FINE),
        stage("fails", fails, timed=True),
        stage("skips", skips),
        stage("last", looks, timed=True),
    ]
    runner = Runner(all_, GPU, TINY, 60.0)
    assert not runner.run() and runner.bad
    assert statuses(runner) == {"first": "ok", "fails": "FAILED", "skips": "skipped", "last": "ok"}
    assert runner.records[1].summary == "ValueError: no luck" and runner.records[2].summary == "no tool"


def test_after_wrong_results_nothing_is_timed(gpu_lives: dict[str, bool]) -> None:
    wrong = lambda context: Result("one wrong", {}, ("it",))
    all_ = [
        stage("products", wrong, decides=True),
        stage("steps", FINE, decides=True),
        stage("times", FINE, timed=True),
        stage("sanitizer", FINE, timed=True, apart=True, explains=True),
        stage("ncu", FINE, timed=True, apart=True),
    ]
    runner = Runner(all_, GPU, TINY, 60.0)
    assert not runner.run() and runner.bad
    assert statuses(runner) == {
        "products": "WRONG",
        "steps": "ok",
        "times": "not run",
        "sanitizer": "ok",
        "ncu": "not run",
    }
    assert runner.records[2].summary == "products are wrong"
    runner = Runner(all_, GPU, TINY, 60.0, anyway=True)
    assert not runner.run() and runner.bad
    assert list(statuses(runner).values()) == ["WRONG", "ok", "ok", "ok", "ok"]


def test_a_lost_gpu_ends_what_needs_it(gpu_lives: dict[str, bool]) -> None:
    def loses(context: Context) -> Result:
        gpu_lives["lost"] = True
        raise RuntimeError("an illegal memory access")

    explains = stage("c", FINE, timed=True, apart=True, explains=True)
    all_ = [stage("a", loses, timed=True), stage("b", FINE, timed=True), explains]
    runner = Runner(all_, GPU, TINY, 60.0)
    runner.run()
    assert statuses(runner) == {"a": "FAILED", "b": "not run", "c": "ok"}
    assert runner.records[1].summary == "a lost the GPU"


def test_whether_a_gpu_is_lost_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not correct.lost(HERE)

    def fails() -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert correct.lost(GPU)


def test_every_stage_has_its_share_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shares: list[float] = []

    def takes(seconds: float) -> Callable[[Context], Result]:
        def run(context: Context) -> Result:
            shares.append(context.left())
            now[0] += seconds
            return Result("", {})

        return run

    all_ = [
        stage("a", takes(10.0), 1.0),
        stage("timed", takes(1e9), 5.0, timed=True),  # which a processor does not run
        stage("b", takes(30.0), 1.0),
        stage("c", takes(0.0), 2.0),
    ]
    Runner(all_, HERE, TINY, 40.0).run()
    assert shares == pytest.approx([10.0, 10.0, 0.0])
    shares.clear()
    Runner(all_[:3], Place("executor", "cpu", ()), TINY, 25.0).run()
    assert shares[0] == pytest.approx(10.0), "what is timed nowhere needs little"


def test_the_file_is_complete_after_every_stage(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    seen = []

    def looks(context: Context) -> Result:
        seen.append({each["name"]: each["status"] for each in json.loads(file.read_text())["stages"]})
        return Result("", {"a number": math.nan, 3: [math.inf, 1.5]})

    runner = Runner([stage("a", looks), stage("b", looks)], HERE, TINY, 1.0, file, about={"place": "cpu"})
    runner.write()
    runner.run()
    assert seen == [{"a": "not run", "b": "not run"}, {"a": "ok", "b": "not run"}]
    found = json.loads(file.read_text())
    assert found["place"] == "cpu" and found["stages"][1]["data"] == {"a number": None, "3": [None, 1.5]}


def test_ctrl_c_shows_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(context: Context) -> Result:
        raise KeyboardInterrupt

    all_ = (stage("facts", FINE), stage("steps", stops), stage("models", FINE))
    monkeypatch.setattr("muon_kernels.cli.verify.stages.STAGES", all_)
    file = tmp_path / "found.json"
    assert main(["verify", "--json", str(file)]) == 130
    out = capsys.readouterr().out
    assert "by Ctrl-C" in out and "nothing is wrong in what was run: facts" in out
    found = json.loads(file.read_text())
    assert [each["status"] for each in found["stages"]] == ["ok", "stopped", "not run"]


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu_lives: dict[str, bool]) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("muon_kernels.cli.verify.runner._PATIENCE", 0.0)
    file = tmp_path / "found.json"
    said = []

    def hangs(context: Context) -> Result:
        for _ in range(1000):
            if not ended:
                time.sleep(0.01)
        said.append(json.loads(file.read_text())["stages"][0])
        return Result("", {})

    Runner([stage("a", hangs)], GPU, TINY, 0.01, file).run()
    assert ended == [1] and said
    assert (said[0]["status"], said[0]["summary"]) == ("FAILED", "it hangs; the process was ended")


def test_stages_that_are_rehearsed_show_no_times() -> None:
    all_ = [stage("times", FINE, timed=True), stage("ncu", FINE, timed=True, apart=True)]
    runner = Runner(all_, Place("executor", "cpu", ()), TINY, 1.0)
    runner.run()
    assert (
        statuses(runner) == {"times": "rehearsed", "ncu": "needs a GPU"}
        and runner.records[0].summary == ""
        and not runner.bad
    )


def test_kernels_that_were_checked_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = [traces.Ran(name, 0, 1) for name in ("product_b", "fill", "product_a", "product_b")]
    monkeypatch.setattr(correct, "profiled", lambda step, device: step() or ran)
    context = Context(HERE, TINY)
    assert correct._kernels_of(context, "eager") == ["product_a", "product_b"]

    def fails(step: Any, device: str) -> None:
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(correct, "profiled", fails)
    assert correct._kernels_of(context, "eager") == ["not known: RuntimeError: no CUPTI"]


def test_cases_that_there_is_no_time_for_are_said() -> None:
    context = Context(HERE, TINY)
    cases = [correct.Case("a", lambda: setattr(context, "end", -math.inf)), correct.Case("b", lambda: None)]
    result = correct.judged(cases, context, {})
    assert result.summary == "1 of 2 checks, all right; no time for the others" and result.data["left out"] == ["b"]
    record = Record(2, "products", "?", "ok", data=result.data)
    assert report.verdict([record]).endswith(": products; 1 checks had no time, give more --minutes")


def test_what_was_not_checked_at_all_is_not_called_right() -> None:
    context = Context(HERE, TINY, end=-math.inf)
    with pytest.raises(RuntimeError, match="no time for one of 1 checks; give more --minutes"):
        correct.judged([correct.Case("a", lambda: None)], context, {})


def test_an_error_is_wrong_too_and_a_lost_gpu_ends_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("a launch failed")

    cases = [correct.Case("a", fails), correct.Case("b", lambda: None)]
    result = correct.judged(cases, Context(HERE, TINY), {})
    assert result.wrong == ("a: RuntimeError: a launch failed",) and result.data["checks"] == 2
    monkeypatch.setattr(correct, "lost", lambda place: True)
    with pytest.raises(RuntimeError, match="a launch failed; the GPU answers nothing after that"):
        correct.judged(cases, Context(GPU, TINY), {})


# Times.


def test_a_line_is_fitted() -> None:
    assert timing.fit({k: 3.0 + 0.25 * k for k in (64, 256, 4096)}) == pytest.approx((3.0, 0.25))


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are run once, the GPU is made warm, then all take turns; the cache is emptied before each."""
    seen: list[str] = []
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(timing, "_last", -math.inf)
    monkeypatch.setattr(timing, "spin", lambda device: seen.append("spin"))
    times = iter([3.0, 30.0, 1.0, 10.0, 2.0, 20.0, *[1.0] * 6])

    def time_(run: timing.Run, device: str, before: timing.Run | None) -> float:
        assert before is not None
        before()
        run()
        return next(times)

    runs = {name: lambda name=name: seen.append(name) for name in "ab"}
    empty = lambda: seen.append("-")
    assert timing.in_turns(runs, "cuda", 3, before=empty, time_=time_) == {"a": 2.0, "b": 20.0}
    assert "".join(each[0] for each in seen) == "ab" + "s" + 3 * "-a-b"
    seen.clear()
    times = iter([1.0] * 8)
    now[0] = 0.1  # it is warm still
    timing.in_turns(runs, "cuda", 9, lambda: 0.0, empty, time_)
    assert "s" not in "".join(seen) and len(seen) == 2 + 3 * 4, "no time is left: as many as a median needs"


def test_a_gpu_is_kept_busy_until_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    now, multiplied = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.ones(2, 2))
    monkeypatch.setattr(torch, "matmul", lambda a, b: multiplied.append(now[0]))

    def waits() -> None:
        now[0] += 0.07

    monkeypatch.setattr(torch.cuda, "synchronize", waits)
    timing.spin("cuda")
    assert now[0] >= 0.3 and len(multiplied) == 5
    timing.spin("cpu")
    assert len(multiplied) == 5


def test_wall_is_from_idle_to_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def waits() -> None:
        now[0] += 1.0
        seen.append("wait")

    def runs() -> None:
        now[0] += 0.25
        seen.append("run")

    monkeypatch.setattr(torch.cuda, "synchronize", waits)
    assert timing.wall(runs, "cuda", lambda: seen.append("flush")) == 1.25
    assert seen == ["flush", "wait", "run", "wait"]
    assert timing.wall(runs, "cpu") == 0.25


def test_calls_are_captured(monkeypatch: pytest.MonkeyPatch, streams: None) -> None:
    """After they have run once, beside the graph."""
    seen: list[str] = []

    @contextmanager
    def graph(of: Any) -> Iterator[None]:
        seen.append("capture")
        yield
        seen.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: seen.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    replay = timing.repeated(lambda: seen.append("run"), 2, "cuda")
    replay()
    assert seen == ["run", "run", "capture", "run", "run", "captured", "replay"]


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    return tmp_path


def test_clocks_are_nvidia_smi_s(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="12-34"))
    assert timing.clocks("cuda") == {} == timing.clocks("cpu")
    tool(
        path,
        "nvidia-smi",
        "import sys\nassert '--id=GPU-12-34' in sys.argv\nprint('1980 MHz, 3201 MHz, 40, 70 W, 700 W, 575.1')",
    )
    found = timing.clocks("cuda")
    assert found["clocks.sm"] == "1980 MHz" and found["driver_version"] == "575.1"
    tool(path, "nvidia-smi", "raise SystemExit(1)")
    assert timing.clocks("cuda") == {}


# Stages that time things, on a processor, of which nothing but the code is tried.


@pytest.fixture
def context() -> Context:
    return Context(HERE._replace(backends=("cpu", "eager")) if cpu.instruction_sets() else HERE, TINY)


def test_ceilings(context: Context) -> None:
    data = facts.ceilings(context).data
    context.found["ceilings"] = data
    assert set(data["matmul, FLOP/s"]) == {"16³", "2 of 16³"} and data["launch, us"] > 0 and data["graph node, us"] > 0
    assert facts.peaks(context) == (max(data["matmul, FLOP/s"].values()), data["copy, B/s"])
    assert facts.peaks(Context(HERE, TINY)) == (math.inf, math.inf)


def test_rates_are_of_flops_and_bytes(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy reads and writes; a multiply-add is two."""
    monkeypatch.setattr(facts, "in_turns", lambda runs, *_, **__: dict.fromkeys(runs, 0.5))
    data = facts.ceilings(context).data
    assert data["copy, B/s"] == 2 * TINY.copied // 2 / 0.5
    assert data["matmul, FLOP/s"] == {"16³": 2 * 16**3 / 0.5, "2 of 16³": 2 * 2 * 16**3 / 0.5}
    assert data["launch, us"] == 0.5 / 2 * 1e6


@needs.cpu_kernels
def test_a_sweep_has_a_fit_for_every_tile(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sweeps, "in_turns", lambda runs, *_: {name: 8e-6 * (len(name) + 1) for name in runs if not run(runs)}
    )
    ran: list[int] = []

    def run(runs: dict[str, timing.Run]) -> None:
        ran.extend(each() is None for each in runs.values())

    data = sweeps.sweep(context).data
    assert ran and set(data["us"]) == {"square, 1 waves", "wide, 1 waves"}
    assert data["us"]["wide, 1 waves"]["torch"] == pytest.approx({16: 6.0, 32: 6.0})
    fits = data["fits"]["square, 1 waves"]
    assert set(fits) == {*(f"cpu, {isa}" for isa in cpu.instruction_sets()), "torch"}
    assert fits["torch"] == pytest.approx({"fixed, us": 6.0, "slope, us a k-step of 64": 0.0}, abs=1e-9)


def test_torch_s_products_are_the_same_ones() -> None:
    A, X, C = (torch.randn(2, 8, 8) for _ in range(3))
    for given in ({}, {"b_transposed": True, "symmetric": True}, {"c": C, "beta": 0.5}):
        out, right = torch.empty(2, 8, 8), torch.empty(2, 8, 8)
        b = A if "b_transposed" in given else X
        sweeps._torchs(A, b, out, **given)
        sound(A, b, right, **{**given, "symmetric": False})
        torch.testing.assert_close(out, right)


@needs.cpu_kernels
def test_crossovers(context: Context) -> None:
    result = sweeps.crossovers(context)
    assert set(result.data["us"]) == {"1 of 16", "1 of 32"} == set(result.data["fastest"])
    times = result.data["us"]["1 of 16"]["square"]
    assert "torch" in times and len(times) == 1 + len(cpu.instruction_sets()) and "fastest in" in result.summary
    late = sweeps.crossovers(Context(context.place, TINY, end=-math.inf))
    assert "no time or memory for 2 sizes" in late.summary and not late.data["us"]


def test_steps_of_models(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(params: list[nn.Parameter]) -> steppers.Step:
        raise TypeError("another signature")

    monkeypatch.setitem(steppers.PEERS, "idle", ("torch", lambda params: lambda: None))
    monkeypatch.setitem(steppers.PEERS, "broken", ("torch", broken))
    monkeypatch.setitem(steppers.PEERS, "absent", ("no_such_module", broken))
    result = models.time_steps(context)
    rows = result.data["workloads"]["tiny"]
    assert "absent" not in rows
    assert rows["broken"] == {"failed": "TypeError: another signature"}
    assert rows["idle"] == {"failed": "RuntimeError: a step changed nothing"}
    for name in (*context.place.backends, steppers.TORCH, steppers.COMPILED, steppers.BATCHED):
        assert rows[name]["wall, ms"] > 0 and rows[name]["graph, ms"] > 0, rows[name]
        assert ("% of roofline" in rows[name]) == (name in backends.BACKENDS)


def test_what_there_is_no_time_to_compile_is_left_out(context: Context) -> None:
    rows = models.compared(context, TINY.workloads["tiny"], -math.inf)
    assert rows[steppers.COMPILED] == rows[steppers.BATCHED] == {"failed": "no time to compile it"}
    assert rows[steppers.TORCH]["wall, ms"] > 0


def test_a_step_that_cannot_be_captured_has_no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(calls: Any, device: str) -> timing.Run:
        raise RuntimeError("not while capturing\nand more")

    monkeypatch.setattr(models, "one_after_another", captured)
    row: dict[str, Any] = {}
    assert models._captured(lambda: None, "cuda", row) is None
    assert row == {"graph": "RuntimeError: not while capturing"}


@pytest.mark.parametrize("count", [2, steppers._WHOLE + 1])
def test_compiled_steps_are_torch_s(count: int) -> None:
    from torch.optim import _muon

    eager_loop = _muon._zeropower_via_newtonschulz
    params = steppers.parameters([(8, 12, count)])
    results = []
    for make in (steppers.rivals("eager")[steppers.TORCH], lambda p: steppers.compiled_muon(p, "eager")):
        own = models.copied(params)
        step = make(own)
        step()
        step()
        results.append(own)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert _muon._zeropower_via_newtonschulz is eager_loop


def test_peers_are_called_by_their_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    module = types.ModuleType("peer")
    module.Muon = lambda params, **options: made.append(options) or types.SimpleNamespace(step=len)  # type: ignore[attr-defined]
    for name, (module_name, make) in steppers.PEERS.items():
        monkeypatch.setitem(sys.modules, module_name, module)
        assert make([]) is len, name
    assert [options["lr"] for options in made] == [1e-3] * len(steppers.PEERS)


def test_busy_time_counts_what_overlaps_once() -> None:
    kernels = [
        traces.Ran("b", 5.0, 9.0),
        traces.Ran("a", 0.0, 4.0),
        traces.Ran("a", 2.0, 3.0),
        traces.Ran("c", 8.0, 12.0),
    ]
    found = traces.busy(kernels)
    assert (found["busy, us"], found["span, us"], found["kernels"]) == (11.0, 12.0, 4)
    assert list(found["by name"]) == ["a", "b", "c"] and found["by name"]["a"] == {"calls": 2, "us": 5.0}
    assert traces.busy([])["span, us"] == 0.0


@needs.cpu_kernels
def test_gaps(context: Context) -> None:
    result = traces.gaps(context)
    assert set(result.data) == {"tiny, cpu"} and result.data["tiny, cpu"]["kernels"] > 0
    assert result.summary.startswith("busy: tiny, cpu ")


def test_passes_count_bytes(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "in_turns", lambda runs, *_, **__: {n: 2.0 for n, run in runs.items() if run() is None})
    context.found["ceilings"] = {"copy, B/s": 5 * 1920.0}
    result = traces.passes(context)
    # Two of 24x40: gradient, momentum and parameter in four bytes or two, the stack in two.
    assert result.data["B/s"]["eager, float32, 2 of 24x40"] == {"momentum": 1920 * 7.0, "apply": 1920 * 5.0}
    assert result.data["B/s"]["eager, bfloat16, 2 of 24x40"] == {"momentum": 1920 * 4.0, "apply": 1920 * 3.0}
    assert result.summary == "at best 140 % of a copy's rate"


def test_only_steps_of_one_launch_are_timed_as_such(context: Context) -> None:
    assert "eager" not in "".join(traces.fused(context).data["us"])
    assert traces._crossed((256, 1024, 4096), (1, 8, 132)) == [(1024, 1), (1024, 8), (1024, 132), (256, 8), (4096, 8)]


# NVIDIA's tools, of which a script says what they say.


def test_tools_that_are_not_there(path: Path, context: Context) -> None:
    for run, name in ((tools.sanitize, "compute-sanitizer"), (tools.profile, "ncu")):
        with pytest.raises(Skipped, match=f"{name} is neither on PATH nor in CUDA_HOME"):
            run(context)


def test_a_tool_is_looked_for_in_cuda_home(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path / "cuda" / "bin").mkdir(parents=True)
    tool(path / "cuda" / "bin", "ncu", "")
    monkeypatch.setenv("CUDA_HOME", str(path / "cuda"))
    assert tools.found("ncu") == str(path / "cuda" / "bin" / "ncu")


def test_the_sanitizer_runs_every_check(path: Path, context: Context) -> None:
    script = (
        "import os, sys\nassert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'\n"
        "i = sys.argv.index('-m'); assert sys.argv[i + 1:i + 3] == ['muon_kernels.cli.verify.exercise', 'cuda']\n"
        "print('========= COMPUTE-SANITIZER')\n"
        "if sys.argv[2] == 'racecheck': print('========= Error: Race reported'); raise SystemExit(int(sys.argv[4]))\n"
        "import time\nif sys.argv[2] == 'initcheck': time.sleep(60)\n"
    )
    tool(path, "compute-sanitizer", script)
    context = Context(GPU._replace(backends=("cuda", "eager")), TINY, end=time.monotonic() + 5.0)
    result = tools.sanitize(context)
    assert result.wrong == ("racecheck: Error: Race reported",)
    assert result.data["memcheck"] == "no errors" == result.data["synccheck"]
    assert result.data["initcheck"].startswith("no result after ") and "racecheck errors" in result.summary


COUNTED = """==PROF== Connected
exercised
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","product_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","12.5"
"0","product_kernel","GPU Speed Of Light Throughput","Duration","us","7"
"1","apply","Occupancy","","",""
"""


def test_ncu_s_table_is_read(path: Path, context: Context) -> None:
    tool(path, "ncu", f"print({COUNTED!r})")
    result = tools.profile(context)
    assert result.data["kernels"] == {"0: product_kernel": {"DRAM Throughput": "12.5 %", "Duration": "7 us"}}
    tool(path, "ncu", "print('==ERROR== ERR_NVGPUCTRPERM'); raise SystemExit(1)")
    with pytest.raises(Skipped, match="only root read counters"):
        tools.profile(context)
    tool(path, "ncu", "print('a crash'); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ncu ended with status 3: a crash"):
        tools.profile(context)
    tool(path, "ncu", "import time; time.sleep(60)")
    with pytest.raises(Skipped, match="no result in time"):
        tools.profile(Context(context.place, TINY, end=0.0))


@needs.cpu_kernels
def test_what_tools_watch_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    exercises.exercise(["cpu"], "cpu")
    gemm = cpu.gemm
    monkeypatch.setattr(cpu, "gemm", lambda A, X, **k: gemm(A, X, **{**k, "alpha": 1.1}))
    with pytest.raises(Wrong):
        exercises.exercise(["cpu"], "cpu")


# What a person reads.


def timed_models() -> list[Record]:
    rows = {
        "cuda": {"wall, ms": 2.5, "graph, ms": 2.25, "% of roofline": 40.0},
        "torch.optim.Muon": {"wall, ms": 8.0, "graph": "RuntimeError: no"},
        "dion": {"failed": "TypeError: no"},
    }
    data = {"workloads": {"GPT-2": rows, "MoE": {"cuda": rows["cuda"]}}}
    gpu = {"device": "a GPU", "torch": "2.13", "triton": "3.6"}
    return [Record(0, "facts", "?", "ok", data=gpu), Record(1, "models", "?", "ok", data=data)]


@pytest.mark.parametrize("with_rich", [True, False])
def test_tables(with_rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if with_rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "200")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    wrong = Record(2, "steps", "right?", "WRONG", 12.0, "30 checks, 25 wrong", [f"case {i}" for i in range(25)])
    report.show([*timed_models(), wrong])
    out = capsys.readouterr().out
    assert "2.500 (2.250), 40 %" in out and "none" in out and "30 checks, 25 wrong" in out
    assert "steps: case 19" in out and "case 20" not in out and "steps: and 5 more, which --json FILE has" in out
    assert "something is wrong: steps" in out and "for bench/RESULTS.md:\n| 20" in out


def test_the_row_for_results() -> None:
    row = report.results_row(timed_models())
    assert "verify` on a GPU, torch 2.13, triton 3.6 | | ms a step" in row and row.endswith(" |")
    assert "GPT-2 cuda 2.500, torch.optim.Muon 8.000" in row and "MoE" not in row
    assert report.results_row([Record(0, "models", "?", "rehearsed", data=timed_models()[1].data)]) == ""


def test_lines() -> None:
    assert report.line(Record(3, "steps", "right?")) == " 3 steps: right?"
    assert report.line(Record(3, "steps", "right?", "ok", 4.2, "30 checks")) == "   ok, 4 s: 30 checks"
    assert report.line(Record(3, "sweep", "?", "needs a GPU")) == " 3 sweep: needs a GPU"
    assert report.line(Record(3, "sweep", "?", "not run", 0, "steps are wrong")) == " 3 sweep: not run, steps are wrong"


def test_nothing_was_run() -> None:
    assert report.verdict([Record(0, "facts", "?", "stopped")]) == "nothing was run"


def test_steps_on_a_gpu_include_parts_of_columns() -> None:
    """Wide and tall, so that neither layout runs for the first time in a training."""
    divided = [s for s in FULL.steps if len(s) == 2 and min(s) <= 128 and fused_parts(min(s), max(s), 1) > 1]
    assert any(m < n for m, n in divided) and any(m > n for m, n in divided)


def test_workloads_of_a_gpu_are_whole_models() -> None:
    """As many matrices as models have; a processor's checks are a part of a GPU's."""
    assert WORKLOADS["GPT-2 124M, 12 layers"] == [(2304, 768, 12), (768, 768, 12), (3072, 768, 12), (768, 3072, 12)]
    assert set(FULL.traced) <= WORKLOADS.keys() and set(TINY.traced) <= TINY.workloads.keys()
    assert set(CPU.products) < set(FULL.products)
    assert sum(stage.seconds for stage in STAGES) == pytest.approx(590, abs=20)
