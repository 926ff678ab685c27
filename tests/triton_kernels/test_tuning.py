"""What `python -m muon_kernels tune` measures, keeps and finds again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

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
        (None, "a cost is not positive"),
    ],
)
def test_what_cannot_be_read_is_not_used(directory: Path, content: str | None, why: str) -> None:
    if content is None:
        rows = [c._replace(cost=0.0)._asdict() for c in configs.table(80).configs]
        content = json.dumps({"configs": rows, "vendor_from": None})
    with compiling(80):
        file = measured.file_of(measured.name_of_gpu())
        file.parent.mkdir()
        file.write_text(content)
        with pytest.warns(UserWarning, match=why):
            assert measured.table() is configs.table(80)


def test_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUON_KERNELS_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"cannot be written .*; set MUON_KERNELS_CACHE_DIR to a directory"):
        measured.writable(measured.file_of("GPU"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert "nothing can be measured: torch" in capsys.readouterr().err
