"""Rows of a record: the quantities of a matrix at a step, and files of them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layout import split_shape
from ..tensors import check_dense
from .quantities import QUANTITIES, summary

Row = dict[str, Any]

COLUMNS: dict[str, type] = {
    **{"step": int, "name": str, "index": int, "group": str, "tensor": str, "rows": int, "cols": int},
    **dict.fromkeys(QUANTITIES, float),
}


@torch.no_grad()
def describe(name: str, W: Tensor, *, tensor: str = "weight", step: int = 0, flatten: bool | None = None) -> list[Row]:
    """Make the rows of one tensor, one for each matrix that `Muon` sees in it.

    Args:
        name: name of the parameter.
        W: of at least two dimensions; three are a batch of matrices, more one matrix (first, all others). Only read.
        tensor: "weight", "momentum", "update", or what you call it.
        step: step of the training.
        flatten: as in `Muon`.

    Returns:
        Dicts of plain numbers and strings: step; name; index of the matrix in a batch; group, the name with * in the
        place of every number, as "layers.*.qkv.weight"; tensor; rows and cols; and the quantities of `Summary`.
    """
    check_dense(name, W)
    batch, rows, cols = split_shape(W.shape, flatten)
    # One by one: float64 copies of a whole batch of experts are as large as the model.
    measured = [torch.stack(summary(matrix)).tolist() for matrix in W.detach().reshape(batch, rows, cols)]
    return make_rows(name, (rows, cols), measured, tensor, step)


def make_rows(
    name: str, size: tuple[int, int], measured: Iterable[Sequence[float]], tensor: str, step: int
) -> list[Row]:
    """Make the rows of one tensor from the quantities of its matrices, which are all of one size; see `describe`."""
    group = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
    place = {"group": group, "tensor": tensor, "rows": size[0], "cols": size[1]}
    return [
        {"step": step, "name": name, "index": index, **place} | dict(zip(QUANTITIES, numbers, strict=True))
        for index, numbers in enumerate(measured)
    ]


def save(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write rows to a file that `load` reads: JSON, an object a line, or a table.

    Should the writing be cut off, the file is as it was before.

    Args:
        rows: rows of `Recorder` or `describe`; columns of your own are kept.
        path: path that ends in ".jsonl", where infinity and NaN are strings because JSON has neither, or in ".csv".

    Raises:
        ValueError: another ending.
    """
    path, rows = _with_suffix(path), list(rows)
    beside = path.with_name(path.name + ".part")
    with beside.open("w", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)]))
            table.writeheader()
            table.writerows(rows)
        else:
            for row in rows:
                plain = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
                file.write(json.dumps(plain) + "\n")
    beside.replace(path)


def load(path: str | os.PathLike[str]) -> list[Row]:
    """Read the rows of a file that `save` wrote, with the same numbers.

    Raises:
        ValueError: another ending than ".jsonl" and ".csv", or a row without a column that rows have.
    """
    path = _with_suffix(path)
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    for row in rows:
        if missing := [column for column in COLUMNS if row.get(column) is None]:
            raise ValueError(f"a row of {path} should have {', '.join(COLUMNS)} but lacks: {', '.join(missing)}")
        row.update((column, kind(row[column])) for column, kind in COLUMNS.items())
    return rows


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"the file's name should end in .jsonl or .csv but is: {path.name}")
    return path
