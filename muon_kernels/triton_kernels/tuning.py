"""What products are run with on the GPU at hand: what `python -m muon_kernels tune` measured on it, or what is shipped.

A step never measures anything.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from . import products
from .configs import Config, Gpu, Shape, Table, choose, shipped

_ROUNDS = 3
_SIDES = (1024, 2048, 4096, 8192)
_TILES_A_MULTIPROCESSOR = 8  # of the largest tiles: enough that the last ones do not count


def file_of(name: str) -> Path:
    """Where the table of a GPU of that name is kept, for this version of triton."""
    base = os.environ.get("MUON_KERNELS_CACHE_DIR")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} triton {triton.__version__}".lower())
    return (Path(base) if base else caches / "muon_kernels") / f"{slug}.json"


def writable(file: Path) -> None:
    """Raise RuntimeError, with the mend, unless `file` can be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        mend = "set MUON_KERNELS_CACHE_DIR to a directory that can be written"
        raise RuntimeError(f"{file} cannot be written ({error}); {mend}") from None


def save(file: Path, table: Table) -> None:
    """Keep a table for later processes."""
    content = {"configs": [c._asdict() for c in table.configs], "vendor_from": table.vendor_from}
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(content, indent=1))
    part.replace(file)  # so that nobody reads half of it


def load(name: str) -> Table | None:
    """The table that was measured on a GPU of that name; None if there is none, or none that can be read."""
    file = file_of(name)
    try:
        content = json.loads(file.read_text())
        configs = tuple(Config(**c) for c in content["configs"])
        if not any(c.block_m == c.block_n for c in configs) or not all(c.cost > 0 for c in configs):
            raise ValueError("no square tile, or a cost that is none")
        return Table(configs, content["vendor_from"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"{file} is no table of tiles ({error}) and is not used; run python -m muon_kernels tune again, or delete it",
            stacklevel=2,
        )
        return None


def name_of_gpu() -> str:
    """Of the current device."""
    device = driver.active.get_active_torch_device()
    if device.type == "cpu":  # only in tests, where something executes kernels in a GPU's place
        return f"none {driver.active.get_current_target().arch}"
    return str(getattr(torch, device.type).get_device_name(device))


@cache
def gpu(device: Any) -> Gpu:
    """What is to be known of a device of this process, the current one."""
    multiprocessors = int(driver.active.utils.get_device_properties(device)["multiprocessor_count"])
    target = driver.active.get_current_target().arch
    return Gpu(target, multiprocessors, load(name_of_gpu()) or shipped(target))


def measure(
    time: Callable[[Callable[[], None]], float], sides: tuple[int, ...] = _SIDES
) -> Iterator[tuple[str, float, Table | None]]:
    """Time all candidates on the current device.

    Args:
        time: milliseconds that a call takes.
        sides: of the matrices for which the vendor's library is tried.

    Yields:
        (what was timed, TFLOP/s, None), and at last ("", 0, the table).
    """
    device = driver.active.get_current_device()
    here = gpu(device)
    torch_device = driver.active.get_active_torch_device()
    side = sides[0]
    candidates = shipped(here.target).configs
    largest = max(c.block_m * c.block_n for c in candidates)
    batch = max(1, _TILES_A_MULTIPROCESSOR * here.multiprocessors * largest // side**2)
    a, x, c, out = (torch.randn(batch, side, side, device=torch_device).bfloat16() for _ in range(4))
    flops = 2.0 * batch * side**3

    def call(config: Config, symmetric: bool) -> Callable[[], None]:
        b = a if symmetric else x
        return lambda: products.product(
            a, b, out, b_transposed=symmetric, symmetric=symmetric, c=c, beta=0.5, config=config
        )

    rivals = [(config, s) for config in candidates for s in (False, True) if not s or config.block_m == config.block_n]
    times: dict[tuple[Config, bool], list[float]] = {rival: [] for rival in rivals}
    for _ in range(_ROUNDS):  # in turns: a clock that changes changes all
        for rival in rivals:
            times[rival].append(time(call(*rival)))
    relative: dict[Config, list[float]] = {config: [] for config in candidates}
    for s in (False, True):
        best = min(median(times[rival]) for rival in rivals if rival[1] == s)
        for config, symmetric in rivals:
            if symmetric == s:
                took = median(times[config, s])
                relative[config].append(took / best)
                what = f"{'syrk' if s else 'gemm'} {config.block_m}x{config.block_n}x{config.block_k}"
                yield what, flops * (0.5 if s else 1) / took / 1e9, None
    table = Table(tuple(c._replace(cost=sum(relative[c]) / len(relative[c])) for c in candidates), None)
    for side in reversed(sides):
        shape = Shape(1, side, side, side, False)
        try:
            a, x, c, out = (torch.randn(1, side, side, device=torch_device).bfloat16() for _ in range(4))
            diagonal = torch.randn(1, side, device=torch_device)
            config = choose(shape, Gpu(here.target, here.multiprocessors, table))
            ours = lambda: products.product(a, x, out, a_diagonal=diagonal, c=c, beta=0.5, config=config)  # noqa: B023
            theirs = lambda: products.gemm_by_vendor(a, x, c, out, diagonal, 1.0, 0.5, None)  # noqa: B023
            turns = [(time(ours), time(theirs)) for _ in range(_ROUNDS)]
        except torch.OutOfMemoryError:
            continue
        for who, took in zip(("ours", "the vendor's"), map(median, zip(*turns, strict=True)), strict=True):
            yield f"gemm of {side}, {who}", 2.0 * side**3 / took / 1e9, None
        if not median(their / our for our, their in turns) < 1:
            break
        table = table._replace(vendor_from=side)
    yield "", 0.0, table
