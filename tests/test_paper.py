"""examples/paper/ trains what it says, and its report shows what was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiments
import harness
import pytest
import report
import run
import torch
from harness import Config, Result, Results
from torch import nn
from torch.nn import functional as F

TINY = Config("adamw", 4e-3, 3, width=16, layers=1)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(harness, "HELD_OUT", 1)
    monkeypatch.setattr(harness, "BATCH", 4)
    harness._trained.cache_clear()
    yield
    harness._trained.cache_clear()


def without_times(result: Result) -> Result:
    return {key: value for key, value in result.items() if key != "seconds"}


def test_the_same_config_has_the_same_numbers_and_another_has_others() -> None:
    others = {
        "lr": 2e-3,
        "steps": 4,
        "weight_decay": 9.0,
        "width": 24,
        "layers": 2,
        "experts": 4,
        "text": "prose",
        "seed": 1,
        "start": TINY,
    }
    first = harness.train(TINY)
    losses = [first["loss"], *(harness.train(replace(TINY, **{key: value}))["loss"] for key, value in others.items())]
    assert all(map(math.isfinite, losses)) and len(set(losses)) == len(losses)
    harness._trained.cache_clear()
    assert without_times(harness.train(TINY)) == without_times(first)


def test_every_optimizer_is_another() -> None:
    """Models and batches are the same at first; a second step tells powers of a zero momentum apart."""
    names = ["adamw", "muon", *experiments.PAPER_LR]
    results = [harness.train(replace(TINY, optimizer=name, lr=1e-2)) for name in names]
    assert len({result["curve"][0][1] for result in results}) == 1
    assert len({result["loss"] for result in results}) == len(names)


@pytest.mark.parametrize("name", ["sgd", "", "Muon"])
def test_no_such_optimizer(name: str) -> None:
    with pytest.raises(ValueError, match="optimizer should be adamw, muon or one of msgd"):
        harness.train(replace(TINY, optimizer=name))


def _plain(config: Config, make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[list[float], float]:
    """Train in plain torch; return the training losses and the held-out one."""
    of = harness.model(config)
    optimizer = make(of)
    train, held_out = harness.text(config.text)
    generator = torch.Generator().manual_seed(config.seed + 1)
    losses = []
    for step in range(config.steps):
        starts = torch.randint(len(train) - 64, (4,), generator=generator)
        loss = of(torch.stack([train[start : start + 65] for start in starts.tolist()]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(of.parameters(), 1.0)
        # One step of warm-up, then half a cosine from step 1 to the last.
        share = 1.0 if step == 0 else 0.5 + 0.5 * math.cos(math.pi * (step - 1) / (config.steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * share
        optimizer.step()
        losses.append(loss.item())
    ends = [0, *((len(held_out) - 65) * n // 3 for n in (1, 2, 3))]
    with torch.no_grad():
        return losses, of(torch.stack([held_out[start : start + 65] for start in ends])).item()


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (
            replace(TINY, weight_decay=0.1),
            lambda of: torch.optim.AdamW(of.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        ),
        (
            replace(TINY, optimizer="msgd", lr=0.5),
            lambda of: torch.optim.SGD([p for p in of.parameters() if p.ndim > 1], momentum=0.9),
        ),
    ],
    ids=["adamw", "msgd"],
)
def test_training_is_what_one_would_write(
    config: Config, make: Callable[[nn.Module], torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "VECTOR_LR", 0.0)
    losses, held_out = _plain(config, make)
    result = harness.train(config)
    assert [step for step, _ in result["curve"]] == [1, 2, 3]
    assert [loss for _, loss in result["curve"]] == pytest.approx(losses, rel=1e-5)
    assert result["loss"] == pytest.approx(held_out, rel=1e-5)


def test_logits_are_seen_and_held() -> None:
    """Logits are those of the attention, and the heads of a fused projection are told apart."""
    config = replace(TINY, width=64, optimizer="muon", lr=0.5, steps=12)
    of = harness.model(config)
    logits = harness.Logits(of)
    text = torch.randint(256, (2, 9))
    block = of.layers[0]

    def largest() -> list[float]:
        of(text)
        x = of.byte_embedding(text[:, :-1]) + of.position_embedding.weight[:8]
        q, k, _ = block.qkv(block.attention_norm(x)).detach().split(64, -1)
        found = []
        for head in (slice(0, 32), slice(32, 64)):
            scores = q[..., head] @ k[..., head].mT / 32**0.5
            found.append(max(scores[b, i, j].item() for b in range(2) for i in range(8) for j in range(i + 1)))
        return found

    before = largest()
    assert logits.largest() == pytest.approx(max(before))
    tau = (max(before) + min(before)) / 2
    assert 0 < min(before) < tau
    logits.clip(tau)
    assert sorted(largest()) == pytest.approx([min(before), tau], rel=1e-5)

    free, held, unseen = (harness.train(replace(config, tau=tau)) for tau in (0.0, 1.5, None))
    assert free["loss"] == unseen["loss"] != held["loss"] and not unseen["logits"]
    assert [step for step, _ in free["logits"]] == [step for step, _ in free["curve"]]
    assert max(x for _, x in held["logits"]) < 0.5 * max(x for _, x in free["logits"])


def test_what_goes_astray_is_told() -> None:
    result = harness.train(replace(TINY, optimizer="msgd", lr=1e30))
    assert result["loss"] is None and harness.loss(result) == math.inf
    assert report.number(harness.loss(result)) == "diverged"
    assert harness.best([result, {"loss": 7.0}])["loss"] == 7.0


def test_a_mixture_gives_every_byte_its_two_experts() -> None:
    torch.manual_seed(0)
    mixture, x = harness.Mixture(8, 5), torch.randn(2, 3, 8)
    expected = torch.empty(6, 8)
    for n, byte in enumerate(x.view(6, 8)):
        scores = mixture.router.weight @ byte
        first, second = scores.argsort(descending=True)[:2].tolist()
        share = torch.sigmoid(scores[first] - scores[second])
        expected[n] = mixture.shared_down(F.gelu(mixture.shared_up(byte)))
        for expert, weight in ((first, share), (second, 1 - share)):
            expected[n] += weight * (mixture.down[expert] @ F.gelu(mixture.up[expert] @ byte))
    torch.testing.assert_close(mixture(x), expected.view_as(x))


def test_active_parameters() -> None:
    """A layer has attention, norms and an MLP; or a router, a shared expert half as large, and two of a quarter."""
    w, both = 16, 4 * 16**2 + 4 * 16
    assert harness.active(harness.model(TINY)) == both + 8 * w**2
    assert harness.active(harness.model(replace(TINY, experts=6))) == both + 6 * w + 4 * w**2 + 2 * 2 * w**2


def test_muon_steps_the_experts_and_leaves_the_embeddings() -> None:
    of = harness.model(replace(TINY, optimizer="muon", experts=3))
    (optimizer,) = harness.optimizers(replace(TINY, optimizer="muon", weight_decay=0.1), of)
    of(torch.randint(256, (2, 9))).backward()
    optimizer.step()
    with_momentum = {name for name, p in of.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert with_momentum == {name for name, p in of.layers.named_parameters(prefix="layers") if p.ndim > 1}
    assert {group["adjust_lr_fn"] for group in optimizer.param_groups if group["use_muon"]} == {"match_rms_adamw"}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


# ---- experiments, results, report ----


@pytest.mark.parametrize("far", [-3, 0, 1, 4])
def test_powers_look_around_the_best_rate(far: int) -> None:
    def valley(config: Config) -> Result:
        return {"loss": abs(math.log2(config.lr / experiments.PAPER_LR[config.optimizer]) - 2 * far), "config": {}}

    for name, by_rate in experiments.powers(valley, experiments.QUICK).items():
        rates = list(by_rate)
        assert len(rates) == 5 and rates[2] == pytest.approx(experiments.PAPER_LR[name] * 4.0**far)


def test_muon_takes_adamw_s_rate() -> None:
    def valley(config: Config) -> Result:
        return {"loss": abs(math.log2(config.lr / 8e-3)), "config": {"lr": config.lr, "optimizer": config.optimizer}}

    for size in experiments.scaling(valley, experiments.QUICK):
        assert {result["config"]["lr"] for result in size.values()} == {8e-3}
        assert [result["config"]["optimizer"] for result in size.values()] == ["adamw", "muon", "muon"]


def test_a_law_is_found() -> None:
    results: list[Any] = [
        {"active_parameters": n, "config": {"steps": 7 * n}, "loss": 3.5 * (6.0 * n * 7 * n * harness.TOKENS) ** -0.06}
        for n in (10, 50, 300)
    ]
    assert report.law(results) == pytest.approx((3.5, -0.06))


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    said: list[str] = []
    results = Results(path, say=said.append)
    first, second = results(TINY), results(replace(TINY, optimizer="muon", start=TINY))
    path.write_text(path.read_text() + path.read_text()[:50])  # as if cut off in the third
    assert len(said) == 2
    monkeypatch.setattr(harness, "train", None)
    again = Results(path)
    assert again(TINY) == first and again(replace(TINY, optimizer="muon", start=TINY)) == second
    assert len(path.read_text().splitlines()) == 2
    with pytest.raises(LookupError, match="should have every training but lacks"):
        Results(path, learn=False)(replace(TINY, seed=5))


def test_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scale = replace(experiments.QUICK, width=16, sizes=((8, 1), (16, 1)), steps=6)
    monkeypatch.setattr(experiments, "QUICK", scale)
    arguments = ["--quick", "--out", str(tmp_path)]
    run.main(["powers", *arguments])
    page = (tmp_path / "REPORT.md").read_text()
    assert page.count("Not complete yet.") == 4 and not (tmp_path / "figures" / "scaling.png").exists()
    run.main(["all", *arguments])
    capsys.readouterr()

    page = (tmp_path / "REPORT.md").read_text()
    assert "Not complete" not in page
    for name in ("powers", "scaling", "finetune", "entropy", "clip"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/{name}.png" in page
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for result in results:
        config = result["config"]
        if config["optimizer"] in experiments.PAPER_LR and config["steps"] == scale.powers:
            row = next(line for line in page.splitlines() if line.startswith(f"| {config['optimizer']} |"))
            assert f"{result['loss']:.3f}" in row
        assert bool(result["spectra"]) == bool(config["record_every"])
        assert bool(result["logits"]) == (config["tau"] is not None)

    # Trained once, shown as often as one likes.
    monkeypatch.setattr(harness, "train", None)
    run.main(["all", *arguments])
    assert (tmp_path / "REPORT.md").read_text() == page


@pytest.mark.parametrize("arguments", [["all", "--quick"], ["all", "--steps", "9"], ["all", "--steps", "1"], ["most"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert "error" in capsys.readouterr().err
