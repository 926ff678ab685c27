"""What can be read from the machine code that was installed: no spills, registers and shared memory as occupancy needs
them, and the instructions that were meant, for every architecture that the module has.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from muon_kernels.backends import native

triton = pytest.importorskip("triton.language", reason="no triton: its wheel has cuobjdump")
pytestmark = pytest.mark.skipif(
    not hasattr(native.module(), "cuda"), reason="muon_kernels was installed without its CUDA kernels"
)

CUOBJDUMP = Path(triton.__file__).parents[1] / "backends" / "nvidia" / "bin" / "cuobjdump"
# KiB of shared memory that blocks on one multiprocessor share; each block costs one more than it asks for.
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
LARGE_SHARED = 164


def _cuobjdump(*arguments: str) -> str:
    command = [CUOBJDUMP, *arguments, str(native.required().__file__)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def architectures() -> list[int]:
    return sorted({int(arch) for arch in re.findall(r"\.sm_(\d+)\.cubin", _cuobjdump("-lelf"))})


class Compiled(NamedTuple):
    """A kernel for one architecture."""

    name: str
    registers: int
    local_bytes: int  # stack and spills
    shared_bytes: int  # without what a launch asks for
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\s{instruction}", self.sass))


@cache
def compiled(arch: int | str) -> list[Compiled]:
    codes = dict(
        re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", _cuobjdump("-sass", "-arch", f"sm_{arch}"), re.DOTALL)
    )
    usages = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        _cuobjdump("-res-usage", "-arch", f"sm_{arch}"),
    )
    assert len(codes) == len(usages) > 0
    return [
        Compiled(n, int(reg), int(stack) + int(local), int(shared), codes[n]) for n, reg, stack, shared, local in usages
    ]


def named(arch: int | str, pattern: str, count: int) -> list[tuple[Compiled, list[int]]]:
    """The kernels whose mangled name has the pattern, with its template's numbers; that many if bf16 and f16 count."""
    found = [(k, m) for k in compiled(arch) if (m := re.search(pattern, k.name))]
    assert len(found) == count, [k.name for k, _ in found]
    return [(k, [int(n) for n in re.findall(r"Li(\d+)E", m[0])]) for k, m in found]


def blocks(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """How many fit on a multiprocessor: registers come in units of 8 a thread."""
    of_registers = 65536 // (threads * -(-registers // 8) * 8)
    return min(of_registers, (SHARED_KIB[arch] << 10) // (shared_bytes + 1024))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" in metafunc.fixturenames:
        metafunc.parametrize("arch", architectures() if hasattr(native.module(), "cuda") else [])


def test_nothing_spills(arch: int) -> None:
    for kernel in compiled(arch):
        assert not kernel.local_bytes, (kernel.name, kernel.local_bytes)
        assert not kernel.count("LDL") and not kernel.count("STL"), kernel.name


# By tile: blocks of a multiprocessor with 164 KiB or more, and with 100.
RESIDENT = {(128, 128): (2, 2), (128, 64): (3, 2), (64, 64): (3, 2)}


def test_products(arch: int) -> None:
    for kernel, numbers in named(arch, r"4TileI(?:Li\d+E)+E", 14):
        block_m, block_n, block_k, stages, warps_m, warps_n, _ = numbers
        shared = max(stages * 2 * (block_m + block_n) * block_k, 2 * block_m * block_n)
        assert kernel.shared_bytes <= 1024  # the system's own, from 9.0 on
        assert shared <= 48 << 10  # more has to be asked for
        resident = blocks(arch, 32 * warps_m * warps_n, kernel.registers, shared)
        wanted = RESIDENT[block_m, block_n][SHARED_KIB[arch] < LARGE_SHARED]
        assert resident >= wanted, (kernel.name, kernel.registers)
        # One step unrolled, once: each fragment is loaded once for all the products that need it.
        mmas = block_m * block_n * block_k // 2048 // (warps_m * warps_n)
        assert kernel.count("HMMA.16816.F32") == mmas, kernel.name
        assert kernel.count("LDSM") and kernel.count(r"LDGSTS.E.BYPASS.LTC128B.128") and kernel.count(r"STG.E.128")


def test_products_of_sm90a() -> None:
    """Operands come by tensor copies and go to wgmma, results leave by them; a thread loads parts of diagonals only."""
    if not native.required().cuda.wgmma:
        pytest.skip("muon_kernels was installed without code for sm_90a")
    for kernel, numbers in named("90a", r"4TileI(?:Li\d+E)+Lb\dELi\dEE", 12):
        (_, columns, _, cluster), threads = numbers, 384
        assert not kernel.local_bytes and not kernel.count("LDL") and not kernel.count("STL"), kernel.name
        # What setmaxnreg divides, and a block's threads begin with.
        assert kernel.registers == 65536 // threads // 8 * 8 and kernel.count("USETMAXREG") == 2
        of_stage, wgmma = {128: (8, r"HGMMA.64x128x16.F32"), 256: (4, r"HGMMA.64x256x16.F32")}[columns]
        wgmmas = kernel.count(wgmma)
        assert wgmmas and wgmmas % of_stage == 0, "four times 16 columns a stage, of which the loop has some"
        assert kernel.count(r"UTMALDG.3D") and kernel.count(r"UTMASTG.3D")
        assert bool(kernel.count(r"UTMALDG.3D.MULTICAST")) == (cluster > 1)
        assert (
            not kernel.count("LDGSTS") and not kernel.count(r"LDG\S*.(64|128)") and not kernel.count(r"STG\S*.(64|128)")
        )
        assert kernel.count(r"STSM.16.M88.4") and kernel.count(r"STSM.16.MT88.4") and kernel.count("LDSM")


@pytest.mark.parametrize(("kernel", "count"), [("momentum_kernel", 18), ("apply_kernel", 8)])
def test_elementwise(arch: int, kernel: str, count: int) -> None:
    for found, _ in named(arch, kernel, count):
        assert blocks(arch, 256, found.registers, found.shared_bytes) >= 4, (found.name, found.registers)
        assert found.count(r"LDG.E\S*.128") and found.count(r"STG.E\S*.128"), "not 16 bytes at a time"


# By rows: blocks of a multiprocessor, as registers allow.
FUSED_RESIDENT = {16: 13, 32: 6, 64: 2, 128: 1}


def test_fused_step(arch: int) -> None:
    for kernel, (rows,) in named(arch, r"fused_step_kernelILi\d+E", 4):
        assert 65536 // (2 * rows * -(-kernel.registers // 8) * 8) >= FUSED_RESIDENT[rows], kernel.registers
        # One product of squares, and the Gram matrix and the update in either layout, 16 rows a warp.
        tiles, parts = rows // 16, 3 if rows == 128 else 6
        assert kernel.count("HMMA.16816.F32.BF16") == 2 * parts * (tiles**2 + 4 * tiles) and kernel.count("LDSM")
        assert kernel.count(r"LDG.E\S*.128") and kernel.count(r"STG.E\S*.128"), "not 16 bytes at a time"
