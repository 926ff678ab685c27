"""examples/paper/ trains what it says; tests/test_paper_report.py is about what is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import configs
import experiments
import models
import pytest
import torch
import training
from configs import Config, Result
from probes import Accuracy, UpdateRms, transformed
from torch import nn
from torch.nn import functional as F
from training import train

from muon_kernels import COEFFICIENTS

TINY = Config("adamw", 4e-3, 3, width=16, layers=1, batch=4, held_out=256)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    training.trained.cache_clear()
    yield
    training.trained.cache_clear()


def without_times(result: Result) -> Result:
    return {key: value for key, value in result.items() if key != "seconds"}


def test_the_same_config_has_the_same_numbers_and_another_has_others() -> None:
    others = {
        "lr": 2e-3,
        "rest_lr": 1e-3,
        "steps": 4,
        "weight_decay": 9.0,
        "width": 24,
        "layers": 2,
        "experts": 4,
        "text": "prose",
        "seed": 1,
        "start": TINY,
        "dtype": "bfloat16",
        "context": 32,
        "batch": 3,
    }
    first = train(TINY)
    losses = [first["loss"], *(train(replace(TINY, **{key: value}))["loss"] for key, value in others.items())]
    assert all(map(math.isfinite, losses)) and len(set(losses)) == len(losses)
    training.trained.cache_clear()
    assert without_times(train(TINY)) == without_times(first)


@pytest.mark.parametrize("field", [{"target_rms": 0.4}, {"rms": "exact"}, {"rms": "width"}, {"rest_lr": 1e-3}], ids=str)
def test_muon_s_own_fields_count(field: dict[str, Any]) -> None:
    of = replace(TINY, optimizer="muon", lr=1e-2, weight_decay=0.1)
    assert train(of)["loss"] != train(replace(of, **field))["loss"]


def test_every_optimizer_is_another() -> None:
    """Models and batches are the same at first; a second step tells powers of a zero momentum apart."""
    names = ["adamw", "muon", *experiments.PAPER_LR]
    results = [train(replace(TINY, optimizer=name, lr=1e-2)) for name in names]
    assert len({result["curve"][0][1] for result in results}) == 1
    assert len({result["loss"] for result in results}) == len(names)


@pytest.mark.parametrize("name", ["sgd", "", "Muon"])
def test_no_such_optimizer(name: str) -> None:
    with pytest.raises(ValueError, match="optimizer should be adamw, muon or one of msgd"):
        train(replace(TINY, optimizer=name))


def test_no_such_rule_or_text() -> None:
    with pytest.raises(ValueError, match="rms should be one of adjusted, exact, width but is: 'big'"):
        train(replace(TINY, optimizer="muon", rms="big"))
    with pytest.raises(ValueError, match="the path of a file but is: 'nowhere'"):
        train(replace(TINY, text="nowhere"))


def _plain(config: Config, make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[list[float], float]:
    """Train in plain torch; return the training losses and the held-out one."""
    of = models.model(config)
    optimizer = make(of)
    text, held_out = (part.long() for part in training.text(config.text))
    generator = torch.Generator().manual_seed(config.seed + 1)
    losses = []
    for step in range(config.steps):
        starts = torch.randint(len(text) - 64, (4,), generator=generator)
        loss = of(torch.stack([text[start : start + 65] for start in starts.tolist()]))
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
    monkeypatch.setattr(training, "VECTOR_LR", 0.0)
    losses, held_out = _plain(config, make)
    result = train(config)
    assert [step for step, _ in result["curve"]] == [1, 2, 3]
    assert [loss for _, loss in result["curve"]] == pytest.approx(losses, rel=1e-5)
    assert result["loss"] == pytest.approx(held_out, rel=1e-5)


def test_logits_are_seen_and_held() -> None:
    """Logits are those of the attention, and the heads of a fused projection are told apart."""
    config = replace(TINY, width=64, optimizer="muon", lr=0.5, steps=12)
    of = models.model(config)
    logits = models.Logits(of)
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

    free, held, unseen = (train(replace(config, tau=tau)) for tau in (0.0, 1.5, None))
    assert free["loss"] == unseen["loss"] != held["loss"] and not unseen["logits"]
    assert [step for step, _ in free["logits"]] == [step for step, _ in free["curve"]]
    assert max(x for _, x in held["logits"]) < 0.5 * max(x for _, x in free["logits"])


def test_what_goes_astray_is_told() -> None:
    result = train(replace(TINY, optimizer="msgd", lr=1e30))
    assert result["loss"] is None and configs.loss(result) == math.inf
    assert configs.best([result, {"loss": 7.0}])["loss"] == 7.0


def test_a_mixture_gives_every_byte_its_two_experts() -> None:
    torch.manual_seed(0)
    mixture, x = models.Mixture(8, 5), torch.randn(2, 3, 8)
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
    assert configs.active(w, 1) == both + 8 * w**2
    assert configs.active(w, 1) == sum(p.numel() for p in models.model(TINY).layers.parameters())
    assert configs.active(w, 1, 6) == both + 6 * w + 4 * w**2 + 2 * 2 * w**2
    idle = 4 * 2 * w**2  # experts that a byte does not meet
    mixture = models.model(replace(TINY, experts=6)).layers
    assert configs.active(w, 1, 6) == sum(p.numel() for p in mixture.parameters()) - idle


def test_muon_steps_the_experts_and_leaves_the_embeddings() -> None:
    of = models.model(replace(TINY, optimizer="muon", experts=3))
    (optimizer,) = training.optimizers(replace(TINY, optimizer="muon", weight_decay=0.1), of)
    of(torch.randint(256, (2, 9))).backward()
    optimizer.step()
    with_momentum = {name for name, p in of.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    assert with_momentum == {name for name, p in of.layers.named_parameters(prefix="layers") if p.ndim > 1}
    assert {group["adjust_lr_fn"] for group in optimizer.param_groups if group["use_muon"]} == {"match_rms_adamw"}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_the_rest_has_a_rate_of_its_own() -> None:
    """Embeddings, head and norms; of both optimizers the same."""
    of = models.model(TINY)
    names = {p: name for name, p in of.named_parameters()}
    for name in ("adamw", "muon"):
        (optimizer,) = training.optimizers(replace(TINY, optimizer=name, lr=1e-2, rest_lr=1e-3), of)
        rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        matrices = {name for name, p in of.layers.named_parameters(prefix="layers") if p.ndim > 1}
        assert rates == {name: 1e-2 if name in matrices else 1e-3 for name in names.values()}


@pytest.mark.parametrize(("rms", "target"), [("adjusted", 0.2), ("adjusted", 0.8), ("exact", 0.2), ("width", 0.2)])
def test_targets_and_rules(rms: str, target: float) -> None:
    """The update has the size that the rule says, and the decay is lr times weight_decay whatever it is."""
    config = replace(TINY, optimizer="muon", lr=0.5, weight_decay=0.1, rms=rms, target_rms=target)
    of = models.model(config)
    before = {name: p.detach().clone() for name, p in of.named_parameters()}
    (optimizer,) = training.optimizers(config, of)
    for group in optimizer.param_groups:
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.5 * 0.1)
    of(torch.randint(256, (64, 65))).backward()
    optimizer.step()
    for name, p in of.layers.named_parameters(prefix="layers"):
        if p.ndim > 1:
            step = (before[name] * (1 - 0.5 * 0.1) - p.detach()) / 0.5
            long = max(p.shape) if "qkv" not in name else 16
            aim = target * (16 / long) ** 0.5 if rms == "width" else target
            found = step.square().mean().sqrt().item()
            assert 0.75 < found / aim < 1.1, name
            if rms == "exact":
                assert found == pytest.approx(aim, rel=0.005)


def test_what_a_training_tells() -> None:
    config = replace(TINY, experts=4, steps=6, record=("weight", "update"), record_every=3, text="code")
    config = replace(config, start=replace(config, record_every=0), text="prose")
    result = train(config)
    assert set(result["losses"]) == {"prose", "code"} and result["losses"]["prose"] == result["loss"]
    assert [len(layer) for layer in result["loads"]] == [4] and sum(result["loads"][0]) == pytest.approx(1, abs=1e-5)
    assert [step for step, *_ in result["sizes"]] == [step for step, _ in result["curve"]] == [1, 2, 3, 4, 5, 6]
    assert {(row["step"], row["tensor"]) for row in result["spectra"]} >= {(3, "update"), (6, "weight"), (0, "weight")}
    final = training.trained(config, "cpu")[0]
    assert result["sizes"][-1][1] == pytest.approx(models.weight_rms(final), rel=1e-5)
    assert result["passes"] == pytest.approx(6 * 4 * 64 / len(training.text("prose")[0]))


def test_the_output_is_what_the_last_layer_puts_out() -> None:
    config = replace(TINY, steps=1)
    of, text = models.model(config), training.Training(config).batch()
    x = of.layers(of.byte_embedding(text[:, :-1]) + of.position_embedding.weight[:64])
    assert train(config)["sizes"][0][2] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)


def test_held_out_prose_is_long_and_no_other_s() -> None:
    rest, held_out = training.text("prose")
    assert len(held_out) > 100_000 and len(rest) > len(held_out)
    assert len(rest) + len(held_out) == len(b"".join(training.demo.prose()))
    assert bytes(held_out[:300].tolist()) == b"".join(training.demo.prose()[2::3])[:300]


def test_a_text_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "text.bin"
    path.write_bytes(bytes(range(256)) * 20)
    train_on, held_out = training.text(str(path))
    assert bytes(torch.cat([train_on, held_out]).tolist()) == path.read_bytes() and len(held_out) == 512
    assert math.isfinite(train(replace(TINY, text=str(path)))["loss"])
    short = tmp_path / "short.bin"
    short.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="held-out text should have more than 64 bytes but has: 10"):
        training.held_out_loss(nn.Identity(), str(short), TINY, "cpu")


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_probes_of_updates(name: str) -> None:
    plain, exact = (UpdateRms(name, value, (24, 40), 0).run("cpu")["rms"] for value in (False, True))
    assert 0.13 < plain < 0.27 and exact == pytest.approx(0.2, rel=2**-8)


@pytest.mark.parametrize("name", ["msgd", "adam"])
def test_probes_of_powers(name: str) -> None:
    start = replace(TINY, optimizer=name, lr=1e-3, steps=8)
    result = Accuracy(start, 3, 0.5).run("cpu")
    names = [row[0] for row in result["errors"]]
    assert names[:4] == [*(f"layers.0.qkv.weight {n}" for n in range(3)), "layers.0.out.weight"]
    for _, ours, theirs, below in result["errors"]:
        assert 0 < ours < 0.15 and 0 < theirs < 1 and 0 <= below < 1
    with pytest.raises(ValueError, match="step should be at most 8"):
        Accuracy(start, 9, 0.5).run("cpu")


def test_a_probe_looks_at_what_adam_steps_by() -> None:
    going = training.Training(replace(TINY, optimizer="adam", lr=1e-3, steps=8))
    steps = going.steps()
    for _ in range(2):
        next(steps)
    p = going.model.layers[0].out.weight
    before = p.detach().clone()
    next(steps)
    taken = (before - p.detach()) / (1e-3 * configs.schedule(8, 2))
    torch.testing.assert_close(transformed(going, p, 3), taken, rtol=1e-3, atol=1e-3)
