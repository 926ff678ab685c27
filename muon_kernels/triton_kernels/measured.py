"""Tables of tiles that were measured on the GPU at hand, by `python -m muon_kernels tune`. A step measures nothing."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import driver

from .. import kept
from . import configs
from .configs import Config, Table

# Since then torch.mm has out_dtype.
_SUMS_IN_FP32 = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


def file_of(name: str) -> Path:
    """Return the file for the table of a GPU of that name, with this version of triton."""
    return kept.file_of(f"{name} triton {triton.__version__}")


def save(file: Path, table: Table) -> None:
    """Keep a table for later processes; RuntimeError, with how to fix it, if that fails."""
    kept.save(file, {"configs": [c._asdict() for c in table.configs], "vendor_from": table.vendor_from})


def load(file: Path, shipped: Table) -> Table | None:
    """A table that was kept; None if there is none, or none of the candidates that are shipped."""
    return kept.load(file, "table of tiles", partial(_read, shipped))


def _read(shipped: Table, content: Any) -> Table:
    """Return the table in a file's content; raise ValueError, TypeError or KeyError if it is none."""
    found = [Config(**{**c, "residents": tuple(c["residents"])}) for c in content["configs"]]
    if list(map(_untimed, found)) != list(map(_untimed, shipped.configs)):
        raise ValueError("it has other candidates than this version")
    if not all(0 < c.cost < math.inf and 0 <= c.fixed < math.inf for c in found):
        raise ValueError("a cost is not positive, or a time beside k negative")
    vendor_from = content["vendor_from"]
    if vendor_from is not None and not (type(vendor_from) is int and vendor_from > 0):
        raise ValueError("vendor_from is neither null nor a size")
    return Table(tuple(found), vendor_from)


def _untimed(config: Config) -> Config:
    """Return a candidate without what is measured."""
    return config._replace(cost=0, fixed=0)


def name_of_gpu() -> str:
    """Return the name of the current device."""
    device = driver.active.get_active_torch_device()
    if device.type == "cpu":  # only in tests, where something executes kernels in a GPU's place
        return f"none {driver.active.get_current_target().arch}"
    return str(getattr(torch, device.type).get_device_name(device))


def shipped() -> Table:
    """Return the shipped table for the current device."""
    return _usable(configs.table(driver.active.get_current_target().arch))


def table() -> Table:
    """Return the table for the current device: the one that was measured on such a GPU, or the shipped one."""
    found = load(file_of(name_of_gpu()), shipped())
    return shipped() if found is None else _usable(found)


def _usable(table: Table) -> Table:
    """Take the vendor's library out of a table where torch rounds its sums before it returns them."""
    return table if _SUMS_IN_FP32 else table._replace(vendor_from=None)
