"""The backend: who is refused, Newton-Schulz over its products; and their kernel in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from matrices import make
from torch import Tensor

from muon_kernels import backends, newton_schulz
from muon_kernels.backends import triton as backend
from muon_kernels.coefficients import resolve
from muon_kernels.newton_schulz import Square

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton.language"), reason="no triton")


def polynomial(X: Tensor, triples: Any) -> Tensor:
    X = X.double()
    for a, b, c in triples:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_newton_schulz_over_these_verbs(on_the_cpu: Any, arch: int, form: str) -> None:
    """As far from the exact polynomial as on the reference backend, or less."""
    from emulated_gpu import emulated

    batch, m, n = 2, 72, 136
    triples, margin, _ = resolve("polar_express", 5)
    X = torch.stack([make("power -1/2", m, n, seed=i).float() for i in range(batch)])
    X = (X / X.norm(dim=(1, 2), keepdim=True)).bfloat16()
    scale = torch.full((batch,), 1 / margin)

    def run(ops: Any) -> Tensor:
        squares = [Square(torch.full((batch, m, m), torch.nan).bfloat16(), torch.empty(batch, m)) for _ in range(5)]
        algorithm = newton_schulz.ALGORITHMS[form]
        buffers = X.clone(), torch.empty_like(X)
        run = lambda: algorithm.run(ops, *buffers, squares[: algorithm.squares], scale, triples, margin)
        return ops.program(run)()

    with emulated(arch) as device:
        ours = run(backend)
    assert {ran.name for ran in device.log} == {"_product"}
    right = polynomial(X.double() / margin, triples)
    error = lambda t: float((t.double() - right).norm() / right.norm())
    assert error(ours) <= 1.1 * error(run(backends.get("cpu")))


# Triton's interpreter runs a kernel in numpy, if a variable is set before triton is imported. Its tl.dot multiplies the
# bits of bf16, so f16 it is.
INTERPRETED = """
import torch
import product_checks as checks
from emulated_gpu import compiling
from muon_kernels.triton_kernels.products import product
torch.manual_seed(0)
with compiling(80):
    for m, width in ((1, 2), (17, 16), (65, 2), (72, 16)):
        checks.any_shape(product, 2, m, m + 5, width, torch.float16)
    checks.any_shape(product, 1, 72, 136, 16, torch.float16)
    for m, width in ((17, 16), (72, 16), (65, 2)):
        checks.parts_of_squares(product, m, width, torch.float16)
print("interpreted")
"""


@needs_triton
def test_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert ran.stdout == "interpreted\n", ran.stderr


# Who is refused, and what is said.


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert "pip install triton" in str(backend.unavailable())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert "finds no GPU" in str(backend.unavailable()) or "triton is missing" in str(backend.unavailable())


@needs_triton
def test_with_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    assert "3.1.0 is too old" in str(backend.unavailable())
    monkeypatch.setattr(triton, "__version__", "4.0.0+git")
    assert backend.unavailable() is None


def test_what_is_refused(on_the_cpu: Any) -> None:
    assert backend.refuses(torch.device("cpu"), [torch.bfloat16], torch.bfloat16) is None
    assert "float64" in str(backend.refuses(torch.device("cpu"), [torch.float64], torch.bfloat16))
    assert "GPU" in str(backend.refuses(torch.device("meta"), [torch.bfloat16], torch.bfloat16))
    on_the_cpu.capabilities = (7, 5)
    assert "7.5" in str(backend.refuses(torch.device("cpu"), [torch.bfloat16], torch.bfloat16))
