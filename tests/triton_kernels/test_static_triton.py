"""What can be read from the compiled products: no spills, shared memory and threads that the GPU has, and the tensor
instructions and copies that were meant, for every config of every architecture.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton.language", reason="no triton")

import triton
from emulated_gpu import SHARED_BYTES, compiling
from ptx.module import cached

from muon_kernels.backends import triton as backend
from muon_kernels.coefficients import resolve
from muon_kernels.newton_schulz import ALGORITHMS, Square
from muon_kernels.triton_kernels import products
from muon_kernels.triton_kernels.configs import Config, table

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# Of Newton-Schulz's products those that need most registers: a I + b R + c R², R S, and b X + S X.
SQUARES = ("squared", "multiplied")


def entries() -> list[Any]:
    """Every config with every product that it computes; where it uses TMA, one of them without, which is for operands
    that are not aligned. sm_86 and 89 get the code of sm_80 and less shared memory."""
    found = []
    for arch in (*TENSOR, "gfx942"):
        for config in table(arch).configs:
            kinds = [s for s in SQUARES if config.residents[1] and not (arch in (86, 89) and s == "multiplied")]
            if config.residents[0] and not (arch in (86, 89) and kinds):
                kinds.append("updated")
            found += [(arch, config, kind, config.tma) for kind in kinds]
            if config.tma:
                found.append((arch, config, kinds[0], False))
    return found


def name(arch: int | str, config: Config, kind: str, tma: bool) -> str:
    return f"{arch}-{config.block_m}x{config.block_n}-{config.num_stages}-{kind}{'-tma' if tma else ''}"


def compiled(arch: int | str, config: Config, kind: str, tma: bool) -> Any:
    """Triton's CompiledKernel."""
    R, S, X = torch.empty(2, 64, 64).bfloat16(), torch.empty(2, 64, 64).bfloat16(), torch.empty(2, 64, 128).bfloat16()
    lost, scale = torch.empty(2, 64), torch.empty(2)
    squares: dict[str, Any] = dict(a_diagonal=lost, b_diagonal=lost, out_diagonal=lost, symmetric=True)
    products._launch.cache_clear()
    # Their own place in Triton's table of kernels: it knows devices, and not whose turn it is.
    with compiling(arch, hash((config, kind, tma))) as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "choose", lambda *_: config._replace(tma=tma))
        if kind == "squared":
            products.product(R, R, S, b_transposed=True, c=R, c_diagonal=lost, **squares)
        elif kind == "multiplied":
            products.product(R, S, torch.empty_like(R), **squares)
        else:
            products.product(S, X, torch.empty_like(X), a_diagonal=lost, c=X, scale=scale)
        (kernel,) = device.kernels(products._product)
        return kernel


def dump(what: str, cubin: bytes) -> str:
    path = cached(".cubin", ["triton", cubin.hex()], lambda out: out.write_bytes(cubin) and None)
    return subprocess.run([str(CUOBJDUMP), what, str(path)], check=True, capture_output=True, text=True).stdout


def fitting(arch: int, threads: int, registers: int, shared: int, most: int) -> int:
    """Programs, at most `most`, that a multiprocessor has room for. It gives out registers by eights, a KiB to each."""
    room = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}[arch] << 10
    return min(65536 // (-(-registers // 8) * 8 * threads), room // (shared + 1024), most)


@pytest.mark.parametrize(("arch", "config", "kind", "tma"), entries(), ids=[name(*e) for e in entries()])
def test_compiled(arch: int | str, config: Config, kind: str, tma: bool) -> None:
    kernel = compiled(arch, config, kind, tma)
    assert kernel.metadata.shared <= SHARED_BYTES[arch]
    if isinstance(arch, str):
        text = kernel.asm["amdgcn"]
        assert "v_mfma_f32" in text
        assert re.findall(r"\.vgpr_spill_count: +(\d+)", text) == ["0"]
        return
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage", kernel.asm["cubin"]))
    assert usage
    residents = config.residents[kind != "updated"] if tma or not config.registers else 1
    assert residents == fitting(arch, 32 * config.num_warps, int(usage[1]), kernel.metadata.shared, residents)
    assert (int(usage[2]), int(usage[3])) == (0, 0), "spills"
    sass = dump("-sass", kernel.asm["cubin"])
    count = lambda instruction: len(re.findall(rf"\s{instruction}", sass))
    assert count(rf"{TENSOR[arch]}\b") > 0
    # Operands by copies that nobody waits for: whole tiles, or 16 bytes. All else by 16-byte accesses.
    copies = count(r"UTMALDG\.3D")
    assert (copies >= 2 and not count("LDGSTS")) if tma else not copies
    if not tma:
        assert count(r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128") == count("LDGSTS") > 0
    assert count(r"LDG\.E\.128") >= config.block_m * config.block_n // (32 * config.num_warps) // 8
    assert count(r"STG\.E\.(U16|U8|64)") == 0 and count(r"STG\.E\.128") > 0


@pytest.mark.parametrize(("arch", "multiprocessors", "compilations"), [(80, 108, 8), (90, 132, 8), (100, 148, 8)])
def test_a_model_needs_few_compilations(
    arch: int, multiprocessors: int, compilations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's step, 124M parameters: its square matrices in standard form, the others in Gram form."""
    monkeypatch.setattr(backend._device, "guard", lambda _: nullcontext(), raising=False)
    schedule = resolve("keller", 5)
    products._launch.cache_clear()
    with compiling(arch, multiprocessors, binary=False) as device:
        for form, batch, m, n in (("standard", 12, 768, 768), ("gram", 12, 768, 2304), ("gram", 24, 768, 3072)):
            X = torch.empty(batch, m, n).bfloat16()
            squares = [Square(torch.empty(batch, m, m).bfloat16(), torch.empty(batch, m)) for _ in range(5)]
            algorithm = ALGORITHMS[form]
            scale = torch.empty(batch)
            algorithm.run(backend, X, torch.empty_like(X), squares[: algorithm.squares], scale, schedule)
        assert len(device.kernels(products._product)) == compilations
