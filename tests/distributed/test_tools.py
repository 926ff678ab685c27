"""Recorder of spectra and QK-Clip on parts and copies of matrices, against one process."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import World
from test_layouts import CONTEXT, LAYOUTS, full, groups_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial, _StridedShard
from torch.optim import SGD, AdamW, Optimizer

from muon_kernels import Muon, MuonAdamW, spectra
from muon_kernels.cli.demo import GPT
from muon_kernels.spectra import shares


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ spectra


@contextmanager
def watched() -> Iterator[tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[Any]]]:
    """Sizes of what this rank measures and puts together, and what it is asked to agree on."""
    measured: list[tuple[int, ...]] = []
    gathered: list[tuple[int, ...]] = []
    asked: list[Any] = []
    before = shares.summary, DTensor.full_tensor, dist.all_gather_object
    shares.summary = lambda W: measured.append(tuple(W.shape)) or before[0](W)  # type: ignore[func-returns-value]
    DTensor.full_tensor = lambda t: gathered.append(tuple(t.shape)) or before[1](t)  # type: ignore
    dist.all_gather_object = lambda *args, **rest: asked.append(args[1]) or before[2](*args, **rest)  # type: ignore
    try:
        yield measured, gathered, asked
    finally:
        shares.summary, DTensor.full_tensor, dist.all_gather_object = before  # type: ignore[method-assign]


def record(layout: str, folder: str) -> tuple[list[spectra.Row], list[spectra.Row], list[int]]:
    """Rows of the second of three steps, here and in one process; what the steps measured and agreed on."""
    torch.manual_seed(0)
    model = GPT(40, 2, 4, CONTEXT)
    alone = copy.deepcopy(model)
    trained = LAYOUTS[layout](model)
    shared = {"process_group": dist.group.WORLD} if layout == "ddp" else {}
    optimizer = MuonAdamW(groups_of(trained), muon_options=shared)
    reference = MuonAdamW(groups_of(alone))
    named = getattr(trained, "module", trained).named_parameters()
    recorder = spectra.Recorder(optimizer, named, every=2, names="layers.*")
    expected = spectra.Recorder(reference, alone.named_parameters(), every=2, names="layers.*")
    counts = []
    for step in range(3):
        torch.manual_seed(100 + 10 * step + dist.get_rank())
        trained(torch.randint(256, (2, CONTEXT + 1))).backward()
        for p, q in zip(trained.parameters(), alone.parameters(), strict=True):
            q.grad = None if p.grad is None else full(p.grad).clone()
        reference.step()
        with watched() as (measured, gathered, asked):
            optimizer.step()
        counts.append((len(measured), len(gathered), len(asked)))
        optimizer.zero_grad()
    recorder.save(f"{folder}/{dist.get_rank()}.jsonl")
    expected.save(f"{folder}/alone-{dist.get_rank()}.jsonl")
    return recorder.rows, expected.rows, counts


SIZES = {"ddp": 3, "fsdp": 3, "hsdp": 4, "tp": 2, "fsdp and tp": 4}


@pytest.mark.parametrize("layout", SIZES)
def test_a_training_has_the_record_of_one_process(ranks: World, layout: str, tmp_path: Path) -> None:
    """On every rank; one of them writes the file; ranks share the work; other steps cost nothing."""
    found = ranks.run(SIZES[layout], record, layout, str(tmp_path))
    for rows, expected, _ in found:
        assert len(expected) == 3 * 8 and {row["step"] for row in expected} == {2}
        assert rows == expected
    assert sorted(path.name for path in tmp_path.glob("[0-9]*")) == ["0.jsonl"]
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "alone-0.jsonl").read_bytes()
    print([c for *_, c in found])
