"""A step that finds no memory changes nothing, whichever tensor it is that finds none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import needs
from garbling import snapshot
from torch import Tensor, nn

from muon_kernels import Muon, memory
from muon_kernels.backends import cpu

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="preloads a library that cc makes")
def test_every_tensor_of_a_step(tmp_path: Path) -> None:
    library = tmp_path / "failing_memory.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "failing_memory.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "failing_memory.py"), str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    tried = re.search(r"(\d+) tried, 0 wrong", done.stdout)
    assert done.returncode == 0 and tried is not None, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert int(tried[1]) > 100


def made(*groups: list[tuple[int, ...]], **options: Any) -> Muon:
    """Of groups of parameters with these shapes, with gradients."""
    params = [[nn.Parameter(torch.ones(shape)) for shape in shapes] for shapes in groups]
    for p in chain(*params):
        p.grad = torch.ones_like(p)
    return Muon([{"params": group, "lr": 0.1 + i} for i, group in enumerate(params)], **options)


def unchanged_without_memory(optimizer: Muon, missing: Callable[[Tensor], bool], patch: pytest.MonkeyPatch) -> None:
    """A step raises and has written nothing where there is no memory for tensors that are `missing`."""
    empty, before = torch.empty, snapshot(optimizer)

    def limited(*size: Any, **options: Any) -> Tensor:
        t = empty(*size, **options)
        if missing(t):
            raise RuntimeError("no memory")
        return t

    with patch.context() as patched, pytest.raises(RuntimeError, match="no memory"):
        patched.setattr(torch, "empty", limited)
        optimizer.step()
    assert snapshot(optimizer) == before


def test_memory_that_a_larger_step_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds no room has let go of what smaller ones were rehearsed with: they begin by having it again."""
    monkeypatch.setattr(memory._kept, "block", None)
    small, large = (made(shapes, power=1.0, backend="eager") for shapes in ([(2, 3), (20, 30)], [(200, 300)]))
    small.step()
    for optimizer in (large, small):
        unchanged_without_memory(optimizer, lambda t: t.nbytes > 1000, monkeypatch)  # enough for the first matrix


@needs.cpu_kernels
def test_memory_in_a_workspace_that_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of a fused step, which know where they lie, are made anew, and their scales with them."""
    with cpu.forced(cpu.instruction_sets()[0]):
        optimizer = made([(8, 6, 5), (8, 7, 5)], [(40, 30)], backend="cpu")
        assert [bucket.fused for bucket in optimizer.plan().buckets] == [True, True, False]
        late = optimizer.param_groups[1]["params"][0]
        late.grad = None
        optimizer.step()
        late.grad = torch.ones_like(late)
        scales: list[Tensor] = []

        def second(t: Tensor) -> bool:
            scales.extend([t] * (t.dtype == torch.float32 and not t.is_meta))
            return len(scales) == 2

        unchanged_without_memory(optimizer, second, monkeypatch)
        optimizer.step()
