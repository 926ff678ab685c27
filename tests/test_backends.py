"""Which backend "auto" takes, and what it says of the others."""

from __future__ import annotations

from typing import get_origin, get_type_hints

import pytest
import torch
from torch import nn

from muon_kernels import Muon, backends
from muon_kernels.backends import cuda, triton

GPU = torch.device("cuda")


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    capability: tuple[int, int] | None,
    missing: tuple[str, ...] = (),
    name: str = "auto",
    wgmma: bool = False,
    gpu: str = "no GPU's name",
) -> tuple[str, tuple[str, ...]]:
    """On a GPU of a compute capability, or on one that is not NVIDIA's; with code for sm_90a or without."""
    monkeypatch.setattr(cuda, "_device", cuda._Device())  # which has read nothing that is kept
    monkeypatch.setattr(cuda._device, "has_wgmma", lambda: wgmma)
    monkeypatch.setattr(cuda._device, "name", lambda device: gpu)
    for module in (cuda, triton):
        here = module.__name__.rpartition(".")[2]
        reason = f"{here} is missing; install it" if here in missing else None
        monkeypatch.setattr(module._device, "unavailable", lambda reason=reason: reason)
        monkeypatch.setattr(module._device, "capability", lambda device: capability)
    monkeypatch.setattr(triton, "remarks", lambda *_: ("remarked",))
    return backends.choose(name, GPU, [torch.float32], torch.bfloat16, (rows, 4096))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
@pytest.mark.parametrize("rows", [1, 64, 128, 129, 768, 4096])
def test_triton_is_taken_for_its_tensor_instructions(
    monkeypatch: pytest.MonkeyPatch, rows: int, capability: tuple[int, int]
) -> None:
    name, notes = chosen(monkeypatch, rows, capability)
    if capability[0] in (9, 10) and rows > 128:
        why, remark = notes
        assert name == "triton" and remark == "remarked"
        assert why.startswith(f"cuda was not chosen for {rows}x4096: on compute capability {capability[0]}.")
        assert "tcgen05" in why if capability[0] == 10 else "wgmma" in why
    else:
        assert (name, notes) == ("cuda", ())
    remarks = ("cuda multiplies by mma.sync: it was built without code for sm_90a",)
    assert chosen(monkeypatch, rows, capability, name="cuda") == (
        "cuda",
        remarks if capability[0] == 9 and rows > 128 else (),
    )
    assert chosen(monkeypatch, rows, capability, name="triton") == ("triton", ("remarked",))


@pytest.mark.parametrize("proven", [False, True])
@pytest.mark.parametrize("rows", [128, 129, 4096])
def test_cuda_s_wgmma_is_taken_once_it_is_proven(monkeypatch: pytest.MonkeyPatch, rows: int, proven: bool) -> None:
    """On compute capability 9.0, by a module with code for sm_90a; by name always. A plan says so."""
    monkeypatch.setattr(cuda, "_WGMMA_PROVEN", proven)
    notes = ("cuda multiplies by wgmma, the default with code for sm_90a",) if rows > 128 else ()
    assert chosen(monkeypatch, rows, (9, 0), name="cuda", wgmma=True) == ("cuda", notes)
    name, found = chosen(monkeypatch, rows, (9, 0), wgmma=True)
    assert name == ("cuda" if proven or rows <= 128 else "triton")
    assert found == notes if name == "cuda" else "have not run on a GPU yet; backend='cuda' takes them" in found[0]
    assert chosen(monkeypatch, rows, (8, 0), name="cuda", wgmma=True) == ("cuda", ())
    assert chosen(monkeypatch, rows, (10, 0), wgmma=True)[0] == ("cuda" if rows <= 128 else "triton")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 768, (9, 0), ("triton",))[0] == "cuda"
    note = "cuda was not chosen: cuda is missing; install it"
    assert chosen(monkeypatch, 768, (8, 0), ("cuda",)) == ("triton", (note, "remarked"))
    assert chosen(monkeypatch, 768, None, ("cuda",)) == ("triton", (note, "remarked")), "AMD's GPUs"
    name, notes = chosen(monkeypatch, 768, (9, 0), ("cuda", "triton"))
    assert name == "eager" and notes == (note, "triton was not chosen: triton is missing; install it")


def test_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    name, notes = chosen(monkeypatch, 768, (7, 5))
    assert name == "eager" and len(notes) == 2
    assert all("expected compute capability 8.0 or more, cuda has 7.5" in note for note in notes)


def test_a_table_has_all_of_the_protocol() -> None:
    functions = [name for name in dir(backends.Backend) if callable(getattr(backends.Backend, name)) and name[0] != "_"]
    facts = get_type_hints(backends.Backend)
    assert len(functions) > 12 and len(facts) == 5
    for name in backends.BACKENDS:
        module = backends.get(name)
        optional = {"fused_step"} if name == "eager" else set()
        assert {f for f in functions if not callable(getattr(module, f, None))} <= optional, name
        for fact, kind in facts.items():
            assert type(getattr(module, fact)) is (get_origin(kind) or kind), f"{name}.{fact}"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_without_a_device(name: str) -> None:
    """On this machine as it is: the named backend raises, with a mend, and "auto" has another for the CPU."""
    if backends.unavailable(name) is None:
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError, match=rf"backend '{name}' cannot run here: .*(install|check)"):
        Muon([nn.Parameter(torch.zeros(3, 4))], backend=name)
    assert backends.choose("auto", torch.device("cpu"), [torch.float32], torch.bfloat16, (3, 4))[0] in ("cpu", "eager")
