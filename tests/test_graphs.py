"""Steps that are captured in a CUDA graph, on several GPUs: by a stand-in of what torch says of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from muon_kernels import Muon
from muon_kernels.graphs import capturing
from muon_kernels.split import qkv
from muon_kernels.step import run, workspace


@pytest.mark.parametrize("captured", [0, 1, None])
@pytest.mark.parametrize("current", [0, 1])
def test_the_stream_of_the_device_is_asked(current: int, captured: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the current device, which stays what it was."""
    now = [current]

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        now.append(of.index)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[-1] == captured)
    assert [capturing(torch.device("cuda", i)) for i in range(2)] == [captured == 0, captured == 1]
    assert now == [current] and not capturing(torch.device("cpu"))


def test_random_bits_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would round by the same ones again; what does not round is captured."""
    p = nn.Parameter(torch.ones(8, 16).bfloat16())
    p.grad = torch.ones_like(p)
    asked: list[torch.device] = []
    monkeypatch.setattr(run, "capturing", lambda device: not asked.append(device))  # type: ignore[func-returns-value]
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="stochastic_rounding should not be captured in a graph"):
        Muon([p], lr=0.5, stochastic_rounding=True).step()
    assert asked == [p.device] and torch.equal(p, before)
    Muon([p], lr=0.5).step()
    assert not torch.equal(p, before)


class Streams:
    """Stand-in for a device's streams: says which is the current one, and whether it is captured, and notes uses."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current: object = "its own"
        self.captured = False
        self.uses: set[tuple[int, object]] = set()
        patch.setattr(workspace, "stream", lambda device: self.current)
        patch.setattr(workspace, "capturing", lambda device: self.captured)
        note = lambda t, stream: self.uses.add((t.data_ptr(), stream))
        patch.setattr(torch.Tensor, "record_stream", note, raising=False)


def matrix(rows: int, cols: int) -> nn.Parameter:
    p = nn.Parameter(torch.randn(rows, cols))
    p.grad = torch.randn(rows, cols)
    return p


def test_what_a_graph_has_seen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger bucket takes another block; a replay would write into whatever lies in the first one by then."""
    streams = Streams(monkeypatch)
    optimizer = Muon([matrix(16, 32)], backend="eager")
    optimizer.step()
    streams.captured = True
    optimizer.step()
    optimizer.step()
    streams.captured = False
    (seen,) = optimizer._workspace._blocks.values()
    gone = weakref.ref(seen)
    address = seen.data_ptr()
    del seen
    optimizer.add_param_group({"params": [matrix(160, 320)]})
    optimizer.step()
    assert gone() is not None and [t.data_ptr() for t in optimizer._workspace._captured] == [address]
    assert address not in optimizer._workspace.addresses()
    (larger,) = optimizer._workspace._blocks.values()
    unseen = weakref.ref(larger)
    del larger
    optimizer.add_param_group({"params": [matrix(320, 640)]})
    optimizer.step()
    assert unseen() is None


def test_copies_that_a_graph_has_seen_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a split that no strides describe, which a later group has made anew."""
    streams = Streams(monkeypatch)
    optimizer = Muon([matrix(48, 32)], split=qkv(4, interleaved=True), backend="eager")
    streams.captured = True
    optimizer.step()
    streams.captured = False
    kept = sorted(t.numel() for t in optimizer._workspace._captured)
    assert kept[:3] == [3 * 16 * 32] * 3  # of gradient, momentum and parameter; the block is the fourth
    assert len(kept) == 4


def test_every_stream_that_works_with_it_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch then waits for it before it gives the memory to somebody else."""
    streams = Streams(monkeypatch)
    optimizer = Muon([matrix(16, 32)], backend="eager")
    optimizer.step()
    streams.current = "another"
    optimizer.step()
    (address,) = optimizer._workspace.addresses()
    assert {(address, "its own"), (address, "another")} <= streams.uses


def test_a_graph_s_workspace_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a captured step when the workspace grows; of one that ran, none is kept twice."""
    now = [False]
    monkeypatch.setattr(workspace, "capturing", lambda device: now[0])
    room, device = workspace.Workspace(), torch.device("cpu")
    room.reserve(device, 100)
    before = weakref.ref(room._blocks[device])
    room.reserve(device, 200)
    assert before() is None, "memory of a step that only ran is given back before there is more"
    now[0] = True
    for _ in range(2):
        room.reserve(device, 150)
    captured = weakref.ref(room._blocks[device])
    now[0] = False
    room.reserve(device, 300)
    assert captured() is not None and room.addresses() == [room._blocks[device].data_ptr()] != [captured().data_ptr()]
    assert len(room._captured) == 1
