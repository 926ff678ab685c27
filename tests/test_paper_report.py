"""examples/paper/: statistics, what is kept, how rates are chosen, and what the report and the docs say of it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import arguments
import configs
import estimate
import experiments
import intervals
import pytest
import report
import results
import run
import training
import words
import workers
from configs import Config, Result, schedule
from experiments import BOTH, MUON, ONE, SCALES, TAKEN, TUNING, TWO, tune
from intervals import OPEN, OPPOSITE, REPRODUCED, Claim, Estimate, fit, paired, t_quantile, verdict
from probes import Accuracy, UpdateRms
from results import Results
from sections import decay, powers, rms, scaling, shared

ROOT = Path(__file__).parents[1]
TINY = Config("adamw", 4e-3, 3, width=16, layers=1, batch=4, held_out=256)


# ---- statistics ----


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_quantiles_are_those_of_tables(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-5)
    assert t_quantile(100_000) == pytest.approx(1.95996, abs=1e-4)


def test_means_and_their_intervals() -> None:
    """By hand: 1, 2, 3 have sd 1, and 4.3027 / √3 is half of the interval."""
    found = intervals.estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.sd) == (2.0, 1.0) and found.half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert found.low == 2.0 - found.half and found.high == 2.0 + found.half
    assert intervals.estimate([5.0]).half == math.inf
    lost = intervals.estimate([1.0, math.inf])
    assert lost.half == math.inf and (lost.low, lost.high) == (1.0, math.inf) and lost.lost == "1 of 2 diverged"
    unknown = paired([1.0, math.inf], [0.5, math.inf])
    assert (unknown.low, unknown.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="numbers should be one at least"):
        intervals.estimate([])


def test_what_pairs_have_in_common_drops_out() -> None:
    first, second = [11.0, 25.0, 37.0], [10.0, 23.0, 34.0]
    found = paired(first, second)
    assert found.mean == 2.0 and found.sd == 1.0
    assert found.half < intervals.estimate(first).half / 10
    with pytest.raises(ValueError, match="pairs should be of equally many numbers but are of: 3 and 2"):
        paired(first, second[:2])


def test_lines() -> None:
    """Residuals of 0, 1, 2, 3 → 0, 1, 1, 2 are -.1, .3, -.3, .1: slope 0.6, error √(0.2 / 2 / 5)."""
    line = fit([0, 1, 2, 3], [0, 1, 1, 2])
    assert line.slope.mean == pytest.approx(0.6) and line.intercept == pytest.approx(0.1)
    assert line.slope.half == pytest.approx(4.30265 * (0.2 / 2 / 5) ** 0.5, rel=1e-5)
    assert fit([0, 1], [1, 3]).slope == Estimate(2.0, math.inf)
    with pytest.raises(ValueError, match="x should be two different numbers"):
        fit([1, 1], [1, 3])


@pytest.mark.parametrize(
    ("mean", "half", "sign", "judged"),
    [
        (1.0, 0.9, 1, REPRODUCED),
        (1.0, 1.1, 1, OPEN),
        (-1.0, 0.9, 1, OPPOSITE),
        (-1.0, 0.9, -1, REPRODUCED),
        (1.0, 0.9, -1, OPPOSITE),
        (-1.0, 1.1, -1, OPEN),
        (0.01, 0.005, 0, REPRODUCED),
        (-0.01, 0.005, 0, REPRODUCED),
        (0.01, 0.02, 0, OPEN),
        (0.05, 0.02, 0, OPPOSITE),
        (-0.05, 0.02, 0, OPPOSITE),
        (0.0, 1.0, 0, OPEN),
        (1.0, math.inf, 1, OPEN),
        (math.nan, math.inf, 0, OPEN),
    ],
)
def test_the_rule(mean: float, half: float, sign: int, judged: str) -> None:
    assert verdict(Estimate(mean, half), sign) == judged
    assert f"**{judged}**" in str(Claim("x is above y", Estimate(mean, half), sign))


@pytest.mark.parametrize(
    ("first", "second", "sign", "judged"),
    [
        ([math.inf] * 3, [2.0] * 3, 1, REPRODUCED),
        ([math.inf, 2.5, 2.6], [2.0] * 3, 1, REPRODUCED),
        ([math.inf, 2.5, 2.6], [2.0] * 3, -1, OPPOSITE),
        ([math.inf, 1.5, 2.6], [2.0] * 3, 1, OPEN),
        ([2.0] * 3, [math.inf, 2.5, 2.6], -1, REPRODUCED),
        ([math.inf] * 3, [2.0] * 3, 0, OPPOSITE),
        ([math.inf, 2.0, 2.0], [2.0] * 3, 0, OPEN),
        ([math.inf, 2.5, 2.6], [math.inf, 2.0, 2.0], 1, OPEN),
        ([math.inf, 2.5, 2.6], [2.0, math.inf, 2.0], 1, OPEN),
    ],
)
def test_divergence_is_a_finding(first: list[float], second: list[float], sign: int, judged: str) -> None:
    text = str(Claim("x is above y", paired(first, second), sign))
    assert f"**{judged}**" in text and re.search(r"\d of 3 diverged", text) and "no interval" not in text


def test_claims_say_sign_and_interval() -> None:
    text = str(Claim("x is above y", Estimate(-0.25, 0.125), 1))
    assert text == "x is above y: **not reproduced**, the opposite sign (-0.25 nats, 95 % from -0.375 to -0.125)"


# ---- choice of rates ----


def valley(*centres: float, fields: Sequence[str] = ("lr",)) -> Any:
    """A run whose loss is least at the rates given; it keeps the configs."""
    seen: list[Config] = []

    def run_(tasks: Sequence[Config]) -> list[Result]:
        seen.extend(tasks)
        found = []
        for task in tasks:
            rates = [getattr(task, name) or task.lr for name in fields]
            off = [abs(math.log2(rate / centre)) for rate, centre in zip(rates, centres, strict=True)]
            found.append({"loss": sum(off), "config": asdict(task)})
        return found

    run_.seen = seen  # type: ignore[attr-defined]
    return run_


@pytest.mark.parametrize("far", [-5, -1, 0, 1, 3])
def test_a_tuned_rate_has_worse_neighbours(far: int) -> None:
    run_ = valley(1e-2 * 2.0**far)
    tuned = tune(run_, replace(TINY, lr=1e-2, seed=7), "lr")
    assert tuned.config == replace(TINY, lr=1e-2 * 2.0**far, seed=7)
    tried = [task.lr for task in run_.seen]
    assert {tuned.config.lr / 2, tuned.config.lr * 2} <= set(tried) and len(tried) == len(set(tried)) == len(
        tuned.tried
    )
    assert {task.seed for task in run_.seen} == {TUNING}


def test_two_rates_are_tuned_together() -> None:
    run_ = valley(4e-3, 32e-3, fields=("lr", "rest_lr"))
    tuned = tune(run_, replace(TINY, lr=16e-3, rest_lr=16e-3), "lr", "rest_lr").config
    assert (tuned.lr, tuned.rest_lr) == (4e-3, 32e-3)
    assert all(task.rest_lr != task.lr for task in run_.seen), "which would be trained twice, under two names"


def test_rates_without_a_best() -> None:
    with pytest.raises(RuntimeError, match="rates should have a best within 2"):
        tune(valley(1e9), TINY, "lr")
    with pytest.raises(RuntimeError, match="rates should have a best"):
        tune(lambda tasks: [{"loss": None} for _ in tasks], TINY, "lr")


@pytest.mark.parametrize("far", [-3, 0, 1, 4])
def test_powers_look_around_the_best_rate(far: int) -> None:
    def run_(tasks: Sequence[Config]) -> list[Result]:
        firsts = [experiments.PAPER_LR[task.optimizer] * 4.0**far for task in tasks]
        return [
            {"loss": abs(math.log2(task.lr / first)), "config": asdict(task)}
            for task, first in zip(tasks, firsts, strict=True)
        ]

    for name, of in experiments.powers(run_, SCALES["quick"]).items():
        assert of.lr == pytest.approx(experiments.PAPER_LR[name] * 4.0**far)
        for factor, seeds in of.window.items():
            assert [result["config"]["lr"] for result in seeds] == pytest.approx([of.lr * factor] * len(seeds))
        assert min(of.coarse, key=lambda lr: of.coarse[lr]["loss"]) == pytest.approx(of.lr)


def test_variants_differ_in_what_they_say() -> None:
    plan = estimate.Plan()
    for size in experiments.scaling(plan, SCALES["laptop"]).values():
        of = {name: seeds[0]["config"] for name, seeds in size.items()}
        one, two, taken, both, muon = (of[name] for name in (ONE, TWO, TAKEN, BOTH, MUON))
        assert {**both, "optimizer": "adamw"} == two and two["rest_lr"] is not None
        rest = muon["rest_lr"] or muon["lr"]
        assert {**muon, "lr": two["lr"], "rest_lr": rest} == both and muon["lr"] != two["lr"], "by one rate alone"
        assert taken["lr"] == one["lr"] and taken["rest_lr"] is one["rest_lr"] is None
        assert (muon["rest_lr"] or muon["lr"]) == (two["rest_lr"] or two["lr"])
        assert muon["weight_decay"] == two["weight_decay"] == experiments.DECAY
        assert {x["optimizer"] for x in (one, two)} == {"adamw"} and {x["optimizer"] for x in (taken, muon)} == {"muon"}
        assert [result["config"]["seed"] for result in size[MUON]] == [0, 1, 2, 3]


def test_the_over_trained_have_the_same_rate_of_the_rest() -> None:
    of = {place: seeds[0]["config"] for place, seeds in experiments.decay(estimate.Plan(), SCALES["laptop"]).items()}
    muon, adamw = of["Muon", "float32"], of["AdamW", "float32"]
    assert (muon["rest_lr"] or muon["lr"]) == adamw["rest_lr"] != adamw["lr"] != muon["lr"]
    assert {**of["Muon without decay", "bfloat16"], "weight_decay": 0.1, "dtype": "float32"} == muon


def test_no_reported_seed_chooses_a_rate() -> None:
    for tasks in estimate.plan(SCALES["laptop"]).values():
        trainings = [task for task in tasks if isinstance(task, Config)]
        assert {task.seed for task in trainings} <= {0, 1, 2, 3, TUNING}
        for task in trainings:
            assert task.start is None or task.start.seed == task.seed
    assert TUNING not in SCALES["laptop"].seeds


# ---- what is kept ----


class AtOnce(Executor):
    """An executor that runs a task when it is given."""

    def submit(self, work: Any, /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def fake(task: Config) -> Result:
    return {"config": asdict(task), "loss": task.lr, "seconds": 1.0, "machine": "none"}


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    said: list[str] = []
    first = Results(path, AtOnce(), workers.work, say=said.append)
    tasks = [TINY, replace(TINY, optimizer="muon", start=TINY, record_every=1), TINY]
    found = first(tasks)
    assert len(said) == 2 and found[0] == found[2] and "loss" in said[0]
    again = Results(path)
    assert again(tasks) == found and len(path.read_text().splitlines()) == 2 and found[1]["spectra"]
    assert again.has(TINY) and not again.has(replace(TINY, seed=5))
    with pytest.raises(LookupError, match="should have every result but lacks"):
        again([replace(TINY, seed=5)])


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Results(path, AtOnce(), fake)([replace(TINY, seed=n) for n in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert not Results(path).has(replace(TINY, seed=2)) and path.read_bytes() == whole[:-20], "reading changes nothing"
    again = Results(path, AtOnce(), fake)
    again([replace(TINY, seed=n) for n in range(3)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        '{"config": {"optimizer": "adamw", "lr": 0.1}, "loss": 2.0}',
        '{"format": 2, "kind": "Config", "config": {}}',
        '{"format": 3, "kind": "Config", "config": {"optimizer": "adamw"}}',
        "[]",
        "hello",
    ],
)
def test_another_format_raises(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    Results(path, AtOnce(), fake)([TINY])
    path.write_text(path.read_text() + line + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"line 2 of .* should be a result of format 3 .*; move the file away"):
        Results(path, AtOnce(), fake)
    with pytest.raises(ValueError, match="should be a result of format 3"):
        report.write(tmp_path, SCALES["quick"])
    assert path.read_bytes() == before and not (tmp_path / "REPORT.md").exists()


def test_results_of_another_text_are_not_mixed(tmp_path: Path) -> None:
    """Neither a new one with what is kept, nor two that are kept."""
    text, path = tmp_path / "text", tmp_path / "results.jsonl"
    text.write_bytes(bytes(range(256)) * 40)
    of = [replace(TINY, text=str(text), seed=n) for n in range(2)]
    first = Results(path, AtOnce(), workers.work, say=lambda _: None)([of[0]])
    assert first[0]["texts"] == workers.digests([str(text)])
    before = path.read_bytes()
    text.write_bytes(bytes(range(255, -1, -1)) * 40)
    for cached in (training.text, training.digest):
        cached.cache_clear()
    message = r"text '.*' should be that of the other results .*; take that file, or the Python that \"machine\" names"
    with pytest.raises(ValueError, match=message):
        Results(path, AtOnce(), workers.work, say=lambda _: None)([of[1]])
    with pytest.raises(ValueError, match=message):
        Results(path).check_texts(workers.digests([str(text)]))
    assert path.read_bytes() == before
    line = {**json.loads(before), "texts": workers.digests([str(text)])}
    path.write_bytes(before + json.dumps(line).encode() + b"\n")
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path, SCALES["quick"])
    assert not (tmp_path / "REPORT.md").exists()


def test_another_python_begins_nothing(in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"format": results.FORMAT, "kind": "Config", **made_up(TINY), "texts": {"both": "0123456789abcdef"}}
    (tmp_path / "results.jsonl").write_text(json.dumps({**line, "spectra": []}) + "\n")
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(run, "work", None)
    with pytest.raises(ValueError, match="text 'both' should be that of the other results"):
        run.main(["clip", "--size", "quick", "--out", str(tmp_path)])
    assert (tmp_path / "results.jsonl").read_bytes() == before and not (tmp_path / "REPORT.md").exists()


def test_the_longest_goes_first_and_an_error_stops_all(tmp_path: Path) -> None:
    order: list[int] = []

    def work(task: Config) -> Result:
        order.append(task.steps)
        if task.steps == 20:
            raise ValueError("no more")
        return fake(task)

    kept = Results(tmp_path / "results.jsonl", AtOnce(), work, say=lambda _: None)
    with pytest.raises(ValueError, match="no more"):
        kept([replace(TINY, steps=n) for n in (10, 40, 20, 30)])
    assert order == [40, 30, 20]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert Results(tmp_path / "results.jsonl").has(replace(TINY, steps=30))


def test_a_stop_ends_what_waits_and_what_would_come(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def work(task: Config) -> Result:
        started.set()
        assert go_on.wait(60)
        return fake(task)

    def a_search(kept: Results) -> None:
        kept([replace(TINY, seed=1)])
        kept([replace(TINY, seed=2)])

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(2) as threads:
        kept = Results(tmp_path / "results.jsonl", pool, work, say=lambda _: None)
        search = threads.submit(a_search, kept)
        assert started.wait(60)
        waiting = threads.submit(kept, [replace(TINY, seed=3)])
        while not kept._waiting:
            time.sleep(0.01)
        kept.stop()
        go_on.set()
        for future in (search, waiting):
            assert isinstance(future.exception(60), KeyboardInterrupt)
    assert [json.loads(line)["config"]["seed"] for line in kept.path.read_text().splitlines()] == [1], "it is kept"


def test_a_kill_loses_nothing_that_was_done(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/paper/run.py"), "clip", "--size", "quick", "--workers", "1"]
    command += ["--bytes", "0.1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = tmp_path / "results.jsonl"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    lines = before[: before.rindex(b"\n") + 1]
    assert lines.count(b"\n") >= 3
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = path.read_bytes()
    assert after.startswith(lines)
    configs = [json.dumps(json.loads(line)["config"]) for line in after.splitlines()]
    wanted = {json.dumps(asdict(task)) for task in estimate.plan(replace(SCALES["quick"], bytes=0.1))["clip"]}
    assert len(configs) == len(set(configs)) and set(configs) == wanted
    assert "**" in (tmp_path / "REPORT.md").read_text()


# ---- report ----


def test_a_law_is_found() -> None:
    found: Any = {}
    for n in (10, 50, 300):
        config = {"steps": 7 * n, "batch": 2, "context": 3, "width": n, "layers": 1, "experts": 0, "optimizer": "adamw"}
        compute = 6.0 * (12 * n**2 + 4 * n + 256 * n) * 7 * n * 6
        found[n, 1] = {
            name: [{"config": config, "loss": factor * compute**-0.06}] * 2
            for name, factor in (("a", 3.5), ("b", 3.5 * 2**-0.06))
        }
    line = scaling.law(found, "a")
    assert (math.exp(line.intercept), line.slope.mean) == pytest.approx((3.5, -0.06))
    assert line.slope.half == pytest.approx(0, abs=1e-9)
    assert scaling.savings(found, "b", "a") == pytest.approx([-1, -1]), "half of the compute"
    assert scaling.savings(found, "a", "a") == pytest.approx([0, 0])


def test_compute_has_the_head_and_muon_s_iterations() -> None:
    """Against the parameters of the model; a product of a x b by b x c is 2 a b c."""
    config = replace(TINY, layers=2, steps=5)
    of = training.model(config)
    head = of.head.weight.numel()
    layers = sum(p.numel() for p in of.layers.parameters())
    plain = configs.compute(asdict(config))
    assert plain == 6 * (layers + head) * 5 * 4 * 64
    for experts in (0, 6):
        muon = replace(config, optimizer="muon", experts=experts)
        flop = 0
        for name, p in training.model(muon).layers.named_parameters():
            if p.ndim > 1:
                m, n = sorted((p.shape[-2] // (3 if "qkv" in name else 1), p.shape[-1]))
                count = p.numel() // (m * n)
                flop += count * 5 * (2 * m * n * m + 2 * m * m * m + 2 * m * m * n)
        assert configs.compute(asdict(muon)) == configs.compute(asdict(replace(muon, optimizer="adamw"))) + 5 * flop


def test_rises_are_symmetric() -> None:
    window = {factor: [{"loss": 2 + abs(math.log2(factor)) * seed} for seed in (1, 3)] for factor in experiments.WINDOW}
    of = experiments.Power({}, 1.0, window)
    assert powers._rise(of, 2.0) == [1, 3] and powers._rise(of, 4.0) == [2, 6]


def test_spectra_are_of_steps_that_learn() -> None:
    """Rows of steps at next to no rate change neither the verdict nor the table."""

    def power(condition: float, late: float) -> experiments.Power:
        steps = [(0, late), (20, 9.0), (60, condition), (96, late), (100, late)]  # the share is 0.1 after 81 of 100
        rows = [
            {"step": step, "name": "layers.0.out.weight", "tensor": "update", "condition": x, "svd_entropy": x / 1e9}
            for step, x in steps
        ]
        seeds = [{"config": {"steps": 100}, "loss": 2.0, "spectra": rows} for _ in range(2)]
        return experiments.Power({}, 1.0, {1.0: seeds})

    assert schedule(100, 59) > powers.LEAST_SHARE > schedule(100, 95)
    for suffix in ("", "_s", "_q"):
        found = [
            {family + other: power(100.0 if other == "" else 10.0, late if other == suffix else 1.0)
             for family in ("msgd", "adam") for other in ("", "_s", "_q")}
            for late in (1.0, 1e8)
        ]  # fmt: skip
        claims = [[(claim.difference, str(claim)) for claim in powers._spectra_claims(each)] for each in found]
        assert claims[0] == claims[1] and all(REPRODUCED in text for _, text in claims[0])
        assert powers._spectra_table(found[0]) == powers._spectra_table(found[1])


def test_the_early_loss_of_what_diverged() -> None:
    """Of 24 points the first quarter is 6, and the first of them is warm-up's."""
    curve = [[round((n + 1) * 100 / 24), float(n)] for n in range(24)]
    whole, late, early, never = (
        {"config": {"steps": 100}, "curve": curve[:count], "loss": lost}
        for count, lost in ((24, 1.0), (7, None), (4, None), (0, None))
    )
    assert decay._early([whole, late, early, never], 0.25) == [3.0, 3.0, math.inf, math.inf]


