"""What can be read from the compiled kernels: no spills, registers and shared memory as occupancy needs them, and the
instructions that were meant.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from ptx import standin
from ptx.module import cached

triton = pytest.importorskip("triton", reason="no triton: its wheel has cuobjdump")
pytestmark = pytest.mark.skipif(standin.nvcc() is None, reason="no nvcc: kernels cannot be compiled")

CSRC = Path(__file__).resolve().parents[2] / "csrc"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# KiB of shared memory that blocks on one multiprocessor share; each block costs one more than it asks for.
SHARED_KIB = {80: 164, 90: 228, 100: 228, 120: 100}


class Compiled(NamedTuple):
    """A kernel for one architecture."""

    name: str
    registers: int
    local_bytes: int  # stack and spills
    static_shared: int
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\s{instruction}", self.sass))


@cache
def compiled(source: str, arch: int) -> list[Compiled]:
    path = CSRC / "cuda" / source
    text = "".join(p.read_text() for p in sorted((CSRC / "cuda").glob("*.*h"))) + path.read_text()
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++17", str(path), "-o"]
    make = lambda out: subprocess.run([*command, str(out)], check=True, capture_output=True) and None
    cubin = str(cached(".cubin", ["cubin", source, str(arch), text], make))
    dump = lambda what: subprocess.run([str(CUOBJDUMP), what, cubin], check=True, capture_output=True, text=True).stdout
    codes = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", dump("-sass"), re.DOTALL))
    usages = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump("-res-usage"))
    assert len(codes) == len(usages) > 0
    return [
        Compiled(n, int(reg), int(stack) + int(local), int(shared), codes[n]) for n, reg, stack, shared, local in usages
    ]


def blocks(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """How many fit on a multiprocessor: registers come in units of 8 a thread."""
    of_registers = 65536 // (threads * -(-registers // 8) * 8)
    return min(of_registers, (SHARED_KIB[arch] << 10) // (shared_bytes + 1024))


# By tile: blocks of a multiprocessor with 164 KiB or more, and with 100.
RESIDENT = {(128, 128): (2, 2), (128, 64): (3, 2), (64, 64): (3, 2)}


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_products(arch: int) -> None:
    found = compiled("product_sm80.cu", arch)
    assert len(found) == 14
    for kernel in found:
        numbers = re.search(r"TileI((?:Li\d+E)+)EELb(\d)ELb(\d)E", kernel.name)
        assert numbers, kernel.name
        block_m, block_n, block_k, stages, warps_m, warps_n, _ = (int(n) for n in re.findall(r"\d+", numbers[1]))
        shared = max(stages * 2 * (block_m + block_n) * block_k, 2 * block_m * block_n)
        large, small = RESIDENT[block_m, block_n]
        assert not kernel.local_bytes, kernel.name
        assert kernel.static_shared <= 1024  # the system's own, from 9.0 on
        assert shared <= 48 << 10  # more has to be asked for
        resident = blocks(arch, 32 * warps_m * warps_n, kernel.registers, shared)
        assert resident >= (small if SHARED_KIB[arch] <= 100 else large), (kernel.name, kernel.registers)
        assert not kernel.count("LDL") and not kernel.count("STL"), "local memory"
        # One step unrolled, once: each fragment is loaded once for all the products that need it.
        mmas = block_m * block_n * block_k // 2048 // (warps_m * warps_n)
        assert kernel.count("HMMA.16816.F32") == mmas, kernel.name
        assert kernel.count("LDSM") and kernel.count(r"LDGSTS.E.BYPASS.LTC128B.128") and kernel.count(r"STG.E.128")
