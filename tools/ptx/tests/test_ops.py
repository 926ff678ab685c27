"""Every family of opcodes is compared with numpy and torch. All cases are in one module, which is built once."""

# ruff: noqa: E501 (a row of the table is a line)

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ..module import CompiledModule, load

N = 64
NUMPY = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}
NUMPY |= {
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
}


class Case(NamedTuple):
    """Instruction under test: `text` computes %d from %a, %b, %c, which have the types `sources`."""

    text: str
    sources: str
    result: str
    reference: Callable[..., Any]
    tolerance: float = 0.0


def bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to nearest even; return the bits of bf16."""
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def f32(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()


def signed(x: np.ndarray) -> np.ndarray:
    return x.astype(object)


def wrap(values: Any, kind: str) -> np.ndarray:
    bits = 8 * np.dtype(NUMPY[kind]).itemsize
    wrapped = [int(v) & (1 << bits) - 1 for v in values]
    return np.array(wrapped, dtype=f"u{bits // 8}").view(NUMPY[kind])


def exact(f: Callable[..., Any], kind: str) -> Callable[..., np.ndarray]:
    """Make a reference of a function of Python's integers, wrapped to the width of the result."""
    return lambda *arrays: wrap([f(*(int(x) for x in row)) for row in zip(*arrays, strict=True)], kind)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def field(x: int, at: int, length: int) -> int:
    return x >> (at & 255) & (1 << (length & 255)) - 1


def prmt(a: int, b: int, s: int) -> int:
    data = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        byte = data[s >> 4 * i & 7]
        out |= (255 * (byte >> 7) if s >> 4 * i & 8 else byte) << 8 * i
    return out