def test_sizes_of_updates_are_in_units_of_the_rate() -> None:
    rows = [
        {"step": step, "name": f"layers.{name}.weight", "tensor": tensor, "rms": 0.5 * schedule(100, step - 1) * x}
        for step in (20, 40)
        for name, tensor, x in (("0.out", "update", 0.1), ("1.out", "update", 0.3), ("0.qkv", "update", 9.0))
    ]
    rows += [{**row, "tensor": "weight", "rms": 9.0} for row in rows]
    found = rms._update_rms({"config": {"lr": 0.5, "steps": 100}, "spectra": rows}, "out")
    assert found == pytest.approx({20: 0.2, 40: 0.2})


def test_formats() -> None:
    assert shared.number(None) == shared.number(math.inf) == "diverged"
    assert shared.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000" and shared.spread([1.0, math.inf]) == "1 of 2 diverged"
    assert shared.interval(Estimate(1.0, 0.25)) == "+1.000 [+0.750, +1.250]"
    steps, found = shared.series([{"curve": [[1, 2.0], [2, 4.0]]}, {"curve": [[1, 4.0]]}], "curve")
    assert steps == [1] and found[0].mean == 3.0


BEST = {"adamw": 8e-3, "muon": 32e-3, **{name: 4 * lr for name, lr in experiments.PAPER_LR.items()}}


