"""train_gpt.py trains what plain torch would, resumes to the bit, shares work between ranks, and refuses bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_gpt
from common import checkpoints, logs
from common.gpt import GPT, GPT2_124M, TINY, GPTConfig, loss_of
from common.tokens import Batches
from ranks import World

import muon_kernels

SMALL = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=16)
ARGUMENTS = (
    "--tiny --steps 4 --warmup 1 --batch-size 2 --accumulate 2 --eval-every 2 --eval-batches 2 --data data --out out"
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "TINY", SMALL)


def run(more: str = "") -> list[dict[str, Any]]:
    """Train; return the log without what the clock says."""
    arguments = f"{ARGUMENTS} {more}".split()
    train_gpt.main(arguments)
    out = Path(arguments[len(arguments) - arguments[::-1].index("--out")])
    return [{key: value for key, value in row.items() if key != "seconds"} for row in logs.read(out / "log.jsonl")]


def weights(out: str = "out") -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    path = checkpoints.latest(Path(out))
    assert path is not None
    model = GPT(SMALL)
    state = {"model": model.state_dict()}
    with checkpoints._alone():
        checkpoints.dcp.load(state, checkpoint_id=path)
    return state["model"]


def near(a: list[dict[str, Any]], b: list[dict[str, Any]], tolerance: float) -> bool:
    assert [row.keys() for row in a] == [row.keys() for row in b]
    return all(math.isclose(x[key], y[key], rel_tol=tolerance) for x, y in zip(a, b, strict=True) for key in x)


# ---- one process ----


def test_training_is_what_one_would_write(data: Path) -> None:
    """AdamW, written out: the order of text, accumulation, clipping, warm-up, cosine and evaluation."""
    log = run("--optimizer adamw --lr 1e-2 --lr-vector 1e-3 --weight-decay 0.3 --clip 0.5")
    torch.manual_seed(0)
    model = GPT(SMALL)
    hidden = [p for p in model.transformer.h.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if not any(p is q for q in hidden)]
    optimizer = torch.optim.AdamW(
        [{"params": hidden}, {"params": rest}], betas=(0.9, 0.95), weight_decay=0.3, fused=True
    )
    tokens = torch.from_numpy(np.fromfile("data/train.bin", dtype=np.uint16).astype(np.int64))
    held_out = torch.from_numpy(np.fromfile("data/val.bin", dtype=np.uint16).astype(np.int64))
    order = torch.randperm((len(tokens) - 1) // 16, generator=torch.Generator().manual_seed(0)).tolist()
    expected = []
    for step in range(4):
        share = 1.0 if step == 0 else 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / 3))
        for group, lr in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = lr * share
        rows = [tokens[16 * n : 16 * n + 17] for n in order[4 * step : 4 * step + 4]]
        optimizer.zero_grad()
        loss = loss_of(model, torch.stack(rows))
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        for p in model.parameters():
            p.grad *= min(1, 0.5 / norm)
        optimizer.step()
        expected.append({"step": step + 1, "loss": loss.item(), "grad_norm": norm, "lr": 1e-2 * share})
        if step % 2:
            starts = [int(n * (len(held_out) - 17) / 3) for n in range(4)]
            with torch.no_grad():
                val_loss = loss_of(model, torch.stack([held_out[start : start + 17] for start in starts])).item()
            expected.append({"step": step + 1, "val_loss": val_loss})
    assert near(log, expected, 1e-5)
    for name, p in model.state_dict().items():
        torch.testing.assert_close(weights()[name], p, rtol=1e-4, atol=1e-6)


def test_every_optimizer_is_another_and_learns(data: Path) -> None:
    losses = {}
    for name in train_gpt.RATES:
        first, *_, last = run(f"--optimizer {name} --steps 10 --eval-every 10 --out {name}")
        losses[name] = last["val_loss"]
        assert last["val_loss"] < first["loss"] - 1e-3, name
    assert len(set(losses.values())) == len(losses) == 10


def test_optimizers_are_what_they_are_called(data: Path) -> None:
    """Muon has the hidden matrices, with its fused projection cut; the paper's have all matrices."""
    model = GPT(SMALL)
    args = {"lr": 0.3, "lr_vector": 0.2, "weight_decay": 0.1, "parallel": None}
    muon = train_gpt.make_optimizer(train_gpt.argparse.Namespace(optimizer="muon", **args), model)
    hidden, rest = muon.param_groups
    assert set(hidden["param_names"]) == {n for n, p in model.named_parameters() if p.ndim > 1 and ".h." in n}
    assert hidden["split"] == {f"transformer.h.{n}.attn.c_attn.weight": "equal(3)" for n in (0, 1)}
    assert [(g["lr"], g["weight_decay"]) for g in (hidden, rest)] == [(0.3, 0.1), (0.2, 0.1)]
    paper = train_gpt.make_optimizer(train_gpt.argparse.Namespace(optimizer="msgd_q", **args), model)
    assert type(paper) is muon_kernels.MuonAdamW
    assert [(g["lr"], g.get("power"), g.get("split")) for g in paper.param_groups] == [
        (0.3, 0.25, None), (0.3, 0.25, "equal(3)"), (0.2, None, None),
    ]  # fmt: skip


