"""What the singular values of weights, momentum and updates tell, as numbers, as records of a training, as a picture.

recorder = spectra.Recorder(optimizer, model.named_parameters(), every=100)
...                                        # train as ever
recorder.save("muon.jsonl")
spectra.plot({"Muon": recorder.rows, "AdamW": spectra.load("adamw.jsonl")}, "entropy.png")
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports dynamo when called only
from torch.optim import Optimizer

from .layout import split_shape
from .tensors import check_dense

__all__ = [
    "Recorder",
    "Row",
    "Summary",
    "condition",
    "describe",
    "effective_rank",
    "load",
    "plot",
    "rms",
    "save",
    "stable_rank",
    "summary",
    "svd_entropy",
]

Row = dict[str, Any]

TENSORS = ("weight", "momentum", "update")

# Where optimizers keep a momentum: Muon and SGD; Adam, AdamW, Lion.
_MOMENTA = ("momentum_buffer", "exp_avg")


class Summary(NamedTuple):
    """What `summary` returns: each of shape (...), in float64."""

    svd_entropy: Tensor
    effective_rank: Tensor
    stable_rank: Tensor
    condition: Tensor
    rms: Tensor


QUANTITIES = Summary._fields
_COLUMNS: dict[str, type] = {
    **{"step": int, "name": str, "index": int, "group": str, "tensor": str, "rows": int, "cols": int},
    **dict.fromkeys(QUANTITIES, float),
}


def svd_entropy(W: Tensor) -> Tensor:
    """How evenly the energy of every matrix is spread over its n = min(rows, cols) singular values σ, from 0 to 1:

        H = -1 / log n · Σ pᵢ log pᵢ    with    pᵢ = σᵢ² / Σ σⱼ²

    1 for a flat spectrum, 0 for rank one.

    Args:
        W: (..., rows, cols), of any floating dtype; only read. Computed on its device and in float64, as all of this
            module is.

    Returns:
        (...), float64. For one singular value, whose spectrum is flat, 1; for a zero matrix, and for one without
        elements, 0; for one with NaN or infinity, NaN.

    Source: https://arxiv.org/abs/2502.16982
    """
    return _svd_entropy(_singular_values(W))


def effective_rank(W: Tensor) -> Tensor:
    """How many singular values count, from 1 to min(rows, cols):

        exp(-Σ pᵢ log pᵢ)    with    pᵢ = σᵢ / Σ σⱼ

    This is the definition of those who named it, with p by σ; `svd_entropy` has p by σ², so neither follows from the
    other.

    Args:
        W: (..., rows, cols), see `svd_entropy`.

    Returns:
        (...), float64. 0 for a zero matrix and for one without elements; NaN for one with NaN or infinity.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    return _effective_rank(_singular_values(W))


def stable_rank(W: Tensor) -> Tensor:
    """‖W‖_F² / ‖W‖₂², from 1 to min(rows, cols): it hardly notices small singular values.

    Args:
        W: (..., rows, cols), see `svd_entropy`.

    Returns:
        (...), float64. 0 for a zero matrix and for one without elements; NaN for one with NaN or infinity.

    Source: Rudelson and Vershynin, "Sampling from large matrices", J. ACM 2007.
    """
    return _stable_rank(_singular_values(W))


def condition(W: Tensor) -> Tensor:
    """The largest singular value over the smallest, from 1 to infinity.

    Args:
        W: (..., rows, cols), see `svd_entropy`.

    Returns:
        (...), float64. Infinity where the smallest is 0, so for a zero matrix and for one without elements; where it is
        0 but for rounding, some number above 1e15. NaN for a matrix with NaN or infinity.
    """
    return _condition(_singular_values(W))


def rms(W: Tensor) -> Tensor:
    """Root of the mean square of the elements: of an update, what "match_rms_adamw" holds at 0.2 lr.

    Args:
        W: (..., rows, cols), see `svd_entropy`.

    Returns:
        (...), float64. 0 for a matrix without elements; NaN and infinity stay what they are.
    """
    _check(W)
    norm: Tensor = torch.linalg.vector_norm(W.detach().double(), dim=(-2, -1))
    return norm / math.sqrt(max(W.shape[-2] * W.shape[-1], 1))


def summary(W: Tensor) -> Summary:
    """All of the above for one decomposition.

    Args:
        W: (..., rows, cols), see `svd_entropy`.
    """
    sigma = _singular_values(W)
    return Summary(_svd_entropy(sigma), _effective_rank(sigma), _stable_rank(sigma), _condition(sigma), rms(W))


def _check(W: Tensor) -> None:
    if not isinstance(W, Tensor) or not W.is_floating_point():
        raise TypeError(
            f"W should be a tensor of a floating dtype but is: {W.dtype if isinstance(W, Tensor) else type(W).__name__}"
        )
    if W.ndim < 2:
        raise ValueError(f"W should be matrices (..., rows, cols) but has size: {tuple(W.shape)}")


