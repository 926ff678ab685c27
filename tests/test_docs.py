"""README and docs: Python blocks run, error sentences are in the sources, links of README lead somewhere.

docs/integrations.md has tests of its own, in tests/integrations.
"""

from __future__ import annotations

import ast
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import options_page
import pytest
import torch
import torch.distributed as dist
from torch import nn

import muon_kernels
from muon_kernels import spectra

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs" / "integrations.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(page.relative_to(ROOT).as_posix(), block, id=f"{page.relative_to(ROOT).as_posix()}-{n}")
    for page in PAGES
    for n, block in enumerate(BLOCK.findall(page.read_text()))
]


class Layer(nn.Module):
    """Some of what the pages cut and match by name."""

    def __init__(self, d: int = 48) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv_proj = nn.Linear(d, 96)  # 32 + 8 + 8 heads of 2
        self.gate_up_proj = nn.Linear(d, 96)
        self.lora_B = nn.Linear(8, d, bias=False)
        self.c_attn = nn.Linear(144, d)  # a weight of (inputs, outputs)
        self.attention = nn.Module()
        self.attention.query_key_value = nn.Linear(d, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([self.qkv_proj(self.norm(x)), self.gate_up_proj(x)], -1)[..., : x.shape[-1]]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 48)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.h = nn.ModuleList(Layer() for _ in range(2))
        self.knots = nn.Parameter(torch.randn(4, 8))
        self.head = nn.Linear(48, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randint(64, (8,))).square().mean().backward()
        optimizer.step()


def names() -> dict[str, Any]:
    """What a reader has before a block."""
    torch.manual_seed(0)
    model = Model()
    hidden = [p for layer in model.layers for p in layer.parameters() if p.ndim == 2]
    layers = [Layer() for _ in range(2)]
    for layer in layers:
        layer.experts = nn.Module()
        layer.experts.gate_up = nn.Parameter(torch.randn(2, 32, 48))
    attention = nn.Module()
    attention.q_proj, attention.k_proj = nn.Linear(48, 48), nn.Linear(48, 48)
    attention.qkv = nn.Linear(48, 96)
    attention.max_logits = torch.full((4,), 200.0)
    return {
        "__name__": "__main__",
        "torch": torch,
        "muon_kernels": muon_kernels,
        "model": model,
        "layers": layers,
        "hidden_matrices": hidden,
        "some": hidden[:2],
        "others": hidden[2:],
        "optimizer": muon_kernels.Muon(hidden, lr=0.02),
        "attentions": [attention],
        "G": torch.randn(3, 16, 24),
        "W": torch.randn(3, 16, 24),
        "batches": [(torch.randint(64, (8,)), torch.randint(64, (8,))) for _ in range(2)],
        "train": train,
    }


def an_adamw_run() -> None:
    """adamw.jsonl, that docs/spectra.md compares with."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    recorder = spectra.Recorder(optimizer, model.named_parameters(), every=1, names="layers.*")
    train(model, optimizer)
    recorder.save("adamw.jsonl")


def one_rank() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)


BEFORE: dict[str, Callable[[], None]] = {"docs/spectra.md": an_adamw_run, "docs/distributed.md": one_rank}


@pytest.fixture(autouse=True)
def _as_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_block_runs(page: str, block: str) -> None:
    if page in BEFORE:
        BEFORE[page]()
    namespace = names()
    exec(compile(block, page, "exec"), namespace)
    optimizer = namespace["optimizer"]
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 10
    assert BLOCKS[0].values[0] == "README.md"


def test_nothing_else_is_called_python() -> None:
    """A block under another name would not be run."""
    fences = {line for page in PAGES for line in re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE)}
    assert fences <= {"python", "text", "py"}
    assert [page.name for page in PAGES if "```py\n" in page.read_text()] == ["adding-an-option.md"]  # a sketch


def test_the_sketch_of_a_stage_is_the_stage() -> None:
    """But for its comments, types and docstrings, and the end of its help text."""
    text = (ROOT / "docs" / "design" / "adding-an-option.md").read_text()
    (sketch,) = re.findall(r"^```py\n(class ExactRms.*?)^```", text, re.MULTILINE | re.DOTALL)
    source = (ROOT / "muon_kernels" / "stages" / "exact_rms.py").read_text()
    lines = [line for line in sketch.splitlines() if line.strip() and not re.match(r" +(def|help) ?", line)]
    assert len(lines) > 10 and [line for line in lines if line not in source.splitlines()] == []
    assert re.findall(r"def \w+", sketch) == re.findall(r"def \w+", source)


def templates() -> Iterator[str]:
    """Every text of the sources, what is put in as `…`."""
    for path in [*sorted((ROOT / "muon_kernels").rglob("*.py")), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_error_sentences_are_the_sources() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    sentences = re.findall(r"^```text\n(.*?)\n```", text, re.MULTILINE | re.DOTALL)
    assert len(sentences) >= 20
    known = "\n".join(templates())
    # Constants are put in as well, so the pieces between are looked for, one by one.
    missing = []
    for sentence in sentences:
        pieces = re.split("…|: a part of a flat vector.*", sentence)
        missing += [(piece, sentence) for piece in pieces if piece.strip() not in known]
    assert missing == []


@pytest.mark.parametrize(("page", "least"), [("README.md", 16), ("examples/README.md", 2), ("tools/ptx/README.md", 6)])
def test_links_of_a_readme_lead_somewhere(page: str, least: int) -> None:
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text())
    assert len(targets) >= least
    assert [t for t in targets if not t.startswith("http") and not (ROOT / page).parent.joinpath(t).exists()] == []


def test_the_readme_says_how_to_test() -> None:
    command = "python -m pytest -n auto --dist loadfile\n"
    assert command in (ROOT / "README.md").read_text() and command in (ROOT / ".ci" / "run").read_text()


def test_the_page_of_options_on_ranks_is_what_the_tests_run() -> None:
    """`PYTHONPATH=tests python tests/distributed/options_page.py` writes it anew."""
    assert (ROOT / "docs" / "distributed-options.md").read_text() == options_page.page()
