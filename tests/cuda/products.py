"""Calls the CUDA products, built on the stand-in runtime, with torch tensors, and knows what to expect of them."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from ptx import LaunchError, standin
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "product_sm80.cu"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Kernel(NamedTuple):
    """An instantiation of the kernel, by the template arguments in its name."""

    block_m: int
    block_n: int
    transposed: bool
    aligned: bool
    cluster: int = 0  # of blocks, in product_sm90.cu; 0: product_sm80.cu

    @property
    def wgmma(self) -> bool:
        return self.cluster > 0


# The whole table of product_sm80.cu, with a shape (m, n, k) that gets each kernel from a GPU with one multiprocessor;
# all of them ragged.
KERNELS = {
    Kernel(128, 128, True, True): (200, 200, 104),
    Kernel(128, 128, False, True): (200, 200, 200),
    Kernel(128, 64, False, True): (200, 184, 200),
    Kernel(64, 64, True, True): (184, 184, 200),
    Kernel(64, 64, False, True): (56, 184, 200),
    Kernel(64, 64, True, False): (77, 77, 151),
    Kernel(64, 64, False, False): (77, 93, 77),
}


# That of product_sm90.cu, the same way; a GPU has a multiprocessor for each block of a cluster.
KERNELS_SM90 = {
    Kernel(128, 128, True, True, 1): (200, 200, 104),
    Kernel(128, 128, False, True, 1): (200, 200, 200),
    Kernel(128, 128, True, True, 2): (200, 200, 104),
    Kernel(128, 128, False, True, 2): (200, 200, 200),
    Kernel(128, 256, True, True, 2): (200, 200, 392),
    Kernel(128, 256, False, True, 2): (200, 248, 392),
}


def kernel_of(name: str) -> Kernel:
    if found := re.search(r"TileILi(\d+)ELi(\d+)ELi\d+ELb\dELi(\d)EEELb(\d)E", name):
        return Kernel(int(found[1]), int(found[2]), found[4] == "1", True, int(found[3]))
    found = re.search(r"TileILi(\d+)ELi(\d+)E.*?EELb(\d)ELb(\d)E", name)
    assert found, name
    return Kernel(int(found[1]), int(found[2]), found[3] == "1", found[4] == "1")


def _stack(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else (t.data_ptr(), *t.shape, t.stride(0), t.stride(1))


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class Products:
    """muon_kernels.cuda.products. After a call `kernel` is what ran, `log` and `profiles` are the runtime's."""

    def __init__(self, module: ModuleType, runtime: standin.Runtime, capability: tuple[int, int] = (8, 0)) -> None:
        self.module, self.runtime, self.capability = module, runtime, capability
        self.kernel: Kernel | None = None
        self.log: list[Any] = []
        self.profiles: dict[Kernel, Any] = {}

    def product(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        *,
        c: Tensor | None = None,
        b_transposed: bool = False,
        symmetric: bool = False,
        alpha: float = 1.0,
        beta: float = 0.0,
        gamma: float = 0.0,
        **vectors: Tensor | None,
    ) -> Any:
        """Make csrc's Product; `vectors` are diagonals and the scale, by csrc's names.

        The views that it points to become device memory, and nothing around them.
        """
        self.runtime.register(*(t for t in (a, b, c, out, *vectors.values()) if t is not None), guard=True)
        pointer = lambda name: _pointer(vectors.pop(name, None))
        product = self.module.Product(
            _stack(a),
            pointer("a_diagonal"),
            _stack(b),
            b_transposed,
            pointer("b_diagonal"),
            _stack(c),
            pointer("c_diagonal"),
            _stack(out),
            pointer("out_diagonal"),
            symmetric,
            alpha,
            beta,
            gamma,
            pointer("scale"),
        )
        assert not vectors, f"no field of Product: {list(vectors)}"
        return product

    def run(
        self, *products: Any, dtype: torch.dtype = torch.bfloat16, multiprocessors: int = 1, **options: Any
    ) -> None:
        self.runtime.pretend(*self.capability)
        self.runtime.device.multiprocessors = multiprocessors
        name = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
        with self.runtime.options(**options) as runtime:
            try:
                self.module.cuda.products(list(products), getattr(self.module.DType, name), 0)
            except RuntimeError:
                assert not runtime.build_errors, runtime.build_errors
                if runtime.failures:
                    raise runtime.failures[0] from None
                raise
            finally:
                self.log = runtime.log
                self.kernel = kernel_of(self.log[-1].kernel) if self.log else None
                self.profiles = {kernel_of(n): p for n, p in runtime.profiles.items()} if options.get("profile") else {}
                runtime.forget_memory()
                runtime.pretend(8, 0)

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, *, multiprocessors: int = 1, **keywords: Any) -> Tensor:
        """One product; keywords of the runtime's options go there."""
        options = {
            k: keywords.pop(k) for k in ("order", "asynchrony", "seed", "races", "profile", "blocks") if k in keywords
        }
        product = self.product(a, b, out, **keywords)
        self.run(product, dtype=out.dtype, multiprocessors=multiprocessors, **options)
        return out


def chosen(
    products: Products, m: int, n: int, k: int, batch: int, multiprocessors: int, is_symmetric: bool
) -> tuple[Kernel, int]:
    """The kernel and the number of blocks for shapes of any size: there is no memory, so the first block fails."""
    stack = lambda rows, cols: (1 << 20, batch, rows, cols, rows * cols, cols)
    b = stack(n, k) if is_symmetric else stack(k, n)
    shapes = products.module.Product(
        stack(m, k), 0, b, is_symmetric, 0, None, 0, stack(m, n), 0, is_symmetric, 1, 0, 0, 0
    )
    with pytest.raises(LaunchError):
        products.run(shapes, multiprocessors=multiprocessors)
    assert products.kernel
    return products.kernel, products.log[-1].grid[0]