def _singular_values(W: Tensor) -> Tensor:
    """(..., n) in descending order, float64; NaN for a matrix with NaN or infinity, one zero for an empty one."""
    _check(W)
    W = W.detach().double()
    if W.shape[-2] < W.shape[-1]:
        W = W.mT  # LAPACK takes half the time for tall ones
    if W.shape[-1] == 0:
        return W.new_zeros(*W.shape[:-2], 1)
    finite = W.isfinite().flatten(-2).all(-1, keepdim=True)
    # LAPACK raises for the whole batch where one matrix is not finite.
    sigma: Tensor = torch.linalg.svdvals(W.where(finite.unsqueeze(-1), 0.0))
    return sigma.where(finite, math.nan)


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 / 0 = 0."""
    return part / whole.where(whole != 0, 1.0)


def _relative(sigma: Tensor) -> Tensor:
    """By the largest, so that no square leaves the range; the first is 1, or 0 for a zero matrix."""
    return _over(sigma, sigma[..., :1])


def _entropy(weights: Tensor) -> Tensor:
    """-Σ p log p of p = weights / Σ weights."""
    entropy: Tensor = torch.special.entr(_over(weights, weights.sum(-1, keepdim=True))).sum(-1)
    return entropy


def _svd_entropy(sigma: Tensor) -> Tensor:
    s = _relative(sigma)
    if s.shape[-1] == 1:
        return s[..., 0]
    return (_entropy(s.square()) / math.log(s.shape[-1])).clamp(max=1.0)


def _effective_rank(sigma: Tensor) -> Tensor:
    s = _relative(sigma)
    return s[..., 0] * _entropy(s).exp()


def _stable_rank(sigma: Tensor) -> Tensor:
    return _relative(sigma).square().sum(-1)


def _condition(sigma: Tensor) -> Tensor:
    smallest = sigma[..., -1]
    return (sigma[..., 0] / smallest).where(smallest != 0, math.inf)


@torch.no_grad()
def describe(name: str, W: Tensor, *, tensor: str = "weight", step: int = 0, flatten: bool | None = None) -> list[Row]:
    """The rows of one tensor, one for each matrix that `Muon` sees in it.

    Args:
        name: of the parameter.
        W: of at least two dimensions; three are a batch of matrices, more one matrix (first, all others). Only read.
        tensor: "weight", "momentum", "update", or what you call it.
        step: when.
        flatten: as in `Muon`.

    Returns:
        Dicts of plain numbers and strings: step; name; index, of the matrix in a batch; group, the name with * in the
        place of every number, "layers.*.qkv.weight"; tensor; rows and cols; and what `summary` says.
    """
    check_dense(name, W)
    batch, rows, cols = split_shape(W.shape, flatten)
    place = {"group": re.sub(r"(?<![^.])\d+(?![^.])", "*", name), "tensor": tensor, "rows": rows, "cols": cols}
    # One by one: float64 copies of a whole batch of experts are as large as the model.
    return [
        {"step": step, "name": name, "index": index, **place}
        | dict(zip(QUANTITIES, torch.stack(summary(matrix)).tolist(), strict=True))
        for index, matrix in enumerate(W.detach().reshape(batch, rows, cols))
    ]


class Recorder:
    """Writes down, every so many steps of an optimizer, the spectra of its matrices; the training stays what it was.

        recorder = Recorder(optimizer, model.named_parameters(), every=100)

    It hooks into `optimizer.step` (`register_step_pre_hook` and `register_step_post_hook`), of any torch optimizer. A
    recorded step keeps a copy of the matrices' weights while it runs and takes about a second for a 768x3072 on one
    core, the others nothing. After it there are rows (see `describe`) of

    - "weight": the parameter as the step left it;
    - "momentum": state `momentum_buffer` or `exp_avg`, where the optimizer has it;
    - "update": the parameter after the step less the one before, so with learning rate, weight decay, and rounding to
      the parameter's dtype; no row where there was no gradient. A step that GradScaler leaves out is not counted.

    Recorded is what Muon sees as matrices: two dimensions, each matrix of a stack of three, convolutions and whatever
    else the group's `flatten` says as (first, all others). Vectors, matrices of one row or column among them, and
    complex numbers are not.

    Args:
        optimizer: whose steps count.
        named_parameters: (name, parameter) pairs. Other parameters, and all if None, go by the `param_names` of their
            group, as `muon_kernels.param_groups` sets them, or by "group.place in it".
        every: a positive int; recorded are the steps every, 2 every, 3 every ...
        names: `fnmatch` patterns of which one has to fit, to leave out an embedding whose decomposition takes long.
        tensors: which of "weight", "momentum" and "update".

    Attributes:
        rows: what was recorded.
        step: how many steps were done.

    Raises:
        ValueError: nothing to record, an unknown tensor, an `every` below 1.
        TypeError: no optimizer, no pairs.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        *,
        every: int = 100,
        names: str | Iterable[str] = "*",
        tensors: str | Iterable[str] = TENSORS,
    ) -> None:
        """Hook into the optimizer."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer should be a torch.optim.Optimizer but is: {type(optimizer).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every should be an int >= 1 but is: {every!r}")
        self.rows: list[Row] = []
        self.step = 0
        self._optimizer = optimizer
        self._every = every
        self._patterns = (names,) if isinstance(names, str) else tuple(names)
        self._tensors = (tensors,) if isinstance(tensors, str) else tuple(tensors)
        if unknown := [tensor for tensor in self._tensors if tensor not in TENSORS]:
            raise ValueError(f"tensors should be among {', '.join(map(repr, TENSORS))} but include: {unknown[0]!r}")
        try:
            self._names = {p: name for name, p in named_parameters or ()}
        except (TypeError, ValueError):
            raise TypeError(
                "named_parameters should be (name, parameter) pairs, as model.named_parameters() has them, but is: "
                f"{type(named_parameters).__name__}"
            ) from None
        if self._names and not any(p in self._names for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "named_parameters should be those of the optimizer but none of them is; give the model's that it steps"
            )
        if not (found := list(self._matrices())):
            raise ValueError(f"a matrix of the optimizer should be called like {self._patterns} but none is")
        for name, p, _ in found:
            check_dense(name, p)
        self._before: dict[Tensor, Tensor] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._prepare),
            optimizer.register_step_post_hook(self._count),
        ]

    def record(self) -> None:
        """Add rows of the weights and momenta as they are now, out of turn: before the first step, say."""
        self._record({})

    def remove(self) -> None:
        """Let go of the optimizer; the rows stay."""
        for handle in self._handles:
            handle.remove()
        self._before = {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a file; see `save`."""
        save(self.rows, path)

    def load(self, path: str | os.PathLike[str], step: int | None = None) -> None:
        """Go on where a saved recorder was: take up its rows and count from there.

        Args:
            path: a file of `save`.
            step: of the checkpoint that the training resumes from; rows of later steps are left out. None: the last
                row's.
        """
        rows = load(path)
        last = max((row["step"] for row in rows), default=0)
        self.step = last if step is None else step
        self.rows = [row for row in rows if row["step"] <= self.step]

    def _matrices(self) -> Iterator[tuple[str, Tensor, bool | None]]:
        """Name, parameter and `flatten` of what there is to record."""
        for number, group in enumerate(self._optimizer.param_groups):
            named = group.get("param_names", [])
            for place, p in enumerate(group["params"]):
                name = self._names.get(p) or (named[place] if place < len(named) else f"{number}.{place}")
                if p.ndim < 2 or not p.is_floating_point():
                    continue
                flatten = group.get("flatten")
                if min(split_shape(p.shape, flatten)[1:]) > 1 and any(fnmatchcase(name, at) for at in self._patterns):
                    yield name, p, flatten

    @_disable_dynamo
    @torch.no_grad()
    def _prepare(self, *_: object) -> None:
        due = (self.step + 1) % self._every == 0 and "update" in self._tensors
        self._before = {p: p.detach().clone() for _, p, _ in self._matrices()} if due else {}

    @_disable_dynamo
    def _count(self, *_: object) -> None:
        self.step += 1
        before, self._before = self._before, {}
        if self.step % self._every == 0:
            self._record(before)

    @torch.no_grad()
    def _record(self, before: Mapping[Tensor, Tensor]) -> None:
        for name, p, flatten in self._matrices():
            seen: dict[str, Tensor] = {"weight": p}
            state = self._optimizer.state.get(p, {})
            for key in _MOMENTA:
                momentum = state.get(key)
                # Some optimizers keep codes there.
                if isinstance(momentum, Tensor) and momentum.is_floating_point() and momentum.shape == p.shape:
                    seen["momentum"] = momentum
            if p in before and p.grad is not None:
                seen["update"] = p.double() - before[p].double()
            for tensor in self._tensors:
                if tensor in seen:
                    self.rows += describe(name, seen[tensor], tensor=tensor, step=self.step, flatten=flatten)


