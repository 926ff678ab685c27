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
    assert len(room._of_graphs) == 1
