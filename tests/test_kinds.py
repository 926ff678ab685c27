"""Which kind of products runs: what `python -m muon_kernels tune` kept for this GPU, or else what is expected."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_backends import chosen

from muon_kernels.backends import cuda, kinds, tuning
from muon_kernels.backends.kinds import Ranking
from muon_kernels.cli import doctor
from muon_kernels.step.plan import plan_for_shapes

H200 = "NVIDIA H200"
KEPT = (Ranking(129, ("triton", "mma.sync", "wgmma")), Ranking(1024, ("wgmma", "triton", "mma.sync")))
ON_A100 = (Ranking(129, ("mma.sync", "triton")), Ranking(512, ("triton", "mma.sync")))


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUON_KERNELS_CACHE_DIR", str(tmp_path))
    return tmp_path


def on_h200(monkeypatch: pytest.MonkeyPatch, rows: int, name: str = "auto", **options: Any) -> tuple[str, Any]:
    return chosen(monkeypatch, rows, (9, 0), name=name, **{"wgmma": True, "gpu": H200, **options})


def kind(rows: int) -> str:
    """By which the cuda backend multiplies there."""
    return cuda._kind(torch.device("cuda"), rows)


@pytest.mark.parametrize(
    ("rows", "name", "own", "start"),
    [
        (129, "triton", "mma.sync", 129),
        (1023, "triton", "mma.sync", 129),
        (1024, "cuda", "wgmma", 1024),
        (9999, "cuda", "wgmma", 1024),
    ],
)
def test_what_was_kept_is_followed(monkeypatch: pytest.MonkeyPatch, rows: int, name: str, own: str, start: int) -> None:
    """Whoever names cuda gets the faster of its own kinds."""
    kinds.save(kinds.file_of(H200), KEPT)
    remark = f"cuda multiplies by {own} from {start} rows on, measured by tune"
    why = f"cuda was not chosen for {rows}x4096: triton multiplies faster from {start} rows on, measured by tune"
    assert on_h200(monkeypatch, rows) == (name, (remark,) if name == "cuda" else (why, "remarked"))
    assert on_h200(monkeypatch, rows, "cuda") == ("cuda", (remark,))
    assert kind(rows) == own


@pytest.mark.parametrize("proven", [False, True])
def test_fewer_rows_than_were_timed(monkeypatch: pytest.MonkeyPatch, proven: bool) -> None:
    """There "auto" takes cuda, also for what is not fused, and must not take what no GPU has run."""
    monkeypatch.setattr(cuda, "_WGMMA_PROVEN", proven)
    kinds.save(kinds.file_of(H200), KEPT)
    assert on_h200(monkeypatch, 128) == ("cuda", ())
    assert kind(128) == ("wgmma" if proven else "mma.sync")


def test_triton_may_be_faster_where_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds.save(kinds.file_of("NVIDIA A100"), ON_A100)
    names = [chosen(monkeypatch, rows, (8, 0), gpu="NVIDIA A100")[0] for rows in (129, 511, 512)]
    assert names == ["cuda", "cuda", "triton"]


def test_a_plan_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds.save(kinds.file_of(H200), KEPT)
    on_h200(monkeypatch, 1)
    plan = plan_for_shapes([(768, 3072, 2), (2048, 1024, 1), (1024, 4096, 1), (64, 64, 9)], device="cuda")
    assert [bucket.backend for bucket in plan.buckets] == ["triton", "cuda", "cuda", "cuda"]
    assert plan.notes == (
        "cuda was not chosen for 768x3072: triton multiplies faster from 129 rows on, measured by tune",
        "remarked",
        "cuda multiplies by wgmma from 1024 rows on, measured by tune",
    )


def test_doctor_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds.save(kinds.file_of(H200), KEPT)
    on_h200(monkeypatch, 1)
    gpu = SimpleNamespace(name=H200, major=9, minor=0, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    said = "fastest from 129 rows on: triton, mma.sync, wgmma; from 1024 rows on: wgmma, triton, mma.sync"
    assert dict(doctor.facts())["  0, tuned"] == said


def test_without_a_file_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_h200(monkeypatch, 1024)[0] == "triton", "which is expected"
    assert on_h200(monkeypatch, 1024, "cuda") == (
        "cuda",
        ("cuda multiplies by wgmma, the default with code for sm_90a",),
    )
    assert kind(1024) == "wgmma"
    on_h200(monkeypatch, 1024, wgmma=False)
    assert kind(1024) == "mma.sync"


@pytest.mark.parametrize("other", ["gpu", "version", "triton"])
def test_what_another_gpu_or_version_kept_is_not_read(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    kinds.save(kinds.file_of("NVIDIA H100" if other == "gpu" else H200), KEPT)
    if other == "version":
        monkeypatch.setattr(kinds, "__version__", "9.9")
    elif other == "triton":
        monkeypatch.setattr(kinds, "version", lambda package: "9.9")
    assert on_h200(monkeypatch, 1024)[0] == "triton" and kind(1024) == "wgmma"


def test_it_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds.save(kinds.file_of(H200), KEPT)
    assert on_h200(monkeypatch, 1024)[0] == "cuda"
    kinds.file_of(H200).unlink()
    assert kind(200) == "mma.sync", "which is not the default"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError"),
        ("[]", "TypeError"),
        ('{"kinds": 1}', "TypeError"),
        ('{"kinds": [[]]}', "ValueError"),
        ([["x", "triton", "mma.sync", "wgmma"]], "rows are no positive integers that increase"),
        ([[True, "triton", "mma.sync", "wgmma"]], "rows are no positive integers that increase"),
        ([[0, "triton", "mma.sync", "wgmma"]], "rows are no positive integers that increase"),
        (
            [[9, "triton", "mma.sync", "wgmma"], [9, "wgmma", "triton", "mma.sync"]],
            "no positive integers that increase",
        ),
        ([[9, "triton", "mma.sync"]], "it compares triton, mma.sync, but here are mma.sync, triton, wgmma"),
        ([[9, "triton", "mma.sync", "wgmma", "wgmma"]], "it compares"),
        ([[9, "triton", "mma.sync", "tcgen05"]], "it compares triton, mma.sync, tcgen05, but here are"),
        ([[9, "triton", "mma.sync", 5]], "TypeError"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_read_is_not_used(monkeypatch: pytest.MonkeyPatch, content: Any, why: str) -> None:
    text = content if isinstance(content, str) else json.dumps({"kinds": content})
    kinds.file_of(H200).write_text(text)
    with pytest.warns(UserWarning, match=f"{why}.*is not used; run python -m muon_kernels tune again, or delete it"):
        assert on_h200(monkeypatch, 1024)[0] == "triton"
    assert kind(1024) == "wgmma", "and it is not read, and warned about, again"


@pytest.mark.parametrize(("missing", "wgmma"), [(("triton",), True), ((), False)])
def test_a_kind_that_is_not_there_any_more(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], wgmma: bool
) -> None:
    kinds.save(kinds.file_of(H200), KEPT)
    there = "mma.sync, wgmma" if missing else "mma.sync, triton"
    with pytest.warns(UserWarning, match=f"it compares triton, mma.sync, wgmma, but here are {there}"):
        name, notes = on_h200(monkeypatch, 200, missing=missing, wgmma=wgmma)
    assert name == ("cuda" if missing else "triton")
    assert not [note for note in notes if "tune" in note]
    assert kind(1024) == ("wgmma" if missing else "mma.sync"), "which it is by default"


def timing(seconds: Mapping[int, Mapping[str, list[float]]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `tuning.measure` yields for made-up times by m and kind."""
    asked: list[int] = []

    def runs(batch: int, m: int, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
        asked.extend([m] if m in seconds else [])  # which ragged matrices are not
        return {}

    monkeypatch.setattr(tuning, "_runs", runs)
    return list(tuning.measure(lambda _: seconds[asked[-1]], torch.device("cuda"), tuple(seconds), 1 << 20))


def test_the_fastest_is_kept_from_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a round belong together: at 1024 wgmma is faster in most rounds, though its median is not."""
    *rows, (_, _, found) = timing(
        {
            256: {"wgmma": [4.0] * 3, "mma.sync": [3.0] * 3, "triton": [2.0] * 3},
            512: {"wgmma": [7.0] * 3, "mma.sync": [6.0] * 3, "triton": [5.0] * 3},
            1024: {"wgmma": [1.0, 5.0, 9.0], "mma.sync": [9.0] * 3, "triton": [2.0, 4.0, 10.0]},
            2048: {"wgmma": [1.0] * 3, "mma.sync": [3.0] * 3, "triton": [2.0] * 3},
            4096: {"wgmma": [2.0] * 3, "mma.sync": [3.0] * 3, "triton": [1.0] * 3},
        },
        monkeypatch,
    )
    assert found == (
        Ranking(129, ("triton", "mma.sync", "wgmma")),
        Ranking(1024, ("wgmma", "triton", "mma.sync")),
        Ranking(4096, ("triton", "wgmma", "mma.sync")),
    )
    assert len(rows) == 15 and rows[0] == ("8 of 256x512, wgmma", 7 * 8 * 256**3 / 4e12, None)
    kinds.save(kinds.file_of(H200), found)
    assert kinds.load(kinds.file_of(H200), lambda: ("wgmma", "mma.sync", "triton")) == found


def runs_of(results: Mapping[str, torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    return {kind: lambda r=r: r for kind, r in results.items()}  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [1.5, torch.nan])
def test_what_is_wrong_is_not_ranked(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """However fast it is, and though only one element is."""
    right = torch.ones(1, 4, 8, dtype=torch.bfloat16)
    results = {"wgmma": right.clone(), "mma.sync": right, "triton": right}
    results["wgmma"][0, 3, 5] = wrong
    monkeypatch.setattr(tuning, "_runs", lambda *_: runs_of(results))
    with pytest.raises(RuntimeError, match=r"products by wgmma and by mma\.sync differ on 1 of 4x8; python -m"):
        list(tuning.measure(pytest.fail, torch.device("cuda"), (4,), 1))  # type: ignore[arg-type]


def test_what_is_wrong_in_ragged_matrices_is_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(batch: int, m: int, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
        right = torch.ones(batch, m, 2 * m, dtype=torch.bfloat16)
        return runs_of({"wgmma": right * (1 if m == 8 else 2), "mma.sync": right})

    monkeypatch.setattr(tuning, "_runs", runs)
    with pytest.raises(RuntimeError, match=r"products by wgmma and by mma\.sync differ on 3 of 32x64; python -m"):
        list(tuning.measure(pytest.fail, torch.device("cuda"), (8,), 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(("took", "first"), [(0.99, "triton"), (0.95, "wgmma")])
def test_what_is_expected_stays_unless_another_is_faster_than_noise(
    monkeypatch: pytest.MonkeyPatch, took: float, first: str
) -> None:
    *_, (_, _, (ranking,)) = timing({256: {"triton": [1.0] * 3, "wgmma": [took] * 3}}, monkeypatch)
    assert ranking.kinds[0] == first


def nobody_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept; root, as whom tests may run, could."""
    read_text = Path.read_text

    def denied(self: Path, *args: Any, **options: Any) -> str:
        if self.suffix == ".json":
            raise PermissionError(13, "Permission denied")
        return read_text(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", denied)


@pytest.mark.parametrize("home", ["file", "hidden"])
def test_where_there_is_no_place_for_a_file_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """As of a service without a home."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MUON_KERNELS_CACHE_DIR", str(tmp_path / "file" / "below"))
    if home == "hidden":
        nobody_may_read(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert on_h200(monkeypatch, 1024)[0] == "triton"


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds.save(kinds.file_of(H200), KEPT)
    nobody_may_read(monkeypatch)
    with pytest.warns(UserWarning, match="PermissionError.*is not used"):
        assert on_h200(monkeypatch, 1024)[0] == "triton"


def test_kinds_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    GPU = torch.device("cuda")
    on_h200(monkeypatch, 1)
    assert cuda.kinds_there(GPU) == ("triton", "wgmma", "mma.sync")
    monkeypatch.setattr(cuda, "_WGMMA_PROVEN", True)
    assert cuda.kinds_there(GPU) == ("wgmma", "mma.sync", "triton")
    on_h200(monkeypatch, 1, missing=("triton",), wgmma=False)
    assert cuda.kinds_there(GPU) == ("mma.sync",)
    chosen(monkeypatch, 1, (10, 0), wgmma=True)
    assert cuda.kinds_there(GPU) == ("triton", "mma.sync"), "wgmma is 9.0's alone"
    chosen(monkeypatch, 1, (8, 0))
    assert cuda.kinds_there(GPU) == ("mma.sync", "triton")
