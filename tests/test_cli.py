"""The command line does what it says."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

import pytest
import torch
from checks import needs

from muon_kernels import backends
from muon_kernels.backends import BACKENDS
from muon_kernels.cli import COMMANDS, demo, estimate, main
from muon_kernels.cli.demo import display, training
from muon_kernels.cli.layouts import LAYOUTS
from muon_kernels.cli.ledger import ledger
from muon_kernels.cli.models import MODELS
from muon_kernels.cli.network import FACTS
from muon_kernels.coefficients import resolve
from muon_kernels.step.plan import plan_for_shapes


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WIDTH", 32)
    monkeypatch.setattr(demo, "LAYERS", 1)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, colors = (pytest.importorskip(f"matplotlib.{name}") for name in ("image", "colors"))
    pytest.importorskip("rich")
    assert main(["demo", "--steps", "2", "--out", str(tmp_path / "new"), "--seed", "1"]) == 0
    out = capsys.readouterr().out
    for name in demo.OPTIMIZERS:
        row = next(line for line in out.splitlines() if name in line and "%" in line)
        losses = [float(cell) for cell in re.findall(r"\b\d\.\d{4}\b", row)]
        assert len(losses) == 2 and all(2 < loss < 7 for loss in losses), row
    assert "apart" in out
    assert display.CANNOT_TELL in " ".join(out.split())

    pixels = image.imread(tmp_path / "new" / "muon_demo.png")[..., :3]
    for name, style in demo.STYLES.items():
        distance = abs(pixels - colors.to_rgb(style["color"])).max(-1)
        assert (distance < 0.01).sum() > 100, f"no curve of {name}"


def test_demo_of_one_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    assert main(["demo", "--steps", "1", "--optimizers", "AdamW", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "AdamW" in out and "torch.optim.Muon" not in out and "apart" not in out


def test_demo_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["demo"]) == 1
    captured = capsys.readouterr()
    assert "pip install 'muon-kernels[demo]'" in captured.err and "rich" in captured.err


def test_demo_holds_out_whole_documents() -> None:
    documents = demo.prose() + demo.source_code()
    train, held_out = demo.parted(documents)
    assert len(train) + len(held_out) == sum(map(len, documents)) > 2e6
    assert len(set(documents)) > 100 and not set(documents[9::10]) & (set(documents) - set(documents[9::10]))
    assert bytes(held_out[:200].tolist()) == b"".join(documents[9::10])[:200]
    assert bytes(train[:200].tolist()) == b"".join(documents[:9])[:200]


def test_demo_starts_every_run_alike() -> None:
    torch.manual_seed(0)
    model = demo.GPT(demo.WIDTH, demo.LAYERS, demo.HEADS, demo.CONTEXT)
    text = torch.randint(256, (2, 17))
    runs = [demo.Run(name, model, steps=3) for name in demo.OPTIMIZERS]
    for run in runs:
        for _ in range(2):
            run.step(text)
    assert len({run.losses[0] for run in runs}) == 1
    assert all(run.losses[1] < run.losses[0] for run in runs)
    ours, torchs, _ = runs
    assert ours.losses[1] == pytest.approx(torchs.losses[1], rel=1e-2)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for name in BACKENDS:
        assert any(line.split()[:1] == [name] and "ready: " in line for line in out.splitlines())


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MUON_KERNELS_CPU_ISA", "")
    assert main(["doctor"]) == 0
    assert "should be one of" not in capsys.readouterr().out


def test_doctor_gives_the_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda name: f"no {name} today; wait")
    assert main(["doctor"]) == 0
    assert "not ready: no cpu today; wait" in capsys.readouterr().out


@needs.cpu_kernels
def test_doctor_survives_a_misspelt_instruction_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MUON_KERNELS_CPU_ISA", "neon")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count("MUON_KERNELS_CPU_ISA should be one of") == 2
    assert "not ready: MUON_KERNELS_CPU_ISA" in out and "nothing: MUON_KERNELS_CPU_ISA" in out
    assert "\n  eager   ready:" in out


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """As `head` does; the pipe is closed before anything is written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "muon_kernels", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "python -m muon_kernels" in out
    assert arguments or all(f"\n    {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["demo", "--steps", "0"],
        ["demo", "--minutes", "0"],
        ["demo", "--minutes", "1", "--steps", "2"],
        ["demo", "--optimizers", "SGD"],
        ["ledger", "--ranks", "12"],
        ["ledger", "--ranks", "0"],
    ],
)
def test_mistakes_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_runs_as_a_module_and_imports_lightly() -> None:
    code = (
        "import sys, muon_kernels.cli as cli; cli.main(['doctor']); "
        "sys.exit(' '.join({'rich', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    help_ = [sys.executable, "-m", "muon_kernels", "--help"]
    assert "demo" in subprocess.run(help_, check=True, capture_output=True, text=True).stdout


class Seconds:
    """A clock by which a demo's steps take what a test says, and nothing else takes any time."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, step: float, optimizers: dict[str, float] | None = None
    ) -> None:
        self.now, self.rates, optimizers = 1000.0, [], optimizers or {}

        def take(run: demo.Run, text: torch.Tensor) -> None:
            self.rates.append(run.schedulers[0].lr_lambdas[0](len(run.losses)))
            run.losses.append(3.0)
            run.optimizer_seconds.append(optimizers.get(run.name, 0.001))
            run.step_seconds.append(step + run.optimizer_seconds[-1])
            self.now += run.step_seconds[-1]

        def look(run: demo.Run, batches: Sequence[torch.Tensor]) -> None:
            run.held_out_loss = 2.0
            self.now += len(batches) * step / 3

        monkeypatch.setattr(training, "perf_counter", lambda: self.now)
        monkeypatch.setattr(demo.Run, "step", take)
        monkeypatch.setattr(demo.Run, "evaluate", look)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many steps there are of each curve."""
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    found: dict[str, int] = {}
    monkeypatch.setattr(demo, "source_code", list)
    monkeypatch.setattr(demo, "plot", lambda runs, path: found.update({run.name: len(run.losses) for run in runs}))
    return found


def test_a_demo_stops_what_is_too_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], drawn: dict[str, int]
) -> None:
    """As measured where torch emulates bf16: the others train to the end, and all of it fits."""
    clock = Seconds(monkeypatch, 0.3, {"muon_kernels": 0.13, "torch.optim.Muon": 8.8})
    assert main(["demo", "--minutes", "4"]) == 0
    assert drawn == {"muon_kernels": 160, "torch.optim.Muon": 3, "AdamW": 160}
    assert clock.now - 1000 < 240
    out = capsys.readouterr().out
    assert "torch.optim.Muon was too slow: stopped after 3 steps of 9.1 s" in out
    cells = {line.split()[1]: line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")}
    assert cells["muon_kernels"][1].strip() == "160" and cells["muon_kernels"][3].strip() == "2.0000"
    assert cells["torch.optim.Muon"][1].strip() == "3" and not cells["torch.optim.Muon"][3].strip()
    assert "of 3 steps at most" in " ".join(out.split()) and "x as fast" in out and "held-out losses" not in out


@pytest.mark.parametrize(
    ("arguments", "step", "slow", "steps", "slow_steps"),
    [
        (["--minutes", "4"], 0.2, 0.3, 160, 160),  # all is well
        (["--minutes", "4"], 2.0, 1.0, 21, 21),  # nobody is much slower than the others: all take fewer steps
        (["--minutes", "4"], 2.0, 20.0, 29, 3),
        (["--minutes", "4"], 2.0, 300.0, 1, 1),  # all of the time is gone after one step
        (["--minutes", "60"], 0.3, 6.0, 160, 160),
        (["--steps", "12"], 2.0, 300.0, 12, 12),
    ],
    ids=str,
)
def test_how_long_a_demo_takes(
    monkeypatch: pytest.MonkeyPatch,
    drawn: dict[str, int],
    arguments: list[str],
    step: float,
    slow: float,
    steps: int,
    slow_steps: int,
) -> None:
    clock = Seconds(monkeypatch, step, {"torch.optim.Muon": slow})
    assert main(["demo", *arguments]) == 0
    assert drawn == {"muon_kernels": steps, "torch.optim.Muon": slow_steps, "AdamW": steps}
    if "--minutes" in arguments and slow < 300:
        assert clock.now - 1000 <= 60 * float(arguments[1])


def test_a_demo_on_a_machine_that_slows_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], drawn: dict[str, int]
) -> None:
    """What was measured first holds no longer; the learning rate still decays to 0."""
    clock = Seconds(monkeypatch, 0.3)
    real = demo.Run.step

    def step(run: demo.Run, text: torch.Tensor) -> None:
        real(run, text)
        if len(run.losses) > 50:
            run.step_seconds[-1] += 2.0
            clock.now += 2.0

    monkeypatch.setattr(demo.Run, "step", step)
    assert main(["demo", "--minutes", "4"]) == 0
    (steps,) = set(drawn.values())
    assert 60 < steps < 100 and clock.now - 1000 < 240
    assert f"{steps} of 160 steps, all that fits in 4 minutes" in capsys.readouterr().out
    assert max(clock.rates) == 1 and clock.rates[-1] < 0.1


