"""What `python -m muon_kernels tune` measures, keeps and finds again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_gpu import compiling

from muon_kernels.cli import main
from muon_kernels.triton_kernels import configs, measured, tuning
from muon_kernels.triton_kernels.configs import Shape, choose


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUON_KERNELS_CACHE_DIR", str(tmp_path / "below"))
    return tmp_path / "below"


def test_what_is_measured_is_found_again(directory: Path) -> None:
    """Times are made up: a launch takes the less the more programs it has, and the vendor's library takes least."""
    with compiling(80, 2, binary=False) as device:
        assert measured.table() is configs.table(80)

        def time(call: Callable[[], None]) -> float:
            before = len(device.log)
            call()
            return 1 / device.log[-1].grid[0] if len(device.log) > before else 1e-9

        *rows, (_, _, table) = tuning.measure(time, (256, 512))
        assert table is not None and table.vendor_from == 256
        shipped = configs.table(80).configs
        assert len(table.configs) == len(shipped) <= 12
        assert {what for what, *_ in rows if "syrk" in what} == {"syrk 128x128x32", "syrk 64x64x64"}
        cost = {c[:2]: c.cost for c in table.configs}
        assert cost[64, 64] == 1.0 < cost[128, 64] < cost[128, 128] < cost[128, 256]
        file = measured.file_of(measured.name_of_gpu())
        measured.writable(file)
        measured.save(file, table)
        assert measured.table() == table
        assert choose(Shape(1, 4096, 4096, 64, False), table, 2)[:2] == (64, 64)
    assert list(directory.iterdir()) == [file]
    with compiling(90, 2, binary=False):
        assert measured.table() is configs.table(90), "another GPU's"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError"),
        ('{"configs": [], "vendor_from": null}', "other candidates than this version"),
        ("[" * 100_000, "RecursionError"),
        ((0.0, None), "a cost is not positive"),
        ((float("inf"), None), "a cost is not positive"),
        ((1.0, "x"), "vendor_from is neither null nor a size"),
        ((1.0, -5), "vendor_from is neither null nor a size"),
        ((1.0, True), "vendor_from is neither null nor a size"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_read_is_not_used(directory: Path, content: str | tuple[float, Any], why: str) -> None:
    if not isinstance(content, str):
        rows = [c._replace(cost=content[0])._asdict() for c in configs.table(80).configs]
        content = json.dumps({"configs": rows, "vendor_from": content[1]})
    with compiling(80):
        file = measured.file_of(measured.name_of_gpu())
        file.parent.mkdir()
        file.write_text(content)
        with pytest.warns(UserWarning, match=why):
            assert measured.table() is configs.table(80)


def test_where_torch_rounds_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before version 2.8."""
    with compiling(100):
        assert measured.table().vendor_from is not None
        monkeypatch.setattr(measured, "_SUMS_IN_FP32", False)
        assert measured.table() == configs.table(100)._replace(vendor_from=None)


def test_a_full_disk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    directory.mkdir()
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RuntimeError, match=r"No space left on device\); set MUON_KERNELS_CACHE_DIR"):
        measured.save(directory / "table.json", configs.table(80))
    assert not list(directory.iterdir())


def test_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUON_KERNELS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"cannot be written .*; set MUON_KERNELS_CACHE_DIR to a directory"):
        measured.writable(measured.file_of("GPU"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert "nothing can be measured: torch" in capsys.readouterr().err
