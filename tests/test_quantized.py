"""Blockwise int8 against Python's own integers and floats, one number at a time."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from muon_kernels.stages.packed import BLOCK
from muon_kernels.stages.quantize import dequantize, quantize


def spread(n: int, seed: int = 0) -> Tensor:
    """Numbers of many magnitudes and both signs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 6 - 3)


@pytest.mark.parametrize("block", [1, 3, 64, 2048])
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (5, 13), (2, 3, 11), (2048,), (3, 2049), (), (0,), (4, 0)])
def test_codes_one_by_one(shape: tuple[int, ...], block: int) -> None:
    x = spread(math.prod(shape)).view(shape)
    codes, absmax = quantize(x, block)
    assert codes.dtype == torch.int8 and codes.shape == x.shape
    assert absmax.dtype == torch.float32 and absmax.shape == (math.ceil(x.numel() / block),)
    back = dequantize(codes, absmax, block)
    assert back.dtype == torch.float32 and back.shape == x.shape
    numbers, found, returned = (t.flatten().tolist() for t in (x, codes, back))
    for begin in range(0, len(numbers), block):
        largest = max(abs(number) for number in numbers[begin : begin + block])
        assert absmax[begin // block].item() == largest
        for i in range(begin, min(begin + block, len(numbers))):
            assert abs(found[i] - 127 * numbers[i] / largest) <= 0.5 + 1e-4
            assert abs(returned[i] - found[i] * largest / 127) <= 1e-6 * largest
            assert abs(returned[i] - numbers[i]) <= largest / 254 * (1 + 1e-5)


INPUTS: dict[str, Callable[[int], Tensor]] = {
    "many magnitudes": spread,
    "gaussian": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(1)),
    "largest": lambda n: spread(n).clamp(-1, 1) * torch.finfo(torch.float32).max,
    "denormal": lambda n: torch.arange(n).float() * 2.0**-149,
    "zeros": torch.zeros,
    "one number": lambda n: torch.full((n,), -1 / 3),
    "halfway": lambda n: (torch.arange(n) % 255 - 127).float() / 2,
    "not numbers": lambda n: spread(n).where(torch.arange(n) % 7 > 0, math.nan),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("block", [32, BLOCK])
def test_what_came_back_is_quantized_to_the_same(name: str, block: int) -> None:
    x = INPUTS[name](5000)
    codes, absmax = quantize(x, block)
    again = quantize(dequantize(codes, absmax, block), block)
    assert again[0].equal(codes) and again[1].equal(absmax)
    error = (dequantize(codes, absmax, block) - x).abs().double().nan_to_num(0)
    bound = absmax.double().repeat_interleave(block)[: x.numel()] / 254
    assert (error <= bound * (1 + 1e-5) + 2.0**-149).all()


def test_zeros_are_exact_and_keep_their_neighbours_scale_away() -> None:
    x = torch.zeros(3, 64)
    x[1] = torch.linspace(-1, 1, 64) * 1e-20
    codes, absmax = quantize(x, 64)
    assert absmax.tolist() == [0.0, x[1].max().item(), 0.0]
    assert dequantize(codes, absmax, 64)[[0, 2]].equal(torch.zeros(2, 64))
    assert codes[1].tolist() == [round(127 * i / 63) for i in range(-63, 64, 2)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_comes_back_as_nan_and_stays_alone(bad: float) -> None:
    x = spread(300)
    clean = dequantize(*quantize(x, 100), 100)
    spoilt = x.clone()
    where = torch.tensor([5, 150, 299])
    assert not set(where.tolist()) & {int(part.abs().argmax()) + 100 * i for i, part in enumerate(x.split(100))}
    spoilt[where] = bad
    back = dequantize(*quantize(spoilt, 100), 100)
    assert back.isnan().nonzero().flatten().equal(where)
    assert back.where(~back.isnan(), clean).equal(clean)
    codes, absmax = quantize(torch.full((5,), bad))
    assert absmax.item() == 0 and dequantize(codes, absmax).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_go_by_float32(dtype: torch.dtype) -> None:
    x = spread(500).to(dtype)
    assert all(a.equal(b) for a, b in zip(quantize(x), quantize(x.float()), strict=True))
    codes, absmax = quantize(x)
    out = torch.empty(500, dtype=dtype)
    assert dequantize(codes, absmax, out=out) is out
    assert out.equal(dequantize(codes, absmax).to(dtype))


def test_strides_do_not_matter() -> None:
    x = spread(20 * 30).view(20, 30)
    codes, absmax = quantize(x, 64)
    for view in (x.mT.contiguous().mT, torch.cat([x, x], 1)[:, :30]):
        assert not view.is_contiguous()
        found = quantize(view, 64)
        assert found[0].equal(codes) and found[1].equal(absmax)
    strided = (torch.empty(30, 20, dtype=torch.int8).mT, torch.empty(20)[::2])
    assert quantize(x, 64, out=strided)[0] is strided[0]
    assert strided[0].equal(codes) and strided[1].equal(absmax)
    assert dequantize(*strided, 64).equal(dequantize(codes, absmax, 64))


def test_little_more_than_a_byte_an_element() -> None:
    codes, absmax = quantize(torch.zeros(768, 3072))
    assert codes.nbytes + absmax.nbytes == 768 * 3072 * (1 + 4 / 2048) < 1.1 * 768 * 3072


def test_nothing_waits_for_the_host() -> None:
    codes, absmax = quantize(torch.empty(5, 1000, device="meta"))
    assert dequantize(codes, absmax).shape == (5, 1000)


X = spread(12)
CODES, ABSMAX = quantize(X, 4)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (lambda: quantize(torch.ones(3, dtype=torch.int32)), TypeError, "x should be of a floating-point"),
    "block of none": (lambda: quantize(X, 0), ValueError, "block should be an int >= 1 but is: 0"),
    "block a float": (lambda: quantize(X, 4.0), ValueError, "but is: 4.0"),  # type: ignore[arg-type]
    "codes to write": (lambda: quantize(X, 4, out=(torch.zeros(12), ABSMAX)), TypeError, "codes should be of torch.in"),
    "their size": (lambda: quantize(X, 4, out=(CODES[:9], ABSMAX)), ValueError, r"x's size \(12,\) but have: \(9,\)"),
    "another block": (lambda: dequantize(CODES, ABSMAX, 6), ValueError, r"size \(2,\), one a block, but has: \(3,\)"),
    "absmax": (lambda: dequantize(CODES, ABSMAX.double(), 4), TypeError, "absmax should be of torch.float32"),
    "codes": (lambda: dequantize(CODES.int(), ABSMAX, 4), TypeError, "codes should be of torch.int8 but are of"),
    "out": (lambda: dequantize(CODES, ABSMAX, 4, out=torch.zeros(9)), ValueError, r"codes' size \(12,\) but has"),
    "out of integers": (lambda: dequantize(CODES, ABSMAX, 4, out=CODES), TypeError, "out should be of a floating"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_changes_nothing(case: str) -> None:
    before = X.clone(), CODES.clone(), ABSMAX.clone()
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
    assert all(t.equal(was) for t, was in zip((X, CODES, ABSMAX), before, strict=True))