@pytest.mark.parametrize(("threads", "minutes"), [(1, 8), (2, 4)])
def test_one_core_has_twice_the_time(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    drawn: dict[str, int],
    threads: int,
    minutes: int,
) -> None:
    Seconds(monkeypatch, 40.0)
    assert main(["demo", "--threads", str(threads)]) == 0
    assert f"all that fits in {minutes} minutes" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "said"), [("1", "1 minute"), ("0.5", "0.5 minutes"), ("2", "2 minutes")])
def test_one_minute_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], drawn: dict[str, int], given: str, said: str
) -> None:
    Seconds(monkeypatch, 10.0)
    assert main(["demo", "--minutes", given]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"in {said} at most" in out and f"all that fits in {said}" in out


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """What pressing it does; where tests run in the background, it is ignored otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("presses", [[0], [0, 0.5], [0, 2]], ids=str)
def test_a_demo_that_is_stopped_shows_what_it_has(
    ctrl_c: Callable[[], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    presses: list[float],
) -> None:
    """Ctrl-C once: after the turn of all; again, after a second: at once, without the turn that is not complete."""
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    real, started, now = demo.Run.step, [], perf_counter()
    turns = 1 if presses[-1] > 1 else 2

    def step(self: demo.Run, text: torch.Tensor) -> None:
        started.append(self)
        if len(started) == 5:
            for seconds in presses:
                monkeypatch.setattr(training, "perf_counter", lambda seconds=seconds: now + seconds)
                ctrl_c()
        real(self, text)

    monkeypatch.setattr(demo.Run, "step", step)
    assert main(["demo", "--steps", "9", "--out", str(tmp_path)]) == 130
    out = capsys.readouterr().out
    assert f"{turns} of 9 steps, stopped by Ctrl-C" in out and "held-out losses" in out
    assert len(started) == {1: 5, 2: 6}[turns]
    assert (tmp_path / "muon_demo.png").exists()


def test_ctrl_c_skips_the_held_out_loss(
    ctrl_c: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo.Run, "evaluate", lambda *_: ctrl_c())
    assert main(["demo", "--steps", "2", "--out", str(tmp_path)]) == 130
    out = capsys.readouterr().out
    assert "optimizer step" in out and "held-out losses" not in out
    assert (tmp_path / "muon_demo.png").exists()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_ledger_keeps_its_promises(backend: str) -> None:
    """The figures of README, on a machine without anything."""
    gpt2, heads = ledger(MODELS["gpt2"].shapes), ledger(MODELS["heads"].shapes)
    ours, torchs = gpt2[f"muon_kernels, {backend}"], gpt2["torch.optim.Muon"]
    assert torchs.launches > 1000 and ours.launches <= 60
    assert ours.flops <= 0.4576 * torchs.flops
    assert heads[f"muon_kernels, {backend}"].launches == 1
    assert heads[f"muon_kernels, {backend}"].flops <= heads["torch.optim.Muon"].flops


def test_estimates_agree_with_published_times() -> None:
    """Of others' kernels with the same FLOPs: fused-muon 740a4d7 on A800, five steps of one matrix with its passes."""
    schedule, gpu = resolve("keller"), estimate.GPUS["a100"]
    _, cuda = estimate.kernels_on(gpu)
    for side, published in ((4096, 6.29e-3), (2048, 1.305e-3)):
        plan = plan_for_shapes([(side, side, 1)], schedule=schedule, device="cuda", backend="cuda", available=False)
        assert estimate.estimate(plan, cuda, gpu, schedule).seconds == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize("gpu", estimate.GPUS)
def test_estimates_say_that_they_are_ones(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And name a source for every rate; no estimate is faster than the least time of the table above it."""
    assert main(["ledger", "--device", gpu]) == 0
    table, estimates = capsys.readouterr().out.split("estimates, not measurements")
    rows = [line for line in estimates.splitlines() if line.startswith("estimate of")]
    assert len(rows) >= 2
    least = {
        line.split(", ")[1].split()[0]: float(line.split()[-1])
        for line in table.splitlines()
        if "muon_kernels, " in line and "%" in line
    }
    for row in rows:
        name = row.removeprefix("estimate of ").split()[0].rstrip(",")
        assert float(row.split()[-2]) >= least[name] * 0.99, row
    for kernels in estimate.kernels_on(estimate.GPUS[gpu]):
        assert kernels.reached.source in estimates and 0 < kernels.reached.share < 1


def test_the_ledger_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 8 matrices of 768x3072, one for each of 8 ranks: 2 bytes an element of a part to 7 others, and 2 back."""
    assert main(["ledger", "--shape", "768x3072x8", "--ranks", "64"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].startswith("estimates, not measurements: H100 SXM")
    rows = {tuple(cells[:2]): cells[2:] for line in out.splitlines() if len(cells := re.split("  +", line)) > 12}
    head = rows["ranks (nodes)", "layout"]
    assert [name for name in head if name.endswith("ms") or "training" in name] == head[7:8] + head[9:12]
    assert all(name.startswith("est. ") for name in head[7:8] + head[9:12])
    sent, _, state, _, _, ratio, calls, *_ = rows["8 (1)", "owners, FSDP2"]
    assert float(sent) == round(4 * 768 * 3072 * 7 / 8 / 1e6)
    assert float(state) == round(4 * 768 * 3072 / 1e6) and (ratio, calls) == ("1.00", "2")
    sent, beside, state, *_ = rows["64 (8)", "AdamW, ZeRO-1"]
    assert sent == "0" and float(state) == round(768 * 3072 * 8 * 8 / 64 / 1e6)
    assert float(beside) == round(8 * 8 * 768 * 3072 * 63 / 64 / 1e6)
    assert rows["64 (8)", "gathered, ZeRO-1"][5] == "64.00" and rows["64 (8)", "owners, DDP"][5] == "8.00"
    assert len([key for key in rows if key[0] in ("8 (1)", "64 (8)")]) == 18
    for fact in FACTS.values():
        assert fact.source in out
    assert {name for ranks, name in rows if ranks == "64 (8)"} <= LAYOUTS.keys()


def test_the_ledger_of_ranks_is_of_gpus_with_nvlink(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", "experts", "--ranks", "8", "--device", "4090"]) == 2
    assert capsys.readouterr().err == (
        "--ranks should be of a GPU with NVLink (a100, h100, h200, b200) but is of: 4090\n"
    )
