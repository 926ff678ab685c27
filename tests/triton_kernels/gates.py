"""What a compiled kernel must look like, on every architecture; nothing is executed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import triton
from emulated_e import SHARED, Compilation, Device, Place

PLACES = list(SHARED)


def compiled(place: Place, call: Callable[[], object]) -> list[Compilation]:
    """The kernels that `call` launches, by its specialisations."""
    on = Device(place)
    with on.active(execute=False):
        call()
    return on.compilations


def spilled(c: Compilation) -> int:
    """Bytes of a thread that registers have no room for. (Of AMD's vector registers: they have room for scalars.)"""
    if any(file.endswith(".amdgcn") for file in c.files):
        return 4 * sum(map(int, re.findall(r"\.vgpr_spill_count: *(\d+)", c.text("amdgcn"))))
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [cuobjdump, "--dump-resource-usage", c.path("cubin")], capture_output=True, text=True, check=True
    )
    return max(map(int, re.findall(r"STACK:(\d+)", report.stdout)))
