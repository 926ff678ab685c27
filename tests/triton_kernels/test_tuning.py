"""What `python -m muon_kernels tune` measures, keeps and finds again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_gpu import compiling

from muon_kernels import kept
from muon_kernels.backends import triton as backend
from muon_kernels.cli import main
from muon_kernels.triton_kernels import configs, measured, products, tuning
from muon_kernels.triton_kernels.configs import Config, Shape, choose, work


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUON_KERNELS_CACHE_DIR", str(tmp_path / "below"))
    return tmp_path / "below"


def test_what_is_measured_is_found_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up from a cost and a fixed part of each candidate, which the fit finds; a vendor takes no time."""
    truth = {c: c._replace(cost=1 + i / 8, fixed=100.0 * i) for i, c in enumerate(configs.table(80).configs)}
    last: list[Any] = []

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, config: Any, **options: Any) -> None:
        batch, m, k = a.shape
        shape = Shape(batch, m, out.shape[2], k, options.get("symmetric", False))
        last[:] = [work(next(t for c, t in truth.items() if c[:5] == config[:5]), shape, 2)]

    monkeypatch.setattr(tuning.products, "product", product)
    monkeypatch.setattr(tuning.products, "gemm_by_vendor", lambda *_: last.clear())

    def time(call: Callable[[], None]) -> float:
        call()
        return last[0] if last else 1e-9

    with compiling(80, 2, binary=False):
        assert measured.table() is configs.table(80)
        *rows, (_, _, table) = tuning.measure(time, (256, 512))
        assert table is not None and table.vendor_from == 256
        for found, true in zip(table.configs, truth.values(), strict=True):
            assert found._replace(cost=0, fixed=0) == true._replace(cost=0, fixed=0)
            assert (found.cost, found.fixed) == pytest.approx((true.cost, true.fixed))
        assert {what for what, *_ in rows if "syrk" in what} == {
            f"syrk {tile}, k = {k}" for tile in ("128x128x32", "64x64x64") for k in (64, 256)
        }
        file = measured.file_of(measured.name_of_gpu())
        kept.writable(file)
        measured.save(file, table)
        assert measured.table() == table
    assert list(directory.iterdir()) == [file]
    with compiling(90, 2, binary=False):
        assert measured.table() is configs.table(90), "another GPU's"


def test_tune_keeps_a_table_and_goes_on_with_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is compared with triton afterwards is triton as later processes have it."""
    table = configs.table(80)._replace(vendor_from=7)
    for name in ("unavailable", "refuses"):
        monkeypatch.setattr(backend, name, lambda *_: None)
    monkeypatch.setattr(tuning, "measure", lambda _: iter([("gemm of 7, ours", 8.5, None), ("", 0.0, table)]))
    with compiling(80, 2, binary=False):
        products.forget_choices()
        assert products._gpu(0)[0] is configs.table(80)
        assert main(["tune"]) == 0
        (file,) = directory.iterdir()
        assert products._gpu(0)[0] == table == measured.table()
    products.forget_choices()
    printed = capsys.readouterr().out
    assert "gemm of 7, ours" in printed and "8.5 TFLOP/s" in printed and f"kept in {file}" in printed


def test_what_a_tile_takes_beside_its_k_decides_where_k_is_short() -> None:
    """Three small ones fill and store while a multiprocessor is at one large one; by their k alone it is faster."""
    table = configs.table(90)
    by_k_alone = table._replace(configs=tuple(c._replace(fixed=0.0) for c in table.configs))
    sides = [
        [choose(Shape(64, 1024, 1024, k, True), t, 132).block_m for k in (64, 1024, 4096)] for t in (table, by_k_alone)
    ]
    assert sides == [[64, 128, 128], [128, 128, 128]]


def test_residents_share_what_a_tile_takes_beside_its_k() -> None:
    config = Config(64, 64, 64, 4, 4, 2.0, 100.0, (3, 0))
    shapes = [Shape(batch, 64, 64, 1000, False) for batch in (1, 3, 4, 6, 7)]
    assert [work(config, s, 1) / (2 * 64 * 64) for s in shapes] == [1100, 3100, 4200, 6200, 7300]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError"),
        ('{"configs": [], "vendor_from": null}', "other candidates than this version"),
        ("[" * 100_000, "RecursionError"),
        ('{"configs": [{"residents": 1}], "vendor_from": null}', "TypeError"),
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
        kept.writable(measured.file_of("GPU"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert "nothing can be measured: torch" in capsys.readouterr().err
