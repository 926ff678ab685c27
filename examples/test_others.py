"""The other examples: two steps of each, and what each is there to show."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import convnet
import moe
import muonclip
import numpy as np
import plot_log
import prepare_tokens
import pytest
import torch
import train_gpt
import zero
from common import logs
from common.gpt import GPT, GPTConfig
from ranks import World
from torch import Tensor
from torch.nn import functional as F

from muon_kernels import Muon, MuonAdamW

SMALL = GPTConfig(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def small(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, and the text of the tests where the examples look for theirs."""
    for module in (moe, muonclip):
        monkeypatch.setattr(module, "TINY", SMALL)
    Path("runs").mkdir()
    data.rename("runs/python-bytes")


# ---- all of them ----

FOLDER = Path(__file__).parent
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if not path.name.startswith(("test_", "conftest")))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_short_and_say_how_to_run_them(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "finetune_lora.py":
        pytest.importorskip("peft", reason="peft is not installed")
    text = (FOLDER / name).read_text()
    assert len(text.splitlines()) < 200
    assert f"| [{name}]({name}) |" in (FOLDER / "README.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name.removesuffix(".py")).main(["--help"])
    help_text = capsys.readouterr().out
    assert not stopped.value.code and f"examples/{name}" in help_text and text.splitlines()[0].strip('"') in help_text


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *(
            (train_gpt, f"--{of} {n}", "should be 1 or more")
            for of in ("steps", "accumulate", "eval-every")
            for n in (0, -3)
        ),
        *((train_gpt, f"--{of} 0", "should be 1 or more") for of in ("batch-size", "eval-batches", "block-size")),
        (train_gpt, "--vocab-size -5", "argument --vocab-size: should be 1 or more but is: -5"),
        (train_gpt, "--warmup -1", "should be 0 or more but is: -1"),
        *((train_gpt, f"--optimizer adamw --lr {n}", "should be 0 or more, and finite") for n in ("-1", "nan", "inf")),
        (train_gpt, "--weight-decay -1", "should be 0 or more, and finite"),
        *((train_gpt, f"--clip {n}", "should be above 0 (inf bounds nothing) but is") for n in ("0", "-1", "nan")),
        (train_gpt, "--seed 99999999999999", "should be from 0 to 2**32 - 1"),
        (train_gpt, "--steps 1.5", "invalid int value: '1.5'"),
        (convnet, "--epochs 0", "should be 1 or more"),
        (moe, "--chosen 9", "--chosen should be at most the 8 --experts but is: 9"),
        (muonclip, "--tau 0", "should be above 0"),
        (zero, "--batch-size 0", "should be 1 or more"),
    ],
)
def test_numbers_that_make_no_sense(
    name: Any, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        name.main([*["--tiny"] * (name is train_gpt), *arguments.split()])
    assert message in capsys.readouterr().err and not Path("runs").exists()


# ---- moe.py ----


def test_a_mixture_is_deepseeks() -> None:
    """Token by token: sigmoid gates, the bias for the choice alone, weights that sum to 1, and the shared expert."""
    torch.manual_seed(0)
    mixture, x = moe.Mixture(SMALL, moe.Routing(experts=5, chosen=2)), torch.randn(3, 4, 16)
    for p in (mixture.up, mixture.down):
        torch.nn.init.normal_(p)
    mixture.bias.copy_(torch.tensor([0.0, 0.3, -0.3, 0.0, 0.1]))
    expected, load = torch.empty(12, 16), [0] * 5
    moved = 0
    for n, token in enumerate(x.view(12, 16)):
        gates = [1 / (1 + math.exp(-float(row @ token))) for row in mixture.router.weight]
        order = sorted(range(5), key=lambda e: gates[e] + float(mixture.bias[e]))
        moved += {*order[-2:]} != {*sorted(range(5), key=gates.__getitem__)[-2:]}
        expected[n] = mixture.shared_down(F.gelu(mixture.shared_up(token)))
        for expert in order[-2:]:
            load[expert] += 1
            weight = gates[expert] / sum(gates[e] for e in order[-2:])
            expected[n] += weight * (mixture.down[expert] @ F.gelu(mixture.up[expert] @ token))
    torch.testing.assert_close(mixture(x), expected.view_as(x))
    assert moved, "the bias should have chosen otherwise somewhere"
    before = mixture.bias.clone()
    assert mixture.load.tolist() == load
    assert mixture.rebalance() == pytest.approx([n * 5 / 24 for n in load])
    steps = [(0 if n * 5 == 24 else -1 if n * 5 > 24 else 1) * 1e-3 for n in load]
    assert (mixture.bias - before).tolist() == pytest.approx(steps, abs=1e-7) and not mixture.load.any()


def test_moe_runs(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    moe.main("--steps 2 --experts 4".split())
    first, _, last = logs.read(Path("runs/moe/log.jsonl"))
    assert [len(layer) for layer in first["loads"]] == [4, 4]
    assert all(sum(layer) == pytest.approx(4) for layer in first["loads"])
    assert math.isfinite(last["val_loss"]) and Path("runs/moe/loads.png").read_bytes().startswith(b"\x89PNG")
    assert "stack of matrices in Mixture" in capsys.readouterr().out


def test_biases_balance() -> None:
    """A router that likes two experts is made to share the tokens out; without speed it goes on as it was."""
    torch.manual_seed(0)
    tokens = torch.randn(4, 64, 16) + 1
    for speed, balanced in ((0.01, True), (0.0, False)):
        mixture = moe.Mixture(SMALL, moe.Routing(experts=6, chosen=2, speed=speed))
        with torch.no_grad():
            mixture.router.weight[:2] += 0.1
            busiest = []
            for _ in range(100):
                mixture(tokens)
                busiest.append(max(mixture.rebalance()))
        assert busiest[0] > 2 and (max(busiest[-5:]) < 1.3) is balanced


# ---- muonclip.py ----


def test_logits_are_held(small: None) -> None:
    """No logit passes tau by more than a step's growth, while without QK-Clip they go on."""
    muonclip.main("--steps 12 --lr 0.5 --tau 2".split())
    free, held = (
        [row["max_logit"] for row in logs.read(Path(f"runs/muonclip/{name}.jsonl")) if "loss" in row]
        for name in ("without clip", "tau 2")
    )
    assert max(free) > 6 and max(held) < 0.6 * max(free)
    assert Path("runs/muonclip/logits.png").read_bytes().startswith(b"\x89PNG")


def test_clipping_halves_what_it_should() -> None:
    """Only rows of heads that passed tau change, and their logits are tau afterwards."""
    torch.manual_seed(0)
    attention, x = muonclip.ClippedAttention(SMALL), 9 * torch.randn(2, 8, 16)
    attention(x)
    before, low = attention.c_attn.weight.detach().clone(), attention.max_logits.min().item()
    tau = (low + attention.max_logits.max().item()) / 2
    attention.clip(tau)
    attention(x)
    assert sorted(attention.max_logits.tolist()) == pytest.approx([low, tau], rel=1e-4)
    assert torch.equal(attention.c_attn.weight[32:], before[32:])


# ---- convnet.py ----


def test_convnet_learns_and_flattens(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, whose digits this reads, is not installed")
    results = convnet.main(["--epochs", "1"])
    assert all(accuracy > 0.4 for _, accuracy in results.values())
    optimizer = convnet.make_optimizer("Muon", convnet.ConvNet())
    assert isinstance(optimizer, MuonAdamW)
    assert [p.ndim for p in optimizer.param_groups[0]["params"]] == [4, 4]
    assert "64x32x3x3  Muon       flattened to a matrix in Conv2d" in capsys.readouterr().out


def test_convolutions_are_stepped_as_matrices() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = torch.nn.Parameter(weight.detach().flatten(1))
    weight.grad = torch.randn(8, 4, 3, 3)
    matrix.grad = weight.grad.flatten(1)
    for p in (weight, matrix):
        Muon([p], lr=0.1).step()
    assert torch.equal(weight.flatten(1), matrix)


def test_convnet_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"scikit-learn's digits need sklearn.*pip install scikit-learn"):
        convnet.digits()


# ---- zero.py ----


def on_ranks(folder: str) -> dict[str, tuple[list[float], list[int]]]:
    zero.TINY = SMALL
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return zero.main("--steps 3 --batch-size 4".split())


def test_zero_trains_what_ddp_does_with_less_state(small: None, tmp_path: Path, processes: World) -> None:
    found, other = processes.run(2, on_ranks, str(tmp_path))
    assert found == other
    (ddp, whole), (shared, less), (zero_losses, least) = (found[way] for way in zero.WAYS)
    assert ddp == shared and len(set(ddp)) == 3
    assert zero_losses == pytest.approx(ddp, rel=2e-3)
    elements = sum(p.numel() for p in GPT(SMALL).parameters())
    hidden = sum(p.numel() for p in GPT(SMALL).transformer.h.parameters() if p.ndim > 1)
    assert all(4 * (2 * elements - hidden) <= size < 4 * (2 * elements - hidden) + 200 for size in whole)
    assert all(4 * (2 * elements - 1.5 * hidden) < size + 500 < whole[0] for size in less)
    assert all(size <= 0.52 * whole[0] for size in least)


def test_zero_needs_ranks() -> None:
    with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node 2 examples/zero\.py"):
        zero.main([])


# ---- finetune_lora.py ----


def test_lora_learns_by_its_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    import finetune_lora
    from peft import PeftModel

    found = finetune_lora.main("--pretrain-steps 2 --steps 20".split())
    assert found["after"][1] < found["before"][1] - 0.2
    text = capsys.readouterr().out
    assert "lora_A" in text and "frozen" in text
    # The adapters alone make the model again: the base is that of the seed after two steps.
    base = finetune_lora.tiny_llama(0)
    code, _ = finetune_lora.parted(finetune_lora.code(), finetune_lora.encode_bytes)
    _, reference = finetune_lora.parted(finetune_lora.reference(), finetune_lora.encode_bytes)
    finetune_lora.train(base, code, 2, 1e-2, 0, "")
    again = PeftModel.from_pretrained(base, "runs/lora")
    assert finetune_lora.loss_on(again, reference) == pytest.approx(found["after"][1], abs=1e-3)


def test_lora_steps_what_is_not_frozen() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    import finetune_lora
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(finetune_lora.tiny_llama(0), LoraConfig(r=4, target_modules="all-linear"))
    muon, adamw = finetune_lora.make_optimizer(model, 0.1).param_groups
    assert all(".lora_" in name for name in muon["param_names"]) and len(muon["param_names"]) == 4 * 7 * 2
    assert adamw["params"] == []


def test_lora_trains_nothing_that_it_cannot_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    import finetune_lora

    monkeypatch.setattr(finetune_lora, "train", None)
    Path("file").touch()
    with pytest.raises(OSError, match="file"):
        finetune_lora.main(["--out", "file/lora"])


def test_lora_wants_enough_text() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    import finetune_lora

    with pytest.raises(ValueError, match="at least 1280 tokens but has 2"):
        finetune_lora.parted(["a", "b"], finetune_lora.encode_bytes)


# ---- prepare_tokens.py and plot_log.py ----


def texts(count: int) -> None:
    Path("texts/deep").mkdir(parents=True)
    for n in range(count):
        Path(f"texts/deep/{n:02d}.txt").write_bytes(bytes([65 + n]) * 10)
    Path("texts/picture.png").write_bytes(b"\x89PNG")


def read(name: str) -> bytes:
    tokens = np.fromfile(f"out/{name}.bin", np.uint16)
    assert tokens.max() < 256
    return bytes(tokens.astype(np.uint8))


def test_bytes_become_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    texts(12)
    prepare_tokens.main("texts --suffix txt --tokenizer bytes --out out".split())
    documents = [bytes([65 + n]) * 10 + b"\0" for n in range(12)]
    assert read("val") == documents[9] and read("train") == b"".join(documents[:9] + documents[10:])
    assert "121 tokens to train on, 11 held out" in capsys.readouterr().out


def test_few_files_give_their_ends() -> None:
    texts(2)
    prepare_tokens.main("texts/deep --tokenizer bytes --out out".split())
    assert read("train") == b"A" * 9 + b"B" * 9 and read("val") == b"A\0B\0"


def test_gpt2_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """By tiktoken, with a vocabulary that needs no download: bytes, and one pair of them."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    ranks = {bytes([n]): n for n in range(256)} | {b"AA": 256}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    texts(1)
    prepare_tokens.main("texts/deep --out out".split())
    tokens = np.concatenate([np.fromfile(f"out/{name}.bin", np.uint16) for name in ("train", "val")])
    assert tokens.tolist() == [256] * 5 + [50256]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing --out out --tokenizer bytes", "files or folders but are not there: nothing"),
        ("texts --suffix .md --out out --tokenizer bytes", "should hold files that end in .md but hold none: texts"),
        ("texts/picture.png --out out --tokenizer utf8", "picture.png should be UTF-8 text but is not: invalid start"),
        ("empty --out out --tokenizer bytes", "hold text to train on and to hold out but hold 1 tokens"),
        ("texts zeros --out out --tokenizer bytes", "zeros should be text but has a zero byte, at 3, as pictures"),
        (
            "texts --out there --tokenizer bytes",
            "there should be a new folder, or an empty one, but is not; give another",
        ),
    ],
)
def test_bad_texts(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As GPT-2's tokenizer, which may not be installed, "utf8" decodes the text."""
    monkeypatch.setitem(prepare_tokens.ENCODERS, "utf8", lambda: lambda text: list(map(ord, text.decode())))
    texts(2)
    for folder in ("there", "empty"):
        Path(folder).mkdir()
    Path("there/val.bin").write_bytes(b"mine")
    Path("empty/nothing").touch()
    Path("zeros").write_bytes(b"abc\0d")
    with pytest.raises(SystemExit):
        prepare_tokens.main(arguments.split())
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert (
        not list(Path().glob("out*"))
        and not list(Path().glob("*writing*"))
        and [path.name for path in Path("there").iterdir()] == ["val.bin"]
    )


def test_an_interruption_leaves_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next training makes them whole."""

    def interrupted(file: Path, encode: prepare_tokens.Encoder) -> np.ndarray:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_tokens, "_encoded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_tokens.standard_library(Path("runs/bytes"))
    assert list(Path("runs").iterdir()) == []
    monkeypatch.setattr(prepare_tokens, "_encoded", lambda file, encode: np.arange(20, dtype=np.uint16))
    prepare_tokens.standard_library(Path("runs/bytes"))
    assert sorted(path.name for path in Path("runs/bytes").iterdir()) == ["train.bin", "val.bin"]


def test_two_that_make_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there first stays: a second process began before and ends after it."""
    texts(12)
    encoded = prepare_tokens._encoded
    others = iter([True])

    def overtaken(file: Path, encode: prepare_tokens.Encoder) -> np.ndarray:
        if next(others, False):
            prepare_tokens.prepare(sorted(Path("texts/deep").glob("*.txt")), Path("out"), lambda text: [7])
        return encoded(file, encode)

    monkeypatch.setattr(prepare_tokens, "_encoded", overtaken)
    monkeypatch.setattr(prepare_tokens.sysconfig, "get_paths", lambda: {"stdlib": "texts/deep"})
    for n in range(12):
        Path(f"texts/deep/{n:02d}.py").write_bytes(b"x")
    prepare_tokens.standard_library(Path("out"))
    assert set(read("train")) == {7} and len(read("train")) == 11
    assert not list(Path().glob("*writing*"))


def test_without_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    texts(2)
    with pytest.raises(SystemExit, match="needs tiktoken: pip install tiktoken, or take --tokenizer bytes"):
        prepare_tokens.main("texts --out out".split())


def test_plots_of_several(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 1.5}]
    for name in ("a", "b"):
        with logs.Log(Path(name, "log.jsonl"), 0, 2) as log:
            for row in rows if name == "a" else rows[:2]:  # the second is not through yet
                log.write(row)
    plot_log.main(["a", "b"])
    assert Path("losses.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        plot_log.main(["a", "c"])
    drawn: list[list[str]] = []
    monkeypatch.setattr(logs, "draw", lambda of, to: drawn.append([*of]))
    shutil.copytree("a", "b/a")
    plot_log.main(["a", "b"])
    plot_log.main(["a", "b/a"])
    monkeypatch.chdir("b")
    plot_log.main(["."])
    assert drawn == [["a", "b"], ["a", "b/a"], ["b"]]
    assert "should be folders with a log.jsonl, but these have none: c" in capsys.readouterr().err


def test_shapes_of_windows_of_a_model() -> None:
    tokens: Tensor = torch.randint(97, (2, 16))
    assert GPT(SMALL)(tokens).shape == (2, 16, 97)
