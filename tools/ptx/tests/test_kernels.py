"""Kernels compiled by nvcc give the right numbers in every order; their faults are reported with the place."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from ..module import LaunchableKernel, LaunchError, load
from ..parser import PtxError
from ..standin import compile_ptx, nvcc

if not nvcc():
    pytest.skip("no nvcc", allow_module_level=True)

TOYS = Path(__file__).parents[1] / "toys"
NAN = float("nan")
MODES: list[dict[str, Any]] = [
    {},
    {"order": "backward", "asynchrony": "late"},
    {"order": "random", "asynchrony": "random", "seed": 3},
    {"races": True, "asynchrony": "late", "order": "random"},
]


def basics(name: str, *flags: str) -> LaunchableKernel:
    return load(compile_ptx(TOYS / "basics.cu", "sm_80", flags)).kernel(name)


def gemm_error(m: int, n: int, k: int, flags: tuple[str, ...] = (), **mode: Any) -> float:
    torch.manual_seed(0)
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c = torch.full((m, n), NAN)
    kernel = load(compile_ptx(TOYS / "gemm_sm80.cu", "sm_80", flags)).kernel("gemm")
    kernel.launch((-(-n // 64), -(-m // 64)), 128, [a, b, c, m, n, k], 3 * 128 * 40 * 2, **mode)
    return float((c - a.double() @ b.double().T).abs().nan_to_num(nan=float("inf")).max())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gemm(mode: dict[str, Any]) -> None:
    assert gemm_error(96, 72, 136, **mode) < 1e-4


GEMM_FAULTS = {
    "wait count": "-DWAIT_COUNT=NUM_STAGES-1",
    "no barrier": "-DTILE_BARRIER=(void)0",
    "barrier of a warp": "-DTILE_BARRIER=__syncwarp()",
    "fragment row": "-DLDMATRIX_ROW=(lane%8)",
    "row off by one": "-DLDMATRIX_ROW=((lane+1)%16)",
}


@pytest.mark.parametrize("name", GEMM_FAULTS)
def test_gemm_fault_is_found(name: str) -> None:
    def fails(mode: dict[str, Any]) -> bool:
        try:
            return not gemm_error(96, 72, 136, (GEMM_FAULTS[name],), **mode) < 1e-4
        except LaunchError as error:
            return "race" in error.why

    assert any(fails(mode) for mode in MODES[::-1])


def test_reduction_and_shuffles() -> None:
    x, out = torch.randn(5, 1000), torch.full((5,), NAN)
    basics("block_sum").launch(5, 256, [x, out, 1000], races=True)
    torch.testing.assert_close(out, x.sum(1))


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_atomics(order: Any) -> None:
    f, d, i = torch.zeros(2), torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.int32)
    u, m = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    basics("atomics").launch(3, 96, [f, d, i, u, m], order=order)
    assert (f.tolist(), d.item(), i.tolist(), u.item(), m.item()) == ([144, 96], 72, [95, 288], 864, 576)


def test_votes() -> None:
    x, out = torch.arange(32, dtype=torch.int32) * 7 % 6, torch.zeros(32, 6, dtype=torch.int32)
    basics("votes").launch(1, 32, [x, out])
    v = x.tolist()
    bits = lambda which: sum(1 << i for i in which)
    for lane in range(32):
        ballot, same, total, most, mixed, shuffled = (int(n) & 0xFFFFFFFF for n in out[lane])
        assert ballot == bits(i for i in range(32) if v[i] > 2)
        assert same == bits(i for i in range(32) if v[i] == v[lane])
        assert (total, most) == (sum(v), max(v))
        assert mixed == (3 in v) + 2 + 4 * sum(n & 1 for n in v) + 1024 * (5 in v)
        assert shuffled == (v[lane - 2 if lane > 1 else lane] if lane & 1 else v[lane ^ 2])


def test_struct_parameters_and_pointer_tables() -> None:
    a, out = torch.randn(3, 100), torch.full((100,), NAN)
    pointers = struct.pack("QQQfxxxx", *(row.data_ptr() for row in a), 2.0)
    basics("struct_param").launch((1, 1), 128, [pointers, out, 100], memory=[a])
    torch.testing.assert_close(out, a[0] * 2)
    with pytest.raises(LaunchError, match="outside every allocation"):
        basics("struct_param").launch((1, 2), 128, [pointers, out, 100], memory=[a[0]], guard=True)


def test_calls_local_memory_constants_and_switches() -> None:
    x, out = torch.arange(32) * 0.4, torch.full((32,), NAN)
    index = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    basics("call_and_local").launch(1, 32, [x, out, index, 32])
    torch.testing.assert_close(out, torch.tensor([2.0, 4.0, 1.0, 3.0])[x.long() & 3] * x)
    kind = torch.arange(32, dtype=torch.int32) % 9
    basics("switch_and_const").launch(1, 32, [kind, out, 32])
    i = torch.arange(32.0)
    expected = [
        torch.tensor([1, -2, 0.5, 8])[torch.arange(32) & 3],
        i.sqrt(),
        None,
        None,
        i % 3,
        1 / (i + 1),
        2**-i,
        (i + 1).rsqrt(),
        i * 0 + 7,
    ]
    for k, want in enumerate(expected):
        if want is not None:
            torch.testing.assert_close(out[k::9], want[k::9])
    assert out[2::9].tolist() == [n.bit_count() + 32 - n.bit_length() for n in range(2, 32, 9)]


def test_halves_and_double() -> None:
    b, h = torch.randn(32, 2).bfloat16(), torch.randn(32, 2).half()
    bo, ho, f = torch.zeros_like(b), torch.zeros_like(h), torch.zeros(32, 2)
    basics("halves").launch(1, 32, [b, h, bo, ho, f])
    addend = torch.tensor([1.5, -0.3]).bfloat16().double()
    assert torch.equal(bo, (b.double() * b.double() + addend).bfloat16())
    assert torch.equal(ho, h * h + h.clamp(min=0.1))
    x, out = torch.rand(32, dtype=torch.float64) + 0.1, torch.zeros(32, dtype=torch.float64)
    basics("double_math").launch(1, 32, [x, out])
    want = x.sqrt() / 3 + (2 * x - 1) * x.rsqrt() + x.floor() - x.float().double() + (x * 1e10).trunc()
    torch.testing.assert_close(out, want, rtol=1e-14, atol=0)


def test_blocks_that_wait_for_each_other() -> None:
    x, partial, count, out = torch.arange(8.0), torch.zeros(8), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    basics("last_block").launch(8, 64, [x, partial, count, out], races=True, order="backward")
    assert out.item() == 56
    a, seen = torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    basics("grid_sync").launch(8, 64, [a, seen], resident=8)
    assert seen.tolist() == [1, 4, 9, 16, 25, 36, 49, 0]
    with pytest.raises(LaunchError, match="endless loop"):
        basics("grid_sync").launch(8, 64, [a.zero_(), seen], spin_limit=10)


def fault(name: str, *launch: Any, flags: tuple[str, ...] = (), **mode: Any) -> LaunchError:
    with pytest.raises(LaunchError) as caught:
        basics(name, *flags).launch(*launch, **mode)
    return caught.value


def test_fault_reports() -> None:
    source = (TOYS / "basics.cu").read_text().splitlines()
    out = torch.zeros(64)

    error = fault("asserts", 1, 32, [torch.arange(32, dtype=torch.int32)])
    assert "x[threadIdx.x] < 5" in error.why and error.thread == (5, 0, 0) and error.location
    assert "assert(x" in source[error.location.line - 1]

    assert "misaligned read of 4 bytes" in fault("misaligned", 1, 32, [torch.zeros(40), out]).why
    assert "deadlock; 48 threads" in fault("half_warp_barrier", 1, 64, [out]).why
    assert "deadlock" in fault("divergent_shuffle", 1, 32, [out]).why
    assert "endless loop" in fault("spin", 1, 32, [torch.zeros(1, dtype=torch.int32)], spin_limit=10).why

    x, y = torch.randn(64, 64), torch.zeros(64, 64)
    error = fault("transpose", (2, 2), (32, 8), [x, y[:63].clone(), 64])
    assert error.block == (1, 0, 0) and "write of 4 bytes outside every allocation" in error.why
    assert "read" in fault("transpose", (2, 2), (32, 8), [x[:63], y, 64], guard=True).why
    for order in ("forward", "backward", "random"):
        assert (
            "race on shared memory"
            in fault("transpose", (1, 1), (32, 8), [x, y, 64], flags=("-DNO_BARRIER",), races=True, order=order).why
        )
    assert "race on global memory" in fault("blocks_collide", 2, 8, [out], races=True).why


def test_ldmatrix_orders_no_memory() -> None:
    """A store after ldmatrix may overtake what it reads for other lanes, although it brings the lanes together."""
    out = torch.zeros(128, dtype=torch.int32)
    assert "race on shared memory" in fault("turned_around", 1, 32, [out, 0], races=True).why
    basics("turned_around").launch(1, 32, [out, 1], races=True, order="random")
    assert out.tolist() == [*range(127, -1, -1)]


def test_a_grid_that_no_device_has_is_refused() -> None:
    with pytest.raises(PtxError, match=r"at most .* blocks, got \(1, 65536, 1\)"):
        basics("blocks_agree").launch((1, 65_536), 8, [torch.zeros(8)])


def test_same_values_are_a_warning() -> None:
    out = torch.zeros(8)
    result = basics("blocks_agree").launch(2, 8, [out], races=True)
    assert result.warnings and "same value" in result.warning and out.eq(3).all()


def test_profile_counts() -> None:
    x, y = torch.randn(64, 64), torch.zeros(64, 64)
    launch = ((2, 2), (32, 8), [x, y, 64])
    good, bad = (basics("transpose", f"-DPAD={pad}").launch(*launch, profile=True).profile for pad in (1, 0))
    assert good and bad
    assert (good.bank_conflicts, good.sector_efficiency) == (0, 1.0)
    assert bad.bank_conflicts == 4 * 32 * 31  # every read of a column of 32 words is 32 wavefronts
    assert good.global_bytes == 2 * 4 * 64 * 64
    assert good.barriers == 4 * 256

    a, c = torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    kernel = load(compile_ptx(TOYS / "gemm_sm80.cu")).kernel("gemm")
    p = kernel.launch((1, 1), 128, [a, a, c, 64, 64, 64], 3 * 128 * 40 * 2, profile=True).profile
    assert p
    assert p.tensor_instructions == 64**3 / (16 * 8 * 16)
    assert p.total("wavefronts", lambda row: row.op.startswith("ldmatrix")) == 4 * p.total(
        "requests", lambda row: row.op.startswith("ldmatrix")
    )
    assert p.total("bytes", lambda row: row.op.startswith("cp.async")) == 2 * 64 * 64 * 2
    assert "mma.sync" in {row.op[:8] for row in p.rows} and "gemm_sm80.cu" in p.table()