def stopped(more: str, folder: str, at: int) -> None:
    """Train until a machine fails after step `at`."""
    step = logs.Log.step

    def failing(self: logs.Log, number: int, **numbers: float) -> None:
        if number > at:
            raise KeyboardInterrupt
        step(self, number, **numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs.Log, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            on_ranks(more, folder)


@pytest.mark.parametrize("name", ["muon", "adamw", "msgd_s", "adam_z"])
def test_resumes_to_the_bit(name: str, data: Path) -> None:
    """A training that stops after its third step goes on from its checkpoint of the second, in the next epoch."""
    more = f"--optimizer {name} --steps 5 --batch-size 60"  # 120 of 249 windows a step: step 3 ends an epoch
    whole = run(f"{more} --out whole")
    stopped(more, str(data.parent), 3)
    assert [row["step"] for row in logs.read(Path("out/log.jsonl"))] == [1, 2, 2, 3]
    torch.manual_seed(1234)  # another process's
    assert run(f"{more} --resume") == whole
    assert all(torch.equal(p, weights("whole")[name]) for name, p in weights().items())
    assert len(list(Path("out").glob("step-*"))) == 1 and not Path("out/writing").exists()


def test_random_numbers_go_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with dropout resumes to the bit, too."""
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, tokens: torch.dropout(forward(self, tokens), 0.1, True))
    whole = run("--out whole")
    stopped("", str(data.parent), 2)
    torch.manual_seed(1234)
    assert run("--resume") == whole


def test_bf16_is_near(data: Path) -> None:
    plain, rounded = run(), run("--dtype bfloat16 --out rounded")
    assert near(plain, rounded, 0.05) and plain != rounded


def test_the_picture_and_the_readers(data: Path) -> None:
    run()
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert logs.running([(1, 4.0), (2, 2.0), (3, 0.0)], 2) == ([2, 3], [3.0, 1.0])
    with Path("out/log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut off
    assert logs.read(Path("out/log.jsonl"))[-1]["step"] == 4


def test_the_124m_model_has_the_sizes_of_gpt2() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, bias=True))
        assert sum(p.numel() for p in model.parameters()) == 124_439_808  # OpenAI's, transformers' GPT2LMHeadModel
        assert sum(p.numel() for p in GPT(GPT2_124M).parameters()) == 124_373_760
    assert sum(p.numel() for p in GPT(TINY).parameters()) == 836_736


# ---- text ----


def test_every_window_comes_once_an_epoch() -> None:
    tokens = np.arange(41, dtype=np.uint16)
    one, two = Batches(tokens, 4, seed=3), [Batches(tokens, 4, seed=3) for _ in range(2)]
    for _ in range(4):
        whole = one.draw(6)
        parts = [batches.draw(6, rank, 2) for rank, batches in enumerate(two)]
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
        assert whole.dtype == torch.int64 and (whole.diff() == 1).all()
    fresh = Batches(tokens, 4, seed=3)
    epochs = [fresh.draw(10)[:, 0].tolist() for _ in range(2)]
    assert [sorted(starts) for starts in epochs] == [list(range(0, 40, 4))] * 2 and epochs[0] != epochs[1]
    moved = Batches(tokens, 4, seed=3)
    moved.position = 20
    assert torch.equal(moved.draw(4), fresh.draw(4))


# ---- ranks ----


def on_ranks(more: str, folder: str) -> list[dict[str, Any]]:
    train_gpt.TINY = SMALL
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run(more)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["muon", "msgd_q", "adam_s"])
def test_two_ranks_train_what_one_does(parallel: str, name: str, data: Path, processes: World) -> None:
    """To the rounding of sums, with two backward passes a rank and step, of which the last one sums gradients."""
    more = f"--optimizer {name} --accumulate 4"
    alone = run(more)
    two, _ = processes.run(2, on_ranks, f"{more} --parallel {parallel} --out two", str(data.parent))
    assert near(two, alone, 2e-3)
    for name_, p in weights("out").items():
        torch.testing.assert_close(weights("two")[name_], p, rtol=0, atol=2e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_resume(parallel: str, data: Path, processes: World) -> None:
    """To the bit in the same way on two, and to rounding in the other way and on one."""
    folder, more = str(data.parent), f"--parallel {parallel}"
    whole, _ = processes.run(2, on_ranks, f"{more} --out whole", folder)
    for out in ("two", "other", "one"):
        processes.run(2, stopped, f"{more} --out {out}", folder, 2)
    again, _ = processes.run(2, on_ranks, f"{more} --out two --resume", folder)
    assert again == whole
    assert all(torch.equal(p, weights("whole")[name]) for name, p in weights("two").items())
    other_way = {"ddp": "fsdp", "fsdp": "ddp"}[parallel]
    other, _ = processes.run(2, on_ranks, f"--parallel {other_way} --out other --resume", folder)
    assert near(other, whole, 2e-3) and near(run("--out one --resume"), whole, 2e-3)


# ---- bad input ----


def tokens(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(400, np.uint16))


BAD: dict[str, tuple[Any, str]] = {
    "odd": (lambda path: tokens(path, b"\1\0" * 400 + b"\1"), "odd number of bytes: 801; is it cut off"),
    "empty": (lambda path: tokens(path, b""), r"at least block_size \+ 1 = 17 tokens but holds 0"),
    "short": (lambda path: tokens(path, b"\1\0" * 16), r"17 tokens but holds 16; give more text or a smaller --block"),
    "npy": (npy, r"is a numpy file; write numpy.load\(path\)"),
    "header": (lambda path: tokens(path, np.array([20240520] + [1] * 400, np.int32).tobytes()), "llm.c's .* tail -c"),
    "int32": (
        lambda path: np.arange(1, 90, dtype=np.int32).tofile(path),
        r"zeros between them, as if they had 4; write numpy.fromfile\(path, 'int32'\)",
    ),
    "int64": (
        lambda path: np.arange(1, 90, dtype=np.int64).tofile(path),
        r"zeros between them, as if they had 8; write numpy.fromfile\(path, 'int64'\)",
    ),
    "text": (lambda path: tokens(path, "Grüße an alle. ".encode() * 400), "is text; make tokens of it: python ex"),
    "zip": (lambda path: np.savez(path.open("wb"), np.zeros(400, np.uint16)), "a zip archive"),
    "gzip": (lambda path: tokens(path, b"\x1f\x8b\x08" + b"\0" * 401), "compressed by gzip"),
    "vocabulary": (
        lambda path: np.array([1] * 400 + [97] + [1] * 9, np.uint16).tofile(path),
        "below the vocabulary's size, 97, but token 400 is 97; give a larger --vocab-size",
    ),
    "missing": (lambda path: path.unlink(), "should be a token file but is not there; examples/prepare_tokens.py"),
}


@pytest.mark.parametrize("file", ["train", "val"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_token_files(kind: str, file: str, data: Path) -> None:
    spoil, message = BAD[kind]
    spoil(data / f"{file}.bin")
    with pytest.raises((ValueError, FileNotFoundError), match=f"{file}.bin.*{message}"):
        run()
    assert not Path("out").exists()


@pytest.fixture(scope="module")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training, once for all that spoil a copy of it."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(data: Path, _trained: Path) -> Path:
    if not any(_trained.iterdir()):
        run()
        shutil.copytree("out", _trained, dirs_exist_ok=True)
    shutil.copytree(_trained, "out", dirs_exist_ok=True)
    return Path("out")


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "out should be new but holds a training; go on with it by --resume"),
        ("--resume --optimizer adamw", "optimizer is 'muon' there and 'adamw' here.*Give the arguments"),
        ("--resume --steps 8", "steps is 4 there and 8 here"),
        ("--resume --block-size 8", "block_size is 16 there and 8 here"),
        ("--resume --seed 1 --lr 0.5", "lr is .* there and 0.5 here; seed is 0 there and 1 here"),
        ("--resume --vocab-size 96", "below the vocabulary's size, 96"),
        ("--resume --data other", "tokens is 4000 there and 3992 here"),
        ("--resume --out none", "none should hold a checkpoint to go on from but holds none"),
    ],
)
def test_a_training_is_not_spoiled(more: str, message: str, data: Path) -> None:
    run()
    Path("other").mkdir()
    for name in ("train", "val"):
        Path(f"other/{name}.bin").write_bytes((data / f"{name}.bin").read_bytes()[16:])
    tokens_96 = np.fromfile(data / "train.bin", np.uint16)
    assert tokens_96.max() == 96
    before = contents("out")
    with pytest.raises((ValueError, OSError), match=message):
        run(more)
    assert contents("out") == before and not Path("none").exists()


def test_a_training_without_a_checkpoint_yet(data: Path) -> None:
    stopped("", str(data.parent), 1)
    with pytest.raises(FileExistsError, match="it has no checkpoint yet, so remove it, or give another --out"):
        run()
    with pytest.raises(FileNotFoundError, match="holds none; begin a training without --resume"):
        run("--resume")
    assert [row["step"] for row in logs.read(Path("out/log.jsonl"))] == [1]


@pytest.mark.parametrize("file", ["about.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("left", [None, 0, 40])
def test_a_damaged_checkpoint(file: str, left: int | None, trained: Path) -> None:
    """Of a file nothing is left, or no byte, or some."""
    path = trained / "step-00000004" / file
    content = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(content[:left])
    before = contents("out")
    with pytest.raises(
        ValueError, match=r"step-00000004 should be a whole checkpoint but cannot be read.* remove out and b"
    ):
        run("--resume")
    assert contents("out") == before


def test_a_log_is_never_half_written(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents("out")["out/log.jsonl"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", lambda self, text: self.write_bytes(text[:9].encode()) and fail())
        logs.Log(Path("out/log.jsonl"), 4, 4)
    assert contents("out")["out/log.jsonl"] == before
    with Path("out/log.jsonl").open("a") as file:
        file.write("7\n")
    with pytest.raises(ValueError, match=r"out/log.jsonl should be a log, .* but line 7 is: '7'"):
        run("--resume")


def fail() -> None:
    raise KeyboardInterrupt


def test_what_ranks_cannot_share(data: Path, processes: World) -> None:
    outcomes = processes.outcomes(2, on_ranks, "--accumulate 3 --parallel ddp", str(data.parent))
    # The other rank may be gone before this one has met it.
    assert not any(returned for returned, _ in outcomes)
    assert any("should be multiples of the 2 ranks" in what for _, what in outcomes)
    with pytest.raises(SystemExit, match="--parallel fsdp needs processes, which torchrun starts"):
        run("--parallel fsdp")
    with pytest.raises(SystemExit):
        train_gpt.main(["--optimizer", "muon"])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("norm", "norm of the gradients of step 3 should be finite but is inf; give a lower --lr"),
        ("evaluate", "held-out loss of step 4 should be finite but is nan; give a lower --lr"),
    ],
)
def test_what_is_lost_is_not_saved(kind: str, message: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of the second step stays, and the training can go on from it."""
    whole = run("--out whole")
    backward, calls, held_out = train_gpt.backward, iter(range(1, 5)), iter([2.0, math.nan])

    def spoilt(net: GPT, *args: Any) -> torch.Tensor:
        loss = backward(net, *args)
        if next(calls) == 3:
            net.transformer.wte.weight.grad[0, 0] = math.inf
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(
            train_gpt, *{"norm": ("backward", spoilt), "evaluate": ("evaluate", lambda *_: next(held_out))}[kind]
        )
        with pytest.raises(FloatingPointError, match=message):
            run()
    assert [path.name for path in Path("out").glob("step-*")] == ["step-00000002"]
    assert [row for row in run("--resume") if "loss" in row] == [row for row in whole if "loss" in row]


def test_a_loss_that_is_lost_is_told(data: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"loss of step \d should be finite but is nan; give a lower --lr"):
        run("--optimizer adamw --lr 1e30 --lr-vector 1e30")
    assert json.loads(Path("out/log.jsonl").read_text().splitlines()[0])["step"] == 1
