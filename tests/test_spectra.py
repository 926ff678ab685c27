"""Spectra: numbers against plain formulas on singular values that are known, records against steps done by hand."""

import copy
import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from muon_kernels import Muon, MuonAdamW, param_groups, spectra
from muon_kernels.checks.matrices import SPECTRA, factors, make
from muon_kernels.spectra import picture

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {name: getattr(spectra, name) for name in spectra.QUANTITIES}


def truth(sigma: list[float], cells: int) -> dict[str, float]:
    """The formulas, number by number."""
    n, largest = len(sigma), max(sigma)
    energy, total = sum(s * s for s in sigma), sum(sigma)
    by_energy = [s * s / energy for s in sigma]
    by_size = [s / total for s in sigma]
    return {
        "svd_entropy": -sum(p * math.log(p) for p in by_energy if p) / math.log(n),
        "effective_rank": math.exp(-sum(p * math.log(p) for p in by_size if p)),
        "stable_rank": energy / largest**2,
        "condition": largest / min(sigma) if min(sigma) else math.inf,
        "rms": math.sqrt(energy / cells),
    }


def assert_close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-12, equal_nan=True, check_dtype=False)


@pytest.mark.parametrize("spectrum", sorted(SPECTRA.keys() - {"zero"}))
@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (16, 65), (65, 16), (2, 3)])
def test_known_spectra(spectrum: str, rows: int, cols: int) -> None:
    sigma = factors(spectrum, rows, cols)[1].tolist()
    expected = truth(sigma, rows * cols)
    measured = spectra.summary(make(spectrum, rows, cols, dtype=torch.float64))._asdict()
    if min(sigma) == 0:  # but for rounding
        assert measured.pop("condition") > 1e14
        expected.pop("condition")
    for name, value in measured.items():
        assert_close(value.item(), expected[name])
        assert value.dtype == torch.float64 and value.shape == ()


def test_limits_in_closed_form() -> None:
    n, r = 12, 0.7
    flat, one = torch.eye(n), torch.ones(n, 2 * n)
    assert_close([f(flat).item() for f in FUNCTIONS.values()], [1.0, n, n, 1.0, 1 / math.sqrt(n)])
    assert_close([f(one).item() for f in list(FUNCTIONS.values())[:3]], [0.0, 1.0, 1.0])

    # p of a geometric series is one too: Σ p log p = log p₁ + log q · Σ k qᵏ / Σ qᵏ.
    def entropy(q: float) -> float:
        total = (1 - q**n) / (1 - q)
        mean = q * (1 - n * q ** (n - 1) + (n - 1) * q**n) / (1 - q) ** 2 / total
        return math.log(total) - math.log(q) * mean

    W = torch.diag(r ** torch.arange(n, dtype=torch.float64))
    assert_close(spectra.svd_entropy(W).item(), entropy(r * r) / math.log(n))
    assert_close(spectra.effective_rank(W).item(), math.exp(entropy(r)))
    assert_close(spectra.stable_rank(W).item(), (1 - r ** (2 * n)) / (1 - r * r))
    assert_close(spectra.condition(W).item(), r ** (1 - n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dtypes_differ_by_their_rounding_of_the_input_only(dtype: torch.dtype) -> None:
    W = make("power -1", 20, 30).to(dtype)
    before = W.clone()
    for name, value in spectra.summary(W)._asdict().items():
        assert_close(value, FUNCTIONS[name](W.double()), rtol=0)
    assert W.view(torch.uint8).equal(before.view(torch.uint8))


@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,)])
def test_batches_are_matrices_one_by_one(batch: tuple[int, ...]) -> None:
    W = make("power -1/2", 9, 14, batch) * torch.linspace(0.1, 2, math.prod(batch)).view(*batch, 1, 1)
    for name, value in spectra.summary(W)._asdict().items():
        one_by_one = [spectra.summary(M)._asdict()[name] for M in W.reshape(-1, 9, 14)]
        assert_close(value, torch.stack(one_by_one).view(batch) if one_by_one else value.new_empty(0))
        assert_close(FUNCTIONS[name](W.mT), value)


@pytest.mark.parametrize("scale", [1e-100, 1e-30, 1e100])
def test_scale_changes_the_rms_only(scale: float) -> None:
    W = make("gaussian", 8, 12, dtype=torch.float64)
    *before, rms = spectra.summary(W)
    *after, scaled = spectra.summary(W * scale)
    assert_close(after, before)
    assert_close(scaled / scale, rms)