def save(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write rows to a file that `load` reads: one JSON object a line, or a table.

    The file is there whole or, should the writing be cut off, as it was before.

    Args:
        rows: of `Recorder` or `describe`; columns of your own are kept.
        path: ends in ".jsonl", where infinity and NaN are strings because JSON has neither, or in ".csv".

    Raises:
        ValueError: another ending.
    """
    path, rows = _with_suffix(path), list(rows)
    beside = path.with_name(path.name + ".part")
    with beside.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, dict.fromkeys([*_COLUMNS, *(key for row in rows for key in row)]))
            table.writeheader()
            table.writerows(rows)
        else:
            for row in rows:
                plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
                file.write(json.dumps(plain) + "\n")
    beside.replace(path)


def load(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file that `save` wrote, with the same numbers.

    Raises:
        ValueError: another ending than ".jsonl" and ".csv", or a row without a column that rows have.
    """
    path = _with_suffix(path)
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    for row in rows:
        if missing := [column for column in _COLUMNS if row.get(column) is None]:
            raise ValueError(f"a row of {path} should have {', '.join(_COLUMNS)} but lacks: {', '.join(missing)}")
        row.update((column, kind(row[column])) for column, kind in _COLUMNS.items())
    return rows


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"the file's name should end in .jsonl or .csv but is: {path.name}")
    return path


