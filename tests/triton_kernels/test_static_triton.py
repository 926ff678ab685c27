"""What can be read from the compiled products: no spills, shared memory and threads that the GPU has, and the tensor
instructions that were meant, for every config of every architecture.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton.language", reason="no triton")

import triton
from emulated_gpu import SHARED_BYTES, compiling
from ptx.module import cached

from muon_kernels.triton_kernels import products
from muon_kernels.triton_kernels.configs import Config, table

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
ENTRIES = [(arch, config) for arch in (*TENSOR, "gfx942") for config in table(arch)]


def kernels(arch: int | str, config: Config) -> Iterator[Any]:
    """Triton's CompiledKernels of the products with most addends: S = a I + b R + c R², R S, and b X + S X."""
    R, S, X = torch.empty(1, 64, 64).bfloat16(), torch.empty(1, 64, 64).bfloat16(), torch.empty(1, 64, 128).bfloat16()
    lost, scale = torch.empty(1, 64), torch.empty(1)
    squares: dict[str, Any] = dict(a_diagonal=lost, b_diagonal=lost, out_diagonal=lost, symmetric=True)
    # Their own place in Triton's table of kernels: it knows devices, and not whose turn it is.
    with compiling(arch, hash((arch, config))) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "choose", lambda *_: config)
        if config.block_m == config.block_n:
            products.product(R, R, S, b_transposed=True, c=R, c_diagonal=lost, scale=scale, **squares)
            products.product(R, S, torch.empty_like(R), **squares)
        products.product(S, X, torch.empty_like(X), a_diagonal=lost, c=X, scale=scale)
        yield from device.kernels(products._product)


@cache
def dump(what: str, cubin: bytes) -> str:
    path = cached(".cubin", ["triton", cubin.hex()], lambda out: out.write_bytes(cubin) and None)
    return subprocess.run([str(CUOBJDUMP), what, str(path)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("arch", "config"), ENTRIES, ids=[f"{a}-{c.block_m}x{c.block_n}" for a, c in ENTRIES])
def test_compiled(arch: int | str, config: Config) -> None:
    found = list(kernels(arch, config))
    assert len(found) == (3 if config.block_m == config.block_n else 1)
    for kernel in found:
        assert kernel.metadata.shared <= SHARED_BYTES[arch]
        if isinstance(arch, str):
            text = kernel.asm["amdgcn"]
            assert "v_mfma_f32" in text
            assert re.findall(r"\.vgpr_spill_count: +(\d+)", text) == ["0"]
            continue
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage", kernel.asm["cubin"]))
        assert usage and int(usage[1]) * 32 * config.num_warps <= 65536
        assert (int(usage[2]), int(usage[3])) == (0, 0), "spills"
        sass = dump("-sass", kernel.asm["cubin"])
        count = lambda instruction, sass=sass: len(re.findall(rf"\s{instruction}", sass))
        assert count(rf"{TENSOR[arch]}\b") > 0
        # Operands by 16-byte copies that nobody waits for, all else by 16-byte accesses.
        assert count(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128") == count("LDGSTS") > 0
        assert count(r"LDG\.E\.128") >= config.block_m * config.block_n // (32 * config.num_warps) // 8
        assert count(r"STG\.E\.(U16|U8|64)") == 0 and count(r"STG\.E\.128") > 0