def lanes2(f: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Apply a function of f32 arrays to both halves of bf16x2."""

    def both(*arrays: np.ndarray) -> np.ndarray:
        halves = [bf16(f(*(f32(a.view(np.uint16)[i::2]) for a in arrays))) for i in (0, 1)]
        return (halves[0].astype(np.uint32) | halves[1].astype(np.uint32) << 16).astype(np.uint32)

    return both


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.longdouble) * b + c).astype(np.float32)


CASES = [
    Case("add.s32 %d, %a, %b;", "s32 s32", "s32", exact(lambda a, b: a + b, "s32")),
    Case("sub.u64 %d, %a, %b;", "u64 u64", "u64", exact(lambda a, b: a - b, "u64")),
    Case("add.sat.s32 %d, %a, %b;", "s32 s32", "s32", exact(lambda a, b: max(-(2**31), min(2**31 - 1, a + b)), "s32")),
    Case("mul.lo.s32 %d, %a, %b;", "s32 s32", "s32", exact(lambda a, b: a * b, "s32")),
    Case("mul.hi.u32 %d, %a, %b;", "u32 u32", "u32", exact(lambda a, b: a * b >> 32, "u32")),
    Case("mul.hi.s64 %d, %a, %b;", "s64 s64", "s64", exact(lambda a, b: a * b >> 64, "s64")),
    Case("mul.wide.s32 %d, %a, %b;", "s32 s32", "s64", exact(lambda a, b: a * b, "s64")),
    Case("mad.wide.u16 %d, %a, %b, %c;", "u16 u16 u32", "u32", exact(lambda a, b, c: a * b + c, "u32")),
    Case("mad.wide.s32 %d, %a, %b, %c;", "s32 s32 s64", "s64", exact(lambda a, b, c: a * b + c, "s64")),
    Case("mad.lo.s32 %d, %a, %b, %c;", "s32 s32 s32", "s32", exact(lambda a, b, c: a * b + c, "s32")),
    Case("mad.hi.u32 %d, %a, %b, %c;", "u32 u32 u32", "u32", exact(lambda a, b, c: (a * b >> 32) + c, "u32")),
    Case("div.s32 %d, %a, %b;", "s32 s32", "s32", exact(truncated, "s32")),
    Case("rem.s32 %d, %a, %b;", "s32 s32", "s32", exact(lambda a, b: a - b * truncated(a, b) if b else a, "s32")),
    Case("div.u64 %d, %a, %b;", "u64 u64", "u64", exact(lambda a, b: a // b if b else -1, "u64")),
    Case("min.s32 %d, %a, %b;", "s32 s32", "s32", np.minimum),
    Case("max.u32 %d, %a, %b;", "u32 u32", "u32", np.maximum),
    Case("abs.s32 %d, %a;", "s32", "s32", exact(abs, "s32")),
    Case("neg.s64 %d, %a;", "s64", "s64", exact(lambda a: -a, "s64")),
    Case("sad.u32 %d, %a, %b, %c;", "u32 u32 u32", "u32", exact(lambda a, b, c: c + abs(a - b), "u32")),
    Case("and.b32 %d, %a, %b;", "u32 u32", "u32", np.bitwise_and),
    Case("xor.b64 %d, %a, %b;", "u64 u64", "u64", np.bitwise_xor),
    Case("not.b32 %d, %a;", "u32", "u32", np.invert),
    Case("shl.b32 %d, %a, %b;", "u32 u32", "u32", exact(lambda a, b: a << b if b < 32 else 0, "u32")),
    Case("shr.s32 %d, %a, %b;", "s32 u32", "s32", exact(lambda a, b: a >> min(b, 63), "s32")),
    Case("shf.l.wrap.b32 %d, %a, %b, %c;", "u32 u32 u32", "u32", exact(lambda a, b, c: (b << 32 | a) << (c & 31) >> 32, "u32")),
    Case("shf.r.clamp.b32 %d, %a, %b, %c;", "u32 u32 u32", "u32", exact(lambda a, b, c: (b << 32 | a) >> min(c, 32), "u32")),
    Case("lop3.b32 %d, %a, %b, %c, 0xD8;", "u32 u32 u32", "u32", exact(lambda a, b, c: a & b & ~c | a & c & b | a & ~b & ~c | ~a & b & c, "u32")),
    Case("prmt.b32 %d, %a, %b, %c;", "u32 u32 u32", "u32", exact(prmt, "u32")),
    Case("bfe.u32 %d, %a, 5, 11;", "u32", "u32", exact(lambda a: field(a, 5, 11), "u32")),
    Case("bfe.s32 %d, %a, 20, 12;", "s32", "s32", exact(lambda a: a >> 20, "s32")),
    Case("bfi.b32 %d, %a, %b, 7, 9;", "u32 u32", "u32", exact(lambda a, b: b & ~(511 << 7) | (a & 511) << 7, "u32")),
    Case("popc.b32 %d, %a;", "u32", "u32", exact(lambda a: a.bit_count(), "u32")),
    Case("clz.b64 %d, %a;", "u64", "u32", exact(lambda a: 64 - a.bit_length(), "u32")),
    Case("brev.b32 %d, %a;", "u32", "u32", exact(lambda a: int(f"{a:032b}"[::-1], 2), "u32")),
    Case("bfind.u32 %d, %a;", "u32", "u32", exact(lambda a: a.bit_length() - 1, "u32")),
    Case("selp.b32 %d, %a, %b, %p;", "u32 u32", "u32", lambda a, b: np.where(a < b, a, b)),
    Case("{ add.cc.u32 %t, %a, %b; addc.u32 %d, %a, %b; }", "u32 u32", "u32", exact(lambda a, b: a + b + (a + b >> 32), "u32")),
    Case("{ sub.cc.u32 %t, %a, %b; subc.u32 %d, %a, %b; }", "u32 u32", "u32", exact(lambda a, b: a - b - (a < b), "u32")),
    Case("{ .reg .pred q, r; setp.lt.and.s32 q|r, %a, %b, !%p; selp.b32 %d, 1, 2, q; @r add.u32 %d, %d, 8; }", "u32 u32", "u32",
         lambda a, b: np.where((a.view(np.int32) < b.view(np.int32)) & ~(a < b), 1, 2).astype(np.uint32)
         + np.where(~(a.view(np.int32) < b.view(np.int32)) & ~(a < b), 8, 0).astype(np.uint32)),
    Case("mov.b32 %d, {%a, %b};", "u16 u16", "u32", lambda a, b: a.astype(np.uint32) | b.astype(np.uint32) << 16),
    Case("{ .reg .b32 lo, hi; mov.b64 {lo, hi}, %a; sub.u32 %d, hi, lo; }", "u64", "u32", lambda a: (a >> 32).astype(np.uint32) - a.astype(np.uint32)),
    Case("cvt.s64.s32 %d, %a;", "s32", "s64", lambda a: a.astype(np.int64)),
    Case("cvt.u32.u16 %d, %a;", "u16", "u32", lambda a: a.astype(np.uint32)),
    Case("cvt.s32.s8 %d, %a;", "s32", "s32", lambda a: a.astype(np.int8).astype(np.int32)),
    Case("add.rn.f32 %d, %a, %b;", "f32 f32", "f32", np.add),
    Case("mul.f32 %d, %a, %b;", "f32 f32", "f32", np.multiply),
    Case("fma.rn.f32 %d, %a, %b, %c;", "f32 f32 f32", "f32", fma32),
    Case("add.rz.f32 %d, %a, 0f3F800000;", "f32", "f32", lambda a: toward_zero(a.astype(np.float64) + 1)),
    Case("mul.ftz.f32 %d, %a, 0f00800000;", "f32", "f32", lambda a: flush(flush(a) * np.float32(2.0**-126))),
    Case("div.rn.f32 %d, %a, %b;", "f32 f32", "f32", np.divide),
    Case("div.full.f32 %d, %a, %b;", "f32 f32", "f32", np.divide, 1e-6),
    Case("rcp.approx.ftz.f32 %d, %a;", "f32", "f32", lambda a: flush(1 / flush(a)), 1e-6),
    Case("sqrt.rn.f32 %d, %a;", "f32", "f32", np.sqrt),
    Case("rsqrt.approx.f32 %d, %a;", "f32", "f32", lambda a: 1 / np.sqrt(a), 1e-6),
    Case("ex2.approx.f32 %d, %a;", "f32", "f32", np.exp2, 1e-6),
    Case("lg2.approx.f32 %d, %a;", "f32", "f32", np.log2, 1e-6),
    Case("tanh.approx.f32 %d, %a;", "f32", "f32", np.tanh, 1e-6),
    Case("min.f32 %d, %a, %b;", "f32 f32", "f32", np.fmin),
    Case("max.NaN.f32 %d, %a, %b;", "f32 f32", "f32", np.maximum),
    Case("copysign.f32 %d, %a, %b;", "f32 f32", "f32", lambda a, b: np.copysign(b, a)),
    Case("add.sat.f32 %d, %a, %b;", "f32 f32", "f32", lambda a, b: np.nan_to_num(np.clip(a + b, 0, 1), nan=0.0)),
    Case("{ .reg .pred q; setp.leu.f32 q, %a, %b; selp.u32 %d, 1, 0, q; }", "f32 f32", "u32", lambda a, b: (~(a > b)).astype(np.uint32)),
    Case("set.gt.f32.f32 %d, %a, %b;", "f32 f32", "f32", lambda a, b: (a > b).astype(np.float32)),
    Case("fma.rn.f64 %d, %a, %b, %c;", "f64 f64 f64", "f64", lambda a, b, c: (a.astype(np.longdouble) * b + c).astype(np.float64), 1e-15),
    Case("sqrt.rn.f64 %d, %a;", "f64", "f64", np.sqrt),
    Case("cvt.rni.s32.f32 %d, %a;", "f32", "s32", lambda a: clamp(np.rint(a), "s32")),
    Case("cvt.rzi.u32.f32 %d, %a;", "f32", "u32", lambda a: clamp(np.trunc(a), "u32")),
    Case("cvt.rmi.s64.f64 %d, %a;", "f64", "s64", lambda a: clamp(np.floor(a), "s64")),
    Case("cvt.rn.f32.s64 %d, %a;", "s64", "f32", lambda a: a.astype(np.float32)),
    Case("cvt.rn.f32.u32 %d, %a;", "u32", "f32", lambda a: a.astype(np.float32)),
    Case("cvt.rz.f32.f64 %d, %a;", "f64", "f32", lambda a: toward_zero(a)),
    Case("cvt.rpi.f32.f32 %d, %a;", "f32", "f32", np.ceil),
    Case("cvt.f64.f32 %d, %a;", "f32", "f64", lambda a: a.astype(np.float64)),
    Case("cvt.rn.f16.f32 %d, %a;", "f32", "f16", lambda a: a.astype(np.float16)),
    Case("cvt.f32.f16 %d, %a;", "f16", "f32", lambda a: a.astype(np.float32)),
    Case("cvt.rn.bf16.f32 %d, %a;", "f32", "bf16", bf16),
    Case("cvt.rn.bf16x2.f32 %d, %a, %b;", "f32 f32", "bf16x2", lambda a, b: bf16(b).astype(np.uint32) | bf16(a).astype(np.uint32) << 16),
    Case("cvt.rn.f16x2.f32 %d, %a, %b;", "f32 f32", "f16x2", lambda a, b: halves(b) | halves(a) << 16),
    Case("cvt.rn.relu.bf16x2.f32 %d, %a, %b;", "f32 f32", "bf16x2", lambda a, b: bf16(clip0(b)).astype(np.uint32) | bf16(clip0(a)).astype(np.uint32) << 16),
    Case("{ .reg .b32 t; cvt.rna.tf32.f32 t, %a; mov.b32 %d, t; }", "f32", "f32", lambda a: tf32(a)),
    Case("cvt.f32.bf16 %d, %a;", "bf16", "f32", f32),
    Case("add.rn.bf16x2 %d, %a, %b;", "bf16x2 bf16x2", "bf16x2", lanes2(np.add)),
    Case("mul.rn.bf16x2 %d, %a, %b;", "bf16x2 bf16x2", "bf16x2", lanes2(np.multiply)),
    Case("fma.rn.bf16x2 %d, %a, %b, %c;", "bf16x2 bf16x2 bf16x2", "bf16x2", lanes2(lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)), 2e-2),
    Case("neg.bf16x2 %d, %a;", "bf16x2", "bf16x2", lambda a: a ^ np.uint32(0x80008000)),
    Case("add.rn.f16 %d, %a, %b;", "f16 f16", "f16", np.add),
    Case("mul.rn.f16 %d, %a, %b;", "f16 f16", "f16", np.multiply),
    Case("dp4a.s32.s32 %d, %a, %b, %c;", "s32 s32 s32", "s32",
         lambda a, b, c: ((a.view(np.int8).reshape(-1, 4).astype(np.int32) * b.view(np.int8).reshape(-1, 4)).sum(1) + c).astype(np.int32)),
]  # fmt: skip


def toward_zero(x: np.ndarray) -> np.ndarray:
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def clamp(x: np.ndarray, kind: str) -> np.ndarray:
    info = np.iinfo(NUMPY[kind])
    return np.array(
        [0 if np.isnan(v) else info.min if v <= info.min else info.max if v >= info.max else int(v) for v in x],
        NUMPY[kind],
    )


def halves(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def clip0(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, np.float32(0), x)


def tf32(x: np.ndarray) -> np.ndarray:
    bits = (x.view(np.uint32).astype(np.uint64) + 0x1000 & 0xFFFFE000).astype(np.uint32)
    return np.where(np.isnan(x), np.float32(np.nan), bits.view(np.float32))


def register(kind: str) -> str:
    return f"b{8 * np.dtype(NUMPY[kind]).itemsize}"


def kernel(index: int, case: Case) -> str:
    """PTX of a kernel that runs the case in every thread."""
    sources = case.sources.split()
    lines = [".param .u64 pd", *(f".param .u64 p{x}" for x in "abc")]
    body = [".reg .b64 %addr, %off; .reg .pred %p; .reg .b32 %i, %t;", "mov.u32 %i, %tid.x;"]
    for name, kind in zip("dabc", [case.result, *sources], strict=False):
        body.append(f".reg .{register(kind)} %{name};")
    for name, kind in zip("abc", sources, strict=False):
        size = np.dtype(NUMPY[kind]).itemsize
        body.append(f"ld.param.u64 %addr, [p{name}]; mul.wide.u32 %off, %i, {size}; add.u64 %addr, %addr, %off;")
        body.append(f"ld.global.{register(kind)} %{name}, [%addr];")
    if "%p" in case.text:
        body.append("setp.lt.u32 %p, %a, %b;")
    size = np.dtype(NUMPY[case.result]).itemsize
    body += [case.text, f"ld.param.u64 %addr, [pd]; mul.wide.u32 %off, %i, {size}; add.u64 %addr, %addr, %off;"]
    body.append(f"st.global.{register(case.result)} [%addr], %d; ret;")
    return f".visible .entry k{index}({', '.join(lines)})\n{{\n" + "\n".join(body) + "\n}\n"


@cache
def module() -> CompiledModule:
    return load(".version 9.0\n.target sm_90a\n.address_size 64\n" + "".join(kernel(i, c) for i, c in enumerate(CASES)))


def values(kind: str, seed: int, wide: bool) -> np.ndarray:
    """Draw random numbers of a type, and include its special ones."""
    random = np.random.default_rng(seed)
    if kind[0] in "us":
        info = np.iinfo(NUMPY[kind])
        x = random.integers(info.min, info.max, N, NUMPY[kind], endpoint=True)
        x[:24] = random.integers(max(info.min, -40), 41, 24).astype(NUMPY[kind])
        return x
    x = random.standard_normal(N) * (2.0 ** random.integers(-3, 20, N) if wide else 1)
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        x = x.clip(-1000, 1000)
        count = 2 if kind.endswith("x2") else 1
        pairs = np.stack([x, x[::-1] / 3], 1)[:, :count].astype(np.float32)
        if kind == "f16":
            return pairs[:, 0].astype(np.float16)
        bits = bf16(pairs.ravel()) if "bf" in kind else pairs.ravel().astype(np.float16).view(np.uint16)
        return bits if count == 1 else bits.view(np.uint32)
    x[:8] = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-140, 0.5, 2.5]
    return x.astype(NUMPY[kind])


@pytest.mark.parametrize("index", range(len(CASES)), ids=[c.text.split(";")[0] for c in CASES])
def test_opcode(index: int) -> None:
    case = CASES[index]
    sources = [values(kind, seed, case.tolerance == 0) for seed, kind in enumerate(case.sources.split())]
    out = np.zeros(N, NUMPY[case.result])
    arrays = [out, *sources, *([sources[0]] * (3 - len(sources)))]
    pointers = [a.ctypes.data for a in arrays]
    ranges = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]
    module().kernel(f"k{index}").launch(1, N, pointers, memory=ranges)
    with np.errstate(all="ignore"):
        want = np.asarray(case.reference(*sources)).astype(out.dtype)
    if case.result in ("bf16", "bf16x2"):
        got, expected = f32(out.view(np.uint16)), f32(np.ascontiguousarray(want).view(np.uint16))
    elif case.result == "f16x2":
        got, expected = out.view(np.float16), want.view(np.float16)
    else:
        got, expected = out, want
    np.testing.assert_allclose(got, expected, rtol=case.tolerance, atol=0)


def test_an_unknown_opcode_names_its_line() -> None:
    text = ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{\n.reg .b32 %r<2>;\ntcgen05.alloc %r1;\nret;\n}\n"
    with pytest.raises(Exception, match=r"line 7: unknown opcode: tcgen05\.alloc"):
        load(text).kernel("k")