# Okabe and Ito's colours, which the colour-blind tell apart, and dashes for those who print in grey.
_STYLES: Sequence[dict[str, Any]] = [
    {"color": color, "linestyle": dashes, "marker": marker}
    for color, dashes, marker in [
        ("#0072B2", "-", "o"),
        ("#D55E00", "--", "s"),
        ("#009E73", "-.", "^"),
        ("#CC79A7", ":", "D"),
        ("#56B4E9", (0, (5, 1)), "v"),
        ("#E69F00", (0, (3, 1, 1, 1)), "P"),
    ]
]

_LABELS = {
    "svd_entropy": "SVD entropy",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "condition": "condition number",
    "rms": "RMS",
}


def plot(
    rows: Sequence[Row] | Mapping[str, Sequence[Row]],
    path: str | os.PathLike[str],
    quantity: str = "svd_entropy",
    *,
    tensor: str = "weight",
) -> None:
    """Draw a quantity against the step: a panel a group of matrices, a line at their median, a band from least to most.

    Args:
        rows: of one training, or of several by name, which are laid over each other.
        path: of the PNG, written.
        quantity: a field of `Summary`; "condition" and "rms" get a logarithmic axis. What is not finite, or for those
            not positive, is left out.
        tensor: "weight", "momentum" or "update".

    Raises:
        ValueError: an unknown quantity, more than six trainings, or nothing to draw.
        ModuleNotFoundError: there is no matplotlib.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity should be one of {', '.join(map(repr, QUANTITIES))} but is: {quantity!r}")
    runs = rows if isinstance(rows, Mapping) else {"": rows}
    if len(runs) > len(_STYLES):
        raise ValueError(f"at most {len(_STYLES)} trainings can be told apart but there are: {len(runs)}")
    logarithmic = quantity in ("condition", "rms")
    # group → training → step → what its matrices have
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run, own in runs.items():
        for row in own:
            y = row[quantity]
            if row["tensor"] == tensor and math.isfinite(y) and (y > 0 or not logarithmic):
                by_step = values.setdefault(row["group"], {}).setdefault(run, {})
                by_step.setdefault(row["step"], []).append(y)
    if not values:
        there = sorted({row["tensor"] for own in runs.values() for row in own})
        raise ValueError(f"rows should have a finite {quantity} of tensor {tensor!r} but have of: {there}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter, MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "spectra.plot needs matplotlib; install it with: pip install 'muon-kernels[demo]'", name="matplotlib"
        ) from error

    columns = min(math.ceil(math.sqrt(len(values))), 4)
    lines = math.ceil(len(values) / columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.0 + 2.7 * lines), layout="constrained", dpi=150)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    styles = dict(zip(runs, _STYLES, strict=False))
    drawn: dict[str, Any] = {}
    for axes, (group, by_run) in zip(panels, values.items(), strict=False):
        for run, by_step in by_run.items():
            steps = sorted(by_step)
            middle = [median(by_step[step]) for step in steps]
            line = axes.plot(steps, middle, markersize=3, linewidth=1.6, label=run, **styles[run])[0]
            drawn.setdefault(run, line)
            least, most = ([pick(by_step[step]) for step in steps] for pick in (min, max))
            axes.fill_between(steps, least, most, color=styles[run]["color"], alpha=0.18, linewidth=0)
        axes.set_title(textwrap.fill(group.replace(".", ". "), 40).replace(". ", "."), fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        if logarithmic:
            axes.set_yscale("log")
            # Some tick gets its number also where the range has no power of ten.
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(values) :]:
        axes.remove()
    figure.supxlabel("step")
    figure.supylabel(f"{_LABELS[quantity]} of the {tensor}\nmedian and range", multialignment="center")
    if drawn.keys() - {""}:
        figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=len(drawn), frameon=False)
    figure.savefig(Path(path), format="png")