def made_up(task: Any, muon: float = -0.1) -> Result:
    """A result without a training: a valley over rates, a little noise of the seed, and Muon's advantage."""
    if isinstance(task, UpdateRms):
        return {"config": asdict(task), "rms": 0.2 + 1e-3 * task.seed}
    if isinstance(task, Accuracy):
        return {"config": asdict(task), "errors": [["a", 0.02, 0.04 + 1e-3 * task.start.seed, 0.1]] * 3}
    assert isinstance(task, Config)
    noise = 2e-3 + 2e-3 * math.sin(task.seed * len(task.optimizer) + len(task.optimizer))
    rates = [task.lr / BEST[task.optimizer], (task.rest_lr or task.lr) / 16e-3]
    valley = sum(0.1 * abs(math.log2(rate)) for rate in rates)
    loss = 2 + 10 / task.width + valley + noise + muon * (task.optimizer == "muon")
    points = range(1, 13)
    spectra = [
        {
            "step": step,
            "name": f"layers.0.{name}.weight",
            "index": n,
            "group": f"layers.*.{name}.weight",
            "tensor": tensor,
        }
        | {"svd_entropy": 0.9 - noise - muon * (task.optimizer == "muon"), "condition": 10 + noise, "rms": 0.1 + noise}
        for step in (task.record_every, 2 * task.record_every)
        for name in ("qkv", "out", "mlp.up", "mlp.down", "mlp.router")
        for n in range(2)
        for tensor in task.record
    ]
    return {
        "config": asdict(task),
        "active_parameters": configs.active(task.width, task.layers, task.experts),
        "curve": [[n, loss + 1 / n] for n in points],
        "sizes": [[n, 0.1 + noise, 1.0 + noise] for n in points],
        "logits": [] if task.tau is None else [[n, 40.0 + noise - task.tau] for n in points],
        "loss": loss,
        "losses": {text: loss for text in {task.text, task.start.text if task.start else task.text}},
        "loads": [[1 / task.experts] * task.experts] if task.experts else [],
        "texts": {},
        "seconds": 1.0,
        "machine": "none",
        "spectra": spectra if task.record_every else [],
        "passes": 0.5,
    }


