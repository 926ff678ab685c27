"""Which of csrc/cuda's products runs: what Program is told, what was kept, and `tune` itself on the executor."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from emulated import running
from products import kernel_of
from ptx import standin

from muon_kernels import orthogonalize
from muon_kernels.backends import cuda, kinds, tuning
from muon_kernels.backends.kinds import Ranking
from muon_kernels.cli import main
from muon_kernels.cli.verify.emulation import place
from muon_kernels.cli.verify.implementations import implementations
from muon_kernels.step.plan import plan_for_shapes

pytestmark = pytest.mark.skipif(standin.nvcc() is None, reason="no nvcc: kernels cannot be compiled")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUON_KERNELS_CACHE_DIR", str(tmp_path))
    return tmp_path


def multiplied(runtime: standin.Runtime, since: int = 0) -> set[bool]:
    """Whether the products that ran were by wgmma, all or some of them."""
    return {kernel_of(ran.kernel).wgmma for ran in runtime.log[since:] if "product" in ran.kernel}


@pytest.mark.parametrize("wgmma", [True, False])
def test_a_program_multiplies_as_it_is_told(emulated_sm90: standin.Runtime, wgmma: bool) -> None:
    _C = cuda._device.module()
    X = torch.randint(-3, 4, (1, 24, 40)).bfloat16()
    out = torch.empty(1, 24, 24).bfloat16()
    stacks = [(t.data_ptr(), *t.shape, t.stride(0), t.stride(1)) for t in (X, X, out)]
    product = _C.Product(stacks[0], 0, stacks[1], True, 0, None, 0, stacks[2], 0, True, 1.0, 0.0, 0.0, 0)
    _C.cuda.Program([product], _C.DType.bf16, wgmma).run(0)
    assert torch.equal(out, X @ X.mT) and multiplied(emulated_sm90) == {wgmma}


@pytest.mark.parametrize(("rows", "wgmma"), [(23, False), (24, True)])
def test_what_was_kept_is_followed(rows: int, wgmma: bool) -> None:
    kept = Ranking(1, ("mma.sync", "wgmma")), Ranking(24, ("wgmma", "mma.sync"))
    with running((9, 0)) as runtime:
        kinds.save(cuda.rankings_file(torch.device("cpu")), kept)
        G = torch.randn(rows, 40)
        orthogonalize(G, backend="cuda", ns_steps=1)
        assert multiplied(runtime) == {wgmma}


def test_tune_compares_them(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock decides, as it may; what it says is kept, and a later process plans by it."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuning, "measure", partial(tuning.measure, sides=(16, 24), elements=1))
    with running((9, 0)) as runtime:
        assert main(["tune"]) == 0
        assert multiplied(runtime) == {True, False}
        (file,) = directory.iterdir()
        assert file == cuda.rankings_file(torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "1 of 24x48, mma.sync" in printed and "1 of 24x48, wgmma" in printed and f"kept in {file}" in printed
    with running((9, 0)):
        (note,) = plan_for_shapes([(200, 200, 1)], backend="cuda").notes
    assert note.startswith("cuda multiplies by ") and note.endswith(" rows on, measured by tune")


def test_what_was_kept_does_not_outlive_wrong_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))

    def differ(*_: object) -> None:
        raise tuning.DifferentResults("products by wgmma and by mma.sync differ")

    monkeypatch.setattr(tuning, "measure", differ)
    with running((9, 0)):
        file = cuda.rankings_file(torch.device("cpu"))
        kinds.save(file, [Ranking(1, ("wgmma", "mma.sync"))])
        assert main(["tune"]) == 1
    assert not file.exists() and "wgmma and by mma.sync differ" in capsys.readouterr().err


def test_verify_checks_them_all(emulated_sm90: standin.Runtime) -> None:
    """Whatever was kept."""
    with place() as at, running((9, 0)) as runtime:
        kinds.save(cuda.rankings_file(torch.device("cpu")), [Ranking(1, ("mma.sync", "wgmma"))])
        found = {}
        for each in implementations(at, torch.bfloat16):
            since, X = len(runtime.log), torch.ones(1, 24, 40).bfloat16()
            each.run(X, X, torch.empty(1, 24, 24).bfloat16(), b_transposed=True)
            found[each.name] = multiplied(runtime, since)
    assert found == {"cuda, wgmma": {True}, "cuda, mma.sync": {False}}


def test_a_run_by_every_kind_does_the_same(emulated_sm90: standin.Runtime) -> None:
    """And leaves its operand as it was; what was kept before holds afterwards."""
    results = {}
    before = cuda._device.rankings
    for kind, run in tuning._runs(2, 16, torch.device("cpu")).items():
        since = len(emulated_sm90.log)
        torch.manual_seed(0)
        first, second = run(), run()
        assert multiplied(emulated_sm90, since) == {kind == "wgmma"}
        assert len(emulated_sm90.log) - since == 6
        results[kind] = torch.as_tensor(second).clone()
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    assert list(results) == ["wgmma", "mma.sync"]
    torch.testing.assert_close(results["wgmma"], results["mma.sync"])
    assert cuda._device.rankings is before


def test_tune_without_a_place_to_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUON_KERNELS_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    with running((9, 0)) as runtime:
        assert main(["tune"]) == 1
        assert not runtime.log, "before anything is measured"
    assert "cannot be written" in (said := capsys.readouterr().err) and "set MUON_KERNELS_CACHE_DIR" in said


def test_with_one_kind_there_is_nothing_to_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    with running((8, 0)):
        assert main(["tune"]) == 1
    assert "nothing can be measured: " in capsys.readouterr().err
