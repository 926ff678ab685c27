"""`python -m muon_kernels verify --emulated`: all stages but NVIDIA's tools, on what executes the CUDA kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ptx import standin
from test_end_to_end import needs_nvcc

from muon_kernels.backends import cuda
from muon_kernels.checks import steps
from muon_kernels.cli import main
from muon_kernels.cli.verify import correct, emulation, workloads
from muon_kernels.cli.verify.stage import Context
from muon_kernels.cli.verify.traces import fused

pytestmark = needs_nvcc


def test_all_stages(
    built: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shape of each kind: results are right, and the code that will time things on a GPU runs."""
    sizes = workloads.TINY._replace(products=workloads.TINY.products[1:], steps=((24, 40),), biased=(64,))
    monkeypatch.setattr(workloads, "TINY", sizes)
    device = cuda._device
    file = tmp_path / "found.json"
    assert main(["verify", "--emulated", "--json", str(file)]) == 0
    assert cuda._device is device, "the backend is what it was before"
    found = {stage["name"]: stage for stage in json.loads(file.read_text())["stages"]}
    correct = {name: "ok" for name in ("facts", "products", "steps")}
    timed = {name: "rehearsed" for name in ("ceilings", "sweep", "crossovers", "models", "gaps", "passes", "fused")}
    tools = {name: "needs a GPU" for name in ("sanitizer", "ncu")}
    assert {name: stage["status"] for name, stage in found.items()} == correct | timed | tools
    assert found["facts"]["data"]["device"] == "executor of sm_80"
    assert found["products"]["data"]["cases by implementation"].keys() == {"cuda, bf16", "cuda, f16"}
    assert found["products"]["data"]["kernels"] == {"cuda": []}, "the profiler sees no launches of the executor"
    assert found["steps"]["data"]["left out"] == [] == found["products"]["data"]["left out"]
    assert "cuda" in found["models"]["data"]["workloads"]["tiny"]
    assert set(found["fused"]["data"]["us"]) == {"cuda, 1 of 16x24", "cuda, 2 of 16x24"}
    assert "executor of sm_80; cuda" in capsys.readouterr().out


def test_what_is_not_fused_is_not_timed_as_such(emulated: standin.Runtime) -> None:
    with emulation.place() as place:
        assert not fused(Context(place, workloads.TINY._replace(fused_rows=(130,), fused_columns=(140,)))).data["us"]


def test_a_replay_that_fails_is_said(emulated: standin.Runtime) -> None:
    with emulation.place() as place:
        assert place.graph is not None
        graph = place.graph()
        with graph.capture():
            pass
        with pytest.raises(RuntimeError, match="a replay failed with CUDA error"):
            graph.replay()


def test_captured_steps(emulated: standin.Runtime) -> None:
    """Of one launch alone; tests/cuda/test_end_to_end.py has the others."""
    with emulation.place() as place:
        assert place.graph is not None
        graph = place.graph()

        here = correct.Here("cuda", "cpu", graph.capture, graph.replay)
        steps.captured_steps_replay(here, [(24, 40)])