def test_what_has_no_spectrum_to_speak_of() -> None:
    inf, nan = math.inf, math.nan
    cases: dict[tuple[int, ...], list[float]] = {
        (1, 1): [1, 1, 1, 1, 2],
        (1, 5): [1, 1, 1, 1, 2],
        (5, 1): [1, 1, 1, 1, 2],
    }
    for shape, expected in cases.items():
        assert_close([v.item() for v in spectra.summary(torch.full(shape, -2.0))], [float(x) for x in expected])
    for W in (torch.zeros(3, 4), torch.zeros(1, 1), torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(0, 0)):
        assert [v.item() for v in spectra.summary(W)] == [0, 0, 0, inf, 0]
    assert spectra.summary(torch.zeros(2, 0, 4)).rms.shape == (2,)

    W = torch.stack([torch.eye(3)] * 3)
    W[1, 0, 2], W[2, 1, 1] = nan, inf
    measured = spectra.summary(W)
    for value in measured[:4]:
        assert not value[0].isnan() and value[1:].isnan().all()  # a neighbour's NaN stays with it
    assert_close(measured.rms, torch.tensor([math.sqrt(1 / 3), nan, inf], dtype=torch.float64))
    assert all(f(torch.full((1, 1), nan)).isnan() for f in FUNCTIONS.values())


@pytest.mark.parametrize("name", [*FUNCTIONS, "summary"])
def test_what_is_no_matrix_raises(name: str) -> None:
    with pytest.raises(ValueError, match=r"should be matrices .* but has size: \(3,\)"):
        getattr(spectra, name)(torch.ones(3))
    for wrong in (torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.complex64), [[1.0]]):
        with pytest.raises(TypeError, match="floating dtype but is"):
            getattr(spectra, name)(wrong)


