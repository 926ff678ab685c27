"""Products of 16-bit operands on a processor that has no instructions for them: in fp32, and the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muon_kernels import Muon, orthogonalize
from muon_kernels.backends import eager, eager_products
from muon_kernels.newton_schulz import Square

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch emulates 16-bit products, whatever it does on this machine."""
    monkeypatch.setattr(eager_products, "emulates", lambda device_type, dtype: request.param)
    return request.param


class Multiplied(TorchDispatchMode):
    """The dtypes that torch is asked to multiply matrices in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.addmm):
            self.dtypes |= {t.dtype for t in args if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_a_step_multiplies_in_what_the_processor_has(emulated: bool, dtype: torch.dtype, algorithm: str) -> None:
    p = nn.Parameter(torch.randn(8, 24))
    p.grad = torch.randn(8, 24)
    optimizer = Muon([p], backend="eager", workspace_dtype=dtype, ns_algorithm=algorithm)
    with Multiplied() as multiplied:
        optimizer.step()
    assert multiplied.dtypes == {torch.float32 if emulated else dtype}
    assert any("eager multiplies" in note for note in optimizer.plan().notes) == emulated
    assert ("products in float32" in eager.describe()) == emulated


def products(dtype: torch.dtype, integers: bool) -> list[tuple[Tensor, Tensor]]:
    """(what eager returns, the same before its last rounding, in float64) of every kind of product."""
    torch.manual_seed(0)

    def operand(*shape: int) -> Tensor:
        return (torch.randint(-2, 3, shape) if integers else torch.randn(shape)).to(dtype)

    X, S, C = operand(3, 20, 70), operand(3, 20, 20), operand(3, 20, 20)
    x, s, c = X.double(), S.double(), C.double()
    eye, scale = torch.eye(20, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0])
    wide, square = torch.empty_like(X), [torch.full_like(S, torch.nan) for _ in range(5)]
    eager.syrk(X, out=Square(square[0]))
    eager.syrk(X, out=Square(square[1]), C=Square(C), alpha=2.0, beta=-1.5)
    eager.syrk(X, out=Square(square[2]), gamma=3.0, scale=scale)
    eager.syrkx(Square(S), Square(C), out=Square(square[3]))
    eager.syrk(S, out=Square(square[4]), C=Square(torch.full_like(C, torch.nan)), beta=0.0)
    eager.gemm(Square(S), X, out=wide, C=X, alpha=0.5, beta=2.0)
    squares = (scale**2).double()[:, None, None]
    exact = [x @ x.mT, 2 * x @ x.mT - 1.5 * c, squares * (x @ x.mT + 3 * eye), s @ c, s @ s.mT, 0.5 * s @ x + 2 * x]
    return list(zip([*square, wide], exact, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_exact_on_integers(emulated: bool, dtype: torch.dtype) -> None:
    for got, exact in products(dtype, integers=True):
        assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_off_by_their_roundings(emulated: bool, dtype: torch.dtype) -> None:
    """Two of the result, where the identity or a scale follows a rounded sum, and the sums' own in fp32."""
    unit = torch.finfo(dtype).eps / 2
    for got, exact in products(dtype, integers=False):
        # Addends may cancel: what is rounded is as large as the largest of them.
        bound = 2.1 * unit * exact.abs() + 4 * unit * torch.eye(*exact.shape[-2:]).abs() * exact.abs().max()
        assert ((got.double() - exact).abs() <= bound + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_result_either_way(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    G = torch.randn(2, 24, 40)
    results = []
    for answer in (True, False):
        monkeypatch.setattr(eager_products, "emulates", lambda device_type, dtype, answer=answer: answer)
        results.append(orthogonalize(G, backend="eager", workspace_dtype=dtype))
    difference = (results[0] - results[1]).norm() / results[1].norm()
    assert difference <= 4 * torch.finfo(dtype).eps, "sums of another order, rounded through five steps"


@pytest.mark.parametrize(
    ("takes", "capabilities", "expected"),
    [
        (False, {}, True),  # AVX2, or a build without oneDNN
        (True, {"avx512_bf16": False, "amx_bf16": False}, True),  # Skylake to Ice Lake
        (True, {"avx512_bf16": True, "amx_bf16": False}, False),
        (True, {"avx512_bf16": False, "amx_bf16": True}, False),
        (True, {}, False),  # aarch64, or a torch that does not tell
    ],
)
def test_who_emulates_bf16(monkeypatch: pytest.MonkeyPatch, takes: bool, capabilities: Any, expected: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: takes, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    asked = eager_products.emulates.__wrapped__
    assert asked("cpu", torch.bfloat16) == expected
    assert not asked("cuda", torch.bfloat16) and not asked("cpu", torch.float32)
