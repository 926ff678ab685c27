"""The compiled module (python/bindings.cpp)."""

import enum

class DType(enum.Enum):
    f32 = 0
    bf16 = 1
    f16 = 2

class Product:
    def __init__(
        self,
        a: tuple[int, ...],
        a_diagonal: int,
        b: tuple[int, ...] | None,
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

class MomentumUpdate:
    def __init__(
        self,
        grad: int,
        grad_dtype: DType,
        momentum: int,
        momentum_dtype: DType,
        x: tuple[int, ...],
        scale: int,
        norm: int,
        eps: float,
        margin: float,
        grad_scale: float,
        mu: float,
        nesterov: bool,
        dampened: bool,
        /,
    ) -> None: ...

class ApplyUpdate:
    def __init__(
        self, param: int, param_dtype: DType, x: tuple[int, ...], lr: float, weight_decay: float, ratio: int, /
    ) -> None: ...

class ApplyOptions:
    def __init__(
        self,
        lr: int,
        weight_decay: int,
        cautious: bool,
        stochastic_rounding: bool,
        seed: int,
        number: int,
        top: int,
        left: int,
        cols: int,
        turned: bool,
        /,
    ) -> None: ...

class cpu:
    """Kernels for this processor (csrc/cpu)."""

    class Isa(enum.Enum):
        amx = 0
        avx512bf16 = 1
        avx512 = 2
        avx2 = 3

    @staticmethod
    def instruction_sets() -> list[Isa]: ...
    @staticmethod
    def thread_runtime() -> str: ...
    @staticmethod
    def products(isa: Isa, threads: int, products: list[Product], /) -> None: ...
    @staticmethod
    def momentum_update(isa: Isa, threads: int, update: MomentumUpdate, /) -> None: ...
    @staticmethod
    def apply_update(isa: Isa, threads: int, update: ApplyUpdate, options: ApplyOptions, /) -> None: ...
    @staticmethod
    def fused_step(
        isa: Isa,
        threads: int,
        count: int,
        momentum: MomentumUpdate,
        products: list[Product],
        apply: ApplyUpdate,
        options: ApplyOptions,
        /,
    ) -> None: ...

class cuda:
    """Kernels for NVIDIA GPUs (csrc/cuda), if built with them. A failed launch: RuntimeError(what, cudaError_t)."""

    version: str  # of nvcc
    architectures: str  # compute capabilities without their point
    wgmma: bool  # whether products use it on compute capability 9.0

    class Program:
        """Products made ready for the current device; with wgmma, if it may and where it can."""

        def __init__(self, products: list[Product], dtype: DType, wgmma: bool, /) -> None: ...
        def run(self, stream: int, /) -> None: ...

    @staticmethod
    def load_kernels() -> None: ...
    @staticmethod
    def products(products: list[Product], dtype: DType, stream: int, /) -> None: ...
    @staticmethod
    def momentum_capacity() -> int: ...
    @staticmethod
    def apply_capacity() -> int: ...
    @staticmethod
    def fused_capacity() -> int: ...
    @staticmethod
    def fused_partial_bytes(rows: int, /) -> int: ...
    @staticmethod
    def momentum_partials(update: MomentumUpdate, /) -> int: ...
    @staticmethod
    def momentum_update(update: MomentumUpdate, dtype: DType, partial: int, stream: int, /) -> None: ...
    @staticmethod
    def apply_update(update: ApplyUpdate, options: ApplyOptions, dtype: DType, stream: int, /) -> None: ...
    @staticmethod
    def fused_step(
        count: int,
        rows: int,
        cols: int,
        momentum: MomentumUpdate,
        apply: ApplyUpdate,
        coefficients: list[float],
        terms: int,
        parts: int,
        partials: int,
        options: ApplyOptions,
        stream: int,
        /,
    ) -> None: ...
