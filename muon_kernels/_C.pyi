"""The compiled module (python/bindings.cpp)."""

import enum

class DType(enum.Enum):
    f32 = 0
    bf16 = 1

class cpu:
    """Kernels for this processor (csrc/cpu)."""

    class Isa(enum.Enum):
        avx512bf16 = 0
        avx2 = 1

    @staticmethod
    def isa_supported(isa: Isa) -> bool: ...
    @staticmethod
    def has_amx_bf16() -> bool: ...
    @staticmethod
    def thread_runtime() -> str: ...
    class Product:
        def __init__(
            self,
            a: tuple[int, ...],
            a_diagonal: int,
            b: tuple[int, ...],
            b_transposed: bool,
            b_diagonal: int,
            c: tuple[int, ...] | None,
            c_diagonal: int,
            out: tuple[int, ...],
            out_diagonal: int,
            symmetric: bool,
            alpha: float,
            beta: float,
            gamma: float,
            scale: int,
            /,
        ) -> None: ...

    @staticmethod
    def products(isa: Isa, threads: int, products: list[Product], /) -> None: ...
    @staticmethod
    def momentum_update(
        isa: Isa,
        threads: int,
        grad: int,
        grad_dtype: DType,
        momentum: int,
        momentum_dtype: DType,
        x: tuple[int, ...],
        sum_of_squares: int,
        grad_scale: float,
        mu: float,
        nesterov: bool,
        dampened: bool,
        /,
    ) -> None: ...
    @staticmethod
    def apply_update(
        isa: Isa, threads: int, param: int, param_dtype: DType, x: tuple[int, ...], decay: float, step_size: int, /
    ) -> None: ...
