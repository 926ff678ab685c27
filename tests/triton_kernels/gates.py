"""What can be read from kernels that are only compiled."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from emulated_gpu import SHARED_BYTES

ARCHITECTURES = list(SHARED_BYTES)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def spilled(kernel: Any) -> int:
    """Bytes that a thread of a CompiledKernel has in memory for want of registers. (Of AMD's, vectors: they have room
    for scalars.)"""
    if "amdgcn" in kernel.asm:
        return 4 * sum(map(int, re.findall(r"\.vgpr_spill_count: *(\d+)", kernel.asm["amdgcn"])))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [int(n) for use in re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report) for n in use]
    assert found, report
    return sum(found)
