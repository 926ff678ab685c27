"""Every block of docs/integrations.md runs as it stands."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

DOCUMENT = Path(__file__).parents[2] / "docs" / "integrations.md"
LIBRARIES = ("accelerate", "lightning", "peft", "timm", "torchao", "transformers")


def blocks() -> list[tuple[str, str]]:
    """Heading and text of every Python block."""
    found = []
    for section in re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        found += [(heading, block) for block in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)]
    return found


BLOCKS = blocks()


@pytest.fixture(autouse=True)
def _as_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, one rank of torchrun, and torchao's step uncompiled, which takes a minute otherwise."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.compiler.reset()


def test_every_library_has_a_block() -> None:
    text = "\n".join(block for _, block in BLOCKS)
    assert [name for name in LIBRARIES if not re.search(rf"^(import|from) {name}\b", text, re.MULTILINE)] == []


@pytest.mark.parametrize("heading, block", BLOCKS, ids=[heading for heading, _ in BLOCKS])
def test_block_trains(heading: str, block: str) -> None:
    """It leaves a finite `model` and an `optimizer` that has stepped each parameter it can."""
    for name in LIBRARIES:
        if re.search(rf"^(import|from) {name}\b", block, re.MULTILINE):
            pytest.importorskip(name)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with torch.compiler.set_stance("force_eager") if "torchao" in block else nullcontext():
        exec(compile(block, f"{DOCUMENT}: {heading}", "exec"), namespace)
    model, optimizer = namespace["model"], namespace["optimizer"]
    optimizer = getattr(optimizer, "optim", optimizer)  # of a wrapper
    assert all(torch.isfinite(p).all() for p in model.parameters())
    stepped = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    assert optimizer.state and all(optimizer.state[p] for p in stepped)