def test_what_is_made_up_is_like_what_is_trained() -> None:
    task = replace(TINY, experts=4, record_every=1, tau=1.0)
    real, made = training.train(task), made_up(task)
    assert real.keys() == made.keys()
    for name in ("curve", "sizes", "logits", "spectra"):
        assert len(real[name][0]) == len(made[name][0]), name


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(run, "work", made_up)


def rendered(page: str) -> set[str]:
    """Names of the sections of a report that have results."""
    return set(re.findall(r"run\.py (\w+)`: \d+ trainings", page))


def complete(kept: Results, scale: experiments.Scale) -> set[str]:
    """Names of the experiments whose results are all there."""
    found = set()
    for name, experiment in experiments.EXPERIMENTS.items():
        try:
            experiment(kept, scale)
        except LookupError:
            continue
        found.add(name)
    return found


def losses_of(page: str, name: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {name} |"))


def test_the_whole(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--size", "quick", "--out", str(tmp_path)]
    run.main(["clip", *given])
    page = (tmp_path / "REPORT.md").read_text()
    assert "**1 of 8 sections complete.**" in page
    assert rendered(page) == complete(Results(tmp_path / "results.jsonl"), SCALES["quick"]) == {"clip"}
    assert page.count("not complete yet.") == 7 and not (tmp_path / "figures" / "scaling.png").exists()
    run.main(given)
    page = (tmp_path / "REPORT.md").read_text()
    assert "not complete" not in page and "sections complete" not in page and intervals.RULE in page
    assert rendered(page) == set(report.SECTIONS)
    figures = re.findall(r"\(figures/(\w+\.png)\)", page)
    assert len(figures) == len(set(figures)) == 10
    for name in figures:
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")

    kept = Results(tmp_path / "results.jsonl")
    for name, of in experiments.powers(kept, SCALES["quick"]).items():
        for seeds in of.window.values():
            first, second = (result["loss"] for result in seeds)
            mean, sd = (first + second) / 2, abs(first - second) / 2**0.5
            assert f"{mean:.3f} ± {sd:.3f}" in losses_of(page, name)
    bodies = {title: body for title, _, body in (part.partition("\n") for part in page.split("\n## ")[1:])}
    judgements = r"\*\*(?:reproduced|not reproduced|cannot be told at this size)\*\*"
    for title, _ in report.SECTIONS.values():
        assert re.search(judgements, bodies[title]), title
    judged = re.search(r"^\| all \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert judged is not None
    claims = re.findall(rf"([^;.]+): {judgements}", page)
    assert sum(map(int, judged.groups())) == sum("[ours]" not in claim for claim in claims) > 30

    # Trained once.
    monkeypatch.setattr(run, "work", None)
    monkeypatch.setattr(report, "write", lambda *_: None)
    run.main(given)
    for of_page, blocks in words.BLOCKS.items():
        text = "".join(f"a\n<!-- paper: {name} -->\nold\n<!-- end -->\nb\n" for name in blocks)
        new = words.written(of_page, text, kept, SCALES["quick"])
        assert "old" not in new and len(new) > len(text) and new.count("<!-- end -->") == len(blocks)
        none = Results(tmp_path / "none.jsonl")
        assert words.written(of_page, new, none, SCALES["quick"]) == new, "nothing replaces a sentence by nothing"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("muon", "judged"),
    [
        (-0.3, "**reproduced**"),
        (0.3, "**not reproduced**, the opposite sign"),
        (0.0, "**cannot be told at this size**"),
    ],
)
def test_verdicts_follow_the_results(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, muon: float, judged: str
) -> None:
    """Those on what is better at the largest size, where all have the same losses but for Muon's advantage."""
    monkeypatch.setattr(run, "work", partial(made_up, muon=muon))
    run.main(["scaling", "entropy", "--size", "quick", "--out", str(tmp_path)])
    page = (tmp_path / "REPORT.md").read_text()
    assert f"at the largest size Muon is ahead of AdamW, both tuned: {judged}" in page
    if muon:
        assert f"Muon's entropy is higher, mean of the groups: {judged}" in page


def diverging(task: Any, which: Sequence[int], half_way: bool) -> Result:
    """A made-up result; trainings with these seeds diverge, at once or half-way."""
    result = made_up(task)
    if isinstance(task, Config) and task.seed in which:
        for name in ("curve", "sizes", "logits"):
            result[name] = result[name][: len(result[name]) // 2 * half_way]
        result["spectra"] = result["spectra"][: len(result["spectra"]) // 2]  # there are some of before the training
        if half_way and result["sizes"]:
            result["sizes"][-1][1:] = [None, None]
        result |= {"loss": None, "losses": dict.fromkeys(result["losses"])}
    return result


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("which", [(0,), (0, 1)])
def test_what_diverges_is_reported(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: tuple[int, ...], half_way: bool
) -> None:
    """Every section is written, with how many seeds diverged, and nothing that is no number."""
    monkeypatch.setattr(run, "work", partial(diverging, which=which, half_way=half_way))
    run.main(["--size", "quick", "--out", str(tmp_path)])
    page = (tmp_path / "REPORT.md").read_text()
    assert rendered(page) == set(report.SECTIONS)
    assert f"**{OPEN}** ({len(which)} of 2 diverged)" in page
    assert not re.search(r"\b(nan|inf)\b|\(no interval\)", page)


def test_a_rate_without_a_best_leaves_the_rest(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(task: Any) -> Result:
        result = made_up(task)
        return {**result, "loss": -task.lr} if getattr(task, "experts", 0) else result

    monkeypatch.setattr(run, "work", work)
    with pytest.raises(RuntimeError, match="rates should have a best"):
        run.main(["entropy", "clip", "--size", "quick", "--out", str(tmp_path)])
    page = (tmp_path / "REPORT.md").read_text()
    assert "run.py entropy`: not complete, rates should have a best" in page and "run.py clip`: 12 trainings" in page


def test_docs_say_what_the_results_say() -> None:
    """If not, `python examples/paper/report.py` writes them anew."""
    kept = Results(arguments.HERE / "results.jsonl")
    for page in words.BLOCKS:
        text = (ROOT / page).read_text()
        assert words.written(page, text, kept, SCALES["laptop"]) == text, f"{page} is stale"
        for name, sentence in words.BLOCKS[page].items():
            block = words._place(name).search(text)
            if block is not None and block[0]:
                sentence(kept, SCALES["laptop"])  # or it has numbers that have no results
    with pytest.raises(ValueError, match="should have a block <!-- paper: accuracy -->"):
        words.written("docs/powers.md", "no block", kept, SCALES["laptop"])


def test_the_report_is_of_the_results(tmp_path: Path) -> None:
    """REPORT.md in the repository is what report.py writes."""
    if (arguments.HERE / "results.jsonl").exists():
        (tmp_path / "results.jsonl").write_bytes((arguments.HERE / "results.jsonl").read_bytes())
    report.write(tmp_path, SCALES["laptop"])
    page = (arguments.HERE / "REPORT.md").read_text()
    assert (tmp_path / "REPORT.md").read_text() == page
    assert rendered(page) == complete(Results(tmp_path / "results.jsonl"), SCALES["laptop"])


def test_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 2 s: a training of n steps, with an evaluation of 64 steps' thirds, takes 2 n + 2 · 64 / 3."""
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(estimate, "work", lambda speed: {"seconds": 2.0})
    run.main(["clip", "scaling", "--size", "quick", "--out", str(tmp_path), "--estimate"])
    out = capsys.readouterr().out
    tasks = estimate.plan(SCALES["quick"])
    for name in ("clip", "scaling"):
        assert re.search(rf"^{name} +{len(tasks[name])} ", out, re.MULTILINE), out
    hours = sum(2 * task.steps + 2 * math.ceil(4096 / 256) / 3 for task in tasks["clip"]) / 3600
    assert re.search(rf"^clip +12 +{hours:.2f} ", out, re.MULTILINE), out
    assert not (tmp_path / "results.jsonl").exists() and "powers" not in out


def test_speeds_are_measured() -> None:
    assert 0 < workers.Speed(TINY, 2).run("cpu")["seconds"] < 60


@pytest.mark.parametrize("size", ["10m", "124m"])
def test_the_sizes_for_gpus_train(size: str, tmp_path: Path) -> None:
    """A step or two of the smallest model of each, on what there is here."""
    scale = SCALES[size]
    config = scale.config("muon", 1e-2, min(scale.sizes), steps=1, batch=1, held_out=scale.context)
    assert math.isfinite(training.train(config)["loss"])
    assert all(size in scale.sizes for size in (scale.size, scale.decay))


@pytest.mark.parametrize(
    "given",
    [
        ["--size", "quick"],
        ["--bytes", "9"],
        ["--bytes", "0", "--out", "x"],
        ["--seeds", "1"],
        ["--seeds", "6"],
        ["--text", "nowhere", "--out", "x"],
        ["--workers", "0"],
        ["most"],
        ["--size", "most"],
    ],
    ids=str,
)
def test_bad_arguments(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(given)
    assert "error" in capsys.readouterr().err


def test_a_gpu_that_is_not_there() -> None:
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a GPU that torch can use"):
            run.device("cuda", "10m")
        assert run.device(None, "10m") == "cpu"
    assert run.device(None, "laptop") == "cpu"
    assert results.FORMAT == 3