class Model(nn.Module):
    """A matrix in each of two layers, a stack, a convolution, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.conv = nn.Conv2d(2, 5, 3)
        self.row = nn.Parameter(torch.randn(1, 6))


NAMES = {"layers.0.weight": 1, "layers.1.weight": 1, "experts": 3, "conv.weight": 1}


def fill(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def muon(model: nn.Module) -> Optimizer:
    return Muon([p for p in model.parameters() if p.ndim > 1], lr=0.1)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "Muon": muon,
    "MuonAdamW": lambda model: MuonAdamW(param_groups(model, adamw=["layers.1.*"])),
    "AdamW": lambda model: AdamW(model.parameters()),
    "SGD": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_records_what_a_step_did_and_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model().to(dtype)
    unseen = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS[kind](model), OPTIMIZERS[kind](unseen)
    recorder = spectra.Recorder(optimizer, model.named_parameters(), every=2)
    by_name = dict(model.named_parameters())
    seen: dict[tuple[int, str, str], Tensor] = {}
    for step in range(1, 6):
        before = {name: p.detach().clone() for name, p in by_name.items()}
        fill(model, step)
        optimizer.step()
        fill(unseen, step)
        other.step()
        for name in NAMES if step % 2 == 0 else ():
            p = by_name[name]
            (momentum,) = (v for k, v in optimizer.state[p].items() if k in ("momentum_buffer", "exp_avg"))
            seen[step, name, "weight"] = p.detach().clone()
            seen[step, name, "momentum"] = momentum.clone()
            seen[step, name, "update"] = p.detach().double() - before[name].double()
    for p, q in zip(model.parameters(), unseen.parameters(), strict=True):
        assert p.equal(q)

    assert recorder.step == 5
    assert len(recorder.rows) == 2 * 3 * sum(NAMES.values())
    for row in recorder.rows:
        W = seen[row["step"], row["name"], row["tensor"]]
        W = W.flatten(1) if W.ndim == 4 else W[row["index"]] if W.ndim == 3 else W
        assert (row["rows"], row["cols"]) == W.shape
        expected = truth(torch.linalg.svdvals(W.double()).tolist(), W.numel())
        assert_close({name: row[name] for name in expected}, expected)
    for name, count in NAMES.items():
        indices = [row["index"] for row in recorder.rows if (row["name"], row["step"]) == (name, 4)]
        assert sorted(indices) == sorted(list(range(count)) * 3)
    assert {row["group"] for row in recorder.rows} == {"layers.*.weight", "experts", "conv.weight"}


def test_flatten_is_the_groups() -> None:
    p = nn.Parameter(torch.randn(3, 4, 6))
    recorder = spectra.Recorder(Muon([p], flatten=True), every=1)
    recorder.record()
    ((rows, cols, name),) = ((row["rows"], row["cols"], row["name"]) for row in recorder.rows)
    assert (rows, cols, name) == (3, 24, "0.0")


def test_update_is_of_parameters_with_gradient_and_of_steps_that_ended() -> None:
    model = Model()
    optimizer = muon(model)
    recorder = spectra.Recorder(optimizer, model.named_parameters(), every=1)
    fill(model, 0)
    model.experts.grad = None
    optimizer.step()
    assert {row["name"] for row in recorder.rows if row["tensor"] == "update"} == NAMES.keys() - {"experts"}
    assert {row["name"] for row in recorder.rows if row["tensor"] == "weight"} == NAMES.keys()

    before = list(recorder.rows)
    model.experts.grad = torch.zeros(3, 4, 6).to_sparse()
    with pytest.raises(TypeError):
        optimizer.step()
    assert recorder.step == 1 and recorder.rows == before

    def closure() -> float:
        fill(model, 1)
        return 0.0

    for p in model.parameters():
        p.grad = None
    optimizer.step(closure)  # gradients come within the step
    assert {row["name"] for row in recorder.rows if row["tensor"] == "update" and row["step"] == 2} == NAMES.keys()


def test_what_is_recorded_can_be_chosen() -> None:
    model = Model()
    optimizer = muon(model)
    recorder = spectra.Recorder(
        optimizer, model.named_parameters(), every=1, names=["layers.*", "conv*"], tensors=["update", "weight"]
    )
    recorder.record()
    assert {(row["step"], row["tensor"]) for row in recorder.rows} == {(0, "weight")}
    fill(model, 0)
    optimizer.step()
    kinds = {(row["name"], row["tensor"]) for row in recorder.rows}
    assert kinds == {(name, kind) for name in NAMES.keys() - {"experts"} for kind in ("weight", "update")}
    recorder.remove()
    optimizer.step()
    assert recorder.step == 1


def test_a_momentum_in_codes_is_no_matrix() -> None:
    p = nn.Parameter(torch.randn(4, 4))
    optimizer = SGD([p])
    recorder = spectra.Recorder(optimizer, every=1)
    for codes in (torch.ones(4, 4, dtype=torch.int8), torch.ones(16), None):
        optimizer.state[p]["momentum_buffer"] = codes
        recorder.record()
    assert {row["tensor"] for row in recorder.rows} == {"weight"}


def test_names_come_from_the_group_where_none_are_given() -> None:
    model = Model()
    recorder = spectra.Recorder(MuonAdamW(param_groups(model)), every=1)
    recorder.record()
    assert {row["name"] for row in recorder.rows} == NAMES.keys()


def test_groups_may_come_later() -> None:
    model = Model()
    optimizer = muon(model)
    recorder = spectra.Recorder(optimizer, model.named_parameters(), every=1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 4))]})
    recorder.record()
    assert {row["name"] for row in recorder.rows} == NAMES.keys() | {"1.0"}


def test_arguments_that_cannot_be_used() -> None:
    model = Model()
    optimizer = muon(model)
    named = list(model.named_parameters())
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer but is: Model"):
        spectra.Recorder(model)  # type: ignore[arg-type]
    for every in (0, 1.5, True):
        with pytest.raises(ValueError, match="every should be an int >= 1"):
            spectra.Recorder(optimizer, named, every=every)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="include: 'gradient'"):
        spectra.Recorder(optimizer, named, tensors=["weight", "gradient"])
    with pytest.raises(ValueError, match="called like"):
        spectra.Recorder(optimizer, named, names="heads.*")
    with pytest.raises(ValueError, match="none of them is"):
        spectra.Recorder(optimizer, Model().named_parameters())
    for pairs in (model, dict(named), [name for name, _ in named]):
        with pytest.raises(TypeError, match=r"named_parameters should be \(name, parameter\) pairs"):
            spectra.Recorder(optimizer, pairs)  # type: ignore[arg-type]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


ROWS = [
    *spectra.describe("a.0.weight", torch.eye(3), step=2),
    *spectra.describe("a.1.weight", torch.zeros(3, 5), step=4),
    *spectra.describe("b, the second", torch.full((2, 2, 2), math.nan), tensor="update", step=6),
    *spectra.describe("a.0.weight", torch.tensor([[1.0, 1 / 3], [0.1, 1e-7]]), step=8),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_has_the_same_numbers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    spectra.save([], path)
    assert spectra.load(path) == []
    spectra.save(ROWS, path)
    loaded = spectra.load(path)
    assert len(loaded) == 5
    for row, expected in zip(loaded, ROWS, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert type(row[key]) is type(value)
            assert row[key] == value or (math.isnan(row[key]) and math.isnan(value)), key
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_files_are_what_others_read(tmp_path: Path) -> None:
    def fail(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    spectra.save(ROWS, tmp_path / "rows.jsonl")
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=fail)
    spectra.save([{**row, "loss": 2.5} for row in ROWS], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["2.5"] * 5


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    for use in (lambda path: spectra.save(ROWS, path), spectra.load):
        with pytest.raises(ValueError, match=r"end in .jsonl or .csv but is: rows.txt"):
            use(tmp_path / "rows.txt")
    for name, text in (("rows.jsonl", '{"step": 1, "name": "a"}\n'), ("rows.csv", "step,name\n1,a\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=r"lacks: index, group, tensor, rows, cols, svd_entropy, .* rms$"):
            spectra.load(tmp_path / name)
    spectra.save(ROWS, tmp_path / "rows.csv")
    with pytest.raises(TypeError):  # cut off by an error: the old file stays
        spectra.save([*ROWS, {"step": object()}], tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1, "name": "a"}\n'


@pytest.mark.parametrize("at", [None, 4])
def test_goes_on_where_it_was(tmp_path: Path, at: int | None) -> None:
    """Cut off after step 7 and resumed from a checkpoint of step 4, a training has the record it would have had."""

    def run(recorder: spectra.Recorder, model: Model, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            fill(model, step)
            optimizer.step()

    def make_all() -> tuple[spectra.Recorder, Model, Optimizer]:
        torch.manual_seed(0)
        model = Model()
        optimizer = muon(model)
        return spectra.Recorder(optimizer, model.named_parameters(), every=2), model, optimizer

    whole = make_all()
    run(*whole, range(1, 10))
    first = make_all()
    run(*first, range(1, 5))
    checkpoint = copy.deepcopy((first[1].state_dict(), first[2].state_dict()))
    if at:
        run(*first, range(5, 8))
    first[0].save(tmp_path / "rows.csv")

    resumed = make_all()
    resumed[1].load_state_dict(checkpoint[0])
    resumed[2].load_state_dict(checkpoint[1])
    resumed[0].load(tmp_path / "rows.csv", step=at)
    run(*resumed, range(5, 10))
    assert resumed[0].step == 9
    assert resumed[0].rows == whole[0].rows


def training(entropy: float, steps: range = range(0, 300, 50)) -> list[spectra.Row]:
    rows = []
    for step in steps:
        for layer in range(3):
            for part in ("qkv", "mlp"):
                W = torch.diag(torch.linspace(1 - entropy, 1, 8) ** (layer + 1 + step / 100))
                rows += spectra.describe(f"layers.{layer}.{part}.weight", W, step=step)
    return rows


def colored(path: Path, color: str) -> int:
    """How many pixels of exactly that colour a picture has."""
    image, colors = (pytest.importorskip(f"matplotlib.{name}") for name in ("image", "colors"))
    pixels = image.imread(path)[..., :3]
    return int((abs(pixels - colors.to_rgb(color)).max(-1) < 0.01).sum())


@pytest.mark.parametrize("quantity", spectra.QUANTITIES)
def test_picture_has_a_line_of_every_training(tmp_path: Path, quantity: str) -> None:
    pytest.importorskip("matplotlib")
    runs = {"Muon": training(0.5), "AdamW": training(0.9)}
    path = tmp_path / "spectra.png"
    spectra.plot(runs, path, quantity)
    for style in picture.STYLES[:2]:
        assert colored(path, style["color"]) > 300
    assert colored(path, picture.STYLES[2]["color"]) == 0


def test_picture_is_of_medians_and_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes").Axes
    lines: list[tuple[list[float], list[float]]] = []
    bands: list[tuple[list[float], list[float], list[float]]] = []
    plot, fill_between = axes.plot, axes.fill_between
    monkeypatch.setattr(axes, "plot", lambda self, x, y, **k: lines.append((x, y)) or plot(self, x, y, **k))
    monkeypatch.setattr(
        axes, "fill_between", lambda self, x, a, b, **k: bands.append((x, a, b)) or fill_between(self, x, a, b, **k)
    )
    rows = [
        {"group": "g", "tensor": "weight", "step": step, "condition": value}
        for step, value in [(5, 3.0), (5, 1.0), (5, 7.0), (0, 2.0), (0, math.inf), (0, math.nan)]
    ]
    rows += [{"group": "h", "tensor": "update", "step": 0, "condition": 9.0}]
    spectra.plot(rows, tmp_path / "spectra.png", "condition")
    assert lines == [([0, 5], [2.0, 3.0])]
    assert bands == [([0, 5], [2.0, 1.0], [2.0, 7.0])]


def test_nothing_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spectra.png"
    with pytest.raises(ValueError, match=r"quantity should be one of 'svd_entropy'.* but is: 'entropy'"):
        spectra.plot(ROWS, path, "entropy")
    with pytest.raises(ValueError, match=r"of tensor 'momentum' but have of: \['update', 'weight'\]"):
        spectra.plot(ROWS, path, tensor="momentum")
    with pytest.raises(ValueError, match="finite rms of tensor 'update'"):
        spectra.plot(ROWS, path, "rms", tensor="update")  # NaN alone
    with pytest.raises(ValueError, match="there are: 7"):
        spectra.plot({str(i): ROWS for i in range(7)}, path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'muon-kernels\[demo\]'"):
        spectra.plot(ROWS, path)
    assert not path.exists()
