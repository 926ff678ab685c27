"""Tables of tiles that were measured on the GPU at hand, by `python -m muon_kernels tune`. A step measures nothing."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from triton.runtime import driver

from . import configs
from .configs import Config, Table

# Since then torch.mm has out_dtype.
_SUMS_IN_FP32 = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


def file_of(name: str) -> Path:
    """Return the file for the table of a GPU of that name, with this version of triton."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} triton {triton.__version__}".lower())
    if base := os.environ.get("MUON_KERNELS_CACHE_DIR"):
        return Path(base) / f"{slug}.json"
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # who has no home has that
    return Path(caches) / "muon_kernels" / f"{slug}.json"


_MEND = "set MUON_KERNELS_CACHE_DIR to a directory that can be written"


def writable(file: Path) -> None:
    """Raise RuntimeError, with how to fix it, unless `file` can be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise RuntimeError(f"{file} cannot be written ({error}); {_MEND}") from None


def save(file: Path, table: Table) -> None:
    """Keep a table for later processes; RuntimeError, with how to fix it, if that fails."""
    content = {"configs": [c._asdict() for c in table.configs], "vendor_from": table.vendor_from}
    part = file.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=1))
        part.replace(file)  # so that nobody reads half of it
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RuntimeError(f"{file} cannot be written ({error}); {_MEND}") from None


def load(file: Path, shipped: Table) -> Table | None:
    """A table that was kept; None if there is none, or none of the candidates that are shipped."""
    try:
        content = json.loads(file.read_text())
        kept = [Config(**{**c, "residents": tuple(c["residents"])}) for c in content["configs"]]
        if list(map(_untimed, kept)) != list(map(_untimed, shipped.configs)):
            raise ValueError("it has other candidates than this version")
        if not all(0 < c.cost < math.inf and 0 <= c.fixed < math.inf for c in kept):
            raise ValueError("a cost is not positive, or a time beside k negative")
        vendor_from = content["vendor_from"]
        if vendor_from is not None and not (type(vendor_from) is int and vendor_from > 0):
            raise ValueError("vendor_from is neither null nor a size")
        return Table(tuple(kept), vendor_from)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"{file} is no table of tiles ({type(error).__name__}: {error}) and is not used"
        warnings.warn(f"{what}; run python -m muon_kernels tune again, or delete it", stacklevel=2)
        return None


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
    kept = load(file_of(name_of_gpu()), shipped())
    return shipped() if kept is None else _usable(kept)


def _usable(table: Table) -> Table:
    """Take the vendor's library out of a table where torch rounds its sums before it returns them."""
    return table if _SUMS_IN_FP32 else table._replace(vendor_from=None)
