"""Estimates of a step's time on a GPU that is not here, from published rates of others' kernels.

A product takes the multiprocessor that has most of its tiles so long: what multiplies its k, and what each tile takes
beside. `triton_kernels.configs.work` counts both, for choosing tiles; here they get a clock. Where it takes longer to
bring operands from memory, that counts. The rest are passes over gradients and parameters, and gaps between launches.
No kernel of ours was timed. Beside what fused-muon 740a4d7 measured with the same FLOPs on A800, five steps on one
matrix, the estimates for A100 are 6.4 ms against 6.29 at 4096x4096, 1.10 against 1.31 at 2048x2048 and 0.15 against
0.23 at 896x896: the smaller, the more they leave out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .. import backends
from ..backends.gpu import fused_seconds
from ..coefficients import Schedule
from ..newton_schulz import Square
from ..step.counting import Counter, count_iteration
from ..step.plan import Bucket, Plan
from ..triton_kernels.configs import TABLES, Config, Shape, Table, table, vendor, work


class Gpu(NamedTuple):
    """Facts of a GPU from its data sheet.

    Attributes:
        flops: dense bf16 FLOP/s with fp32 accumulation.
        bytes: of memory, a second.
        capability: of compute, as 10 times major plus minor.
        nvlink: bytes/s to the GPUs of its node, one way; 0 if it has none.
        memory: bytes.
    """

    flops: float
    bytes: float
    capability: int
    multiprocessors: int
    name: str
    nvlink: float
    memory: float


GPUS = {
    "a100": Gpu(312e12, 2.039e12, 80, 108, "A100 80GB SXM", 300e9, 80e9),
    "h100": Gpu(989e12, 3.35e12, 90, 132, "H100 SXM", 450e9, 80e9),
    "h200": Gpu(989e12, 4.8e12, 90, 132, "H200 SXM", 450e9, 141e9),
    "4090": Gpu(165e12, 1.008e12, 89, 128, "GeForce RTX 4090", 0, 24e9),
    "5090": Gpu(209.5e12, 1.792e12, 120, 170, "GeForce RTX 5090", 0, 32e9),
    "b200": Gpu(2250e12, 8.0e12, 100, 148, "B200 SXM", 900e9, 180e9),
}
GPUS["rtx4090"] = GPUS["4090"]  # its name in 0.1.0


class Reached(NamedTuple):
    """Share of a rate on the data sheet that kernels of a kind were seen to reach, and where."""

    share: float
    source: str


# Of the tensor cores' rate, within the loop over k, by the products' tile of cost 1.
_TRITON = {
    80: Reached(0.80, "learn-cuda 1454f8b, A100: 225 TFLOP/s at 4096 with what a tile takes beside"),
    86: Reached(0.88, "learn-cuda 1454f8b, 5090: 164 to 192 of 209.5"),
    90: Reached(0.76, "TLX 1038 and LeetCUDA 416, H100: 1,350 clocks for 128 x 256 x 64 at 1.85 GHz"),
    100: Reached(0.41, "learn-cuda 1454f8b, B200: one tile a program, 914 of 2,250"),
    120: Reached(0.88, "learn-cuda 1454f8b, 5090: 164 to 192 of 209.5"),
}
_MMA_SYNC = {
    90: Reached(0.45, "0.57 of wgmma (arXiv 2501.12084) by 0.8 as on A100"),
    100: Reached(0.18, "learn-cuda 1454f8b, B200: 409 of 2,250"),
}
# product_sm90.cu: stores of a wide tile wait for its products, those of others pass while the next one multiplies.
_WGMMA = Table(
    (
        Config(128, 256, 64, 12, 4, 1.0, 100, (1, 1)),
        Config(128, 128, 64, 12, 6, 1.25, 0, (1, 1)),
    )
)
_FAST_CU = Reached(0.80, "fast.cu 38eb642, H100: 808 TFLOP/s at 8192, with tiles and roles like ours")
_CUBLAS = Reached(0.60, "learn-cuda 1454f8b, B200: 1,359 of 2,250 at 4096")
_MEMORY = Reached(0.85, "H200: a copy moves 4.3 of 4.8 TB/s, and ours read and write several streams")
_BOUNDARY = Reached(1.2e-6, "seconds between two launches that depend on one another, assumed")


class Kernels(NamedTuple):
    """Product kernels on a GPU: their tiles and what they reach."""

    name: str
    backend: str
    tiles: Table
    reached: Reached


def kernels_on(gpu: Gpu) -> list[Kernels]:
    """Return the kinds of product kernels that run on a GPU."""
    newest = max(c for c in _TRITON if c <= gpu.capability)
    sm80 = TABLES[80 if gpu.capability == 80 else 86]
    sm80 = sm80._replace(configs=tuple(c for c in sm80.configs if c.block_n <= 128))
    kinds = [
        Kernels("triton", "triton", table(gpu.capability), _TRITON[newest]),
        Kernels("cuda, mma.sync", "cuda", sm80, _MMA_SYNC.get(newest, _TRITON[newest])),
    ]
    return [*kinds, Kernels("cuda, wgmma", "cuda", _WGMMA, _FAST_CU)] if gpu.capability == 90 else kinds


class _Products(Counter):
    """Counter that keeps the shape of every product, of one matrix."""

    def __init__(self, symmetric: bool, precise: bool) -> None:
        super().__init__(symmetric, precise)
        self.shapes: list[Shape] = []

    def traffic(self, A: Square, B: Square, C: Tensor | None, out: Tensor, triangle: bool) -> int:
        """Keep the shape; return the bytes as `Counter` does."""
        _, m, n = out.shape
        self.shapes.append(Shape(1, m, n, A.high.shape[2], triangle))
        return super().traffic(A, B, C, out, triangle)


def product_seconds(shape: Shape, kernels: Kernels, gpu: Gpu) -> float:
    """Estimate a product's time, of the tiles that are chosen for it."""
    if vendor(shape, kernels.tiles):
        flops = 2 * shape.batch * shape.m * shape.n * shape.k
        return flops / (_CUBLAS.share * gpu.flops) + 25 * shape.batch * shape.m * shape.n / (gpu.bytes * _MEMORY.share)
    least = min(_work(c, shape, gpu) for c in kernels.tiles.configs if c.residents[shape.symmetric])
    multiplying = 2 * least * gpu.multiprocessors / (gpu.flops * kernels.reached.share)
    elements = shape.m * shape.k + shape.m * shape.n + (0 if shape.symmetric else shape.k * shape.n)
    return max(multiplying, 2 * shape.batch * elements / (gpu.bytes * _MEMORY.share))


def square_seconds(m: int, n: int, batch: int, gpu: Gpu) -> float:
    """Estimate the time of X Xᵀ for so many X of m x n, by the first of `kernels_on`."""
    return product_seconds(Shape(batch, m, m, n, True), kernels_on(gpu)[0], gpu)


def _work(config: Config, shape: Shape, gpu: Gpu) -> float:
    return work(config, shape, gpu.multiprocessors)


class Estimate(NamedTuple):
    """Estimated seconds of a step, by what takes them, and the products' FLOPs."""

    products: float
    passes: float
    boundaries: float
    flops: float

    @property
    def seconds(self) -> float:
        """Return the whole time."""
        return self.products + self.passes + self.boundaries


def _products(bucket: Bucket, batch: int, kernels: Kernels, gpu: Gpu, schedule: Schedule) -> float:
    """Return the seconds of the products of `batch` of a bucket's matrices at a time."""
    shapes = _shapes(kernels.backend, bucket.algorithm, *bucket.shape, schedule)
    return sum(product_seconds(shape._replace(batch=batch), kernels, gpu) for shape in shapes)


@lru_cache(maxsize=256)
def _shapes(backend: str, algorithm: str, m: int, n: int, schedule: Schedule) -> list[Shape]:
    """Return the products of one matrix's iteration."""
    ops = backends.get(backend)
    counter = _Products(ops.symmetric_products, ops.precise_squares)
    count_iteration(counter, algorithm, m, n, schedule)
    return counter.shapes


def pass_seconds(bytes_: float, gpu: Gpu) -> float:
    """Estimate the time in which a GPU moves so many bytes of its memory."""
    return bytes_ / (gpu.bytes * _MEMORY.share)


def iteration_seconds(bucket: Bucket, batch: int, gpu: Gpu, schedule: Schedule) -> float:
    """Estimate the time of the iteration on `batch` of a bucket's matrices at a time, by the kernels of its backend.

    Where a backend has several kinds of kernels for the GPU, it is the first of `kernels_on`. The norm and the gaps
    between launches are in it, the passes over gradients and parameters are not.
    """
    kernels = next(kind for kind in kernels_on(gpu) if kind.backend == bucket.backend)
    return _products(bucket, batch, kernels, gpu, schedule) + bucket.launches * _BOUNDARY.share


def _bucket(bucket: Bucket, kernels: Kernels, gpu: Gpu, schedule: Schedule) -> tuple[float, float]:
    """Return the seconds of a bucket's products, and of its passes."""
    if bucket.fused:
        return fused_seconds(*bucket.shape, bucket.count, bucket.parts), 0.0
    products = sum(_products(bucket, batch, kernels, gpu, schedule) for batch in bucket.chunks)
    return products, pass_seconds(bucket.bytes, gpu)


def estimate(plan: Plan, kernels: Kernels, gpu: Gpu, schedule: Schedule) -> Estimate:
    """Estimate the time of a planned step."""
    times = [_bucket(bucket, kernels, gpu, schedule) for bucket in plan.buckets]
    products, passes = (sum(column) for column in zip(*times, strict=True))
    flops = sum(bucket.flops for bucket in plan.buckets)
    return Estimate(products, passes, plan.launches * _BOUNDARY.share, flops)


def lines(plans: dict[str, Plan], gpu: Gpu, schedule: Schedule) -> Iterator[str]:
    """Yield a table of estimates for the plans of our backends, with the sources of its numbers."""
    yield f"estimates, not measurements: {gpu.name}, from the rates that others' kernels were seen to reach"
    yield f"{'':32}{'products, ms':>14}{'passes, ms':>12}{'gaps, ms':>10}{'step, ms':>10}{'TFLOP/s':>9}"
    for kernels in kernels_on(gpu):
        e = estimate(plans[kernels.backend], kernels, gpu, schedule)
        ms = [1e3 * seconds for seconds in (e.products, e.passes, e.boundaries, e.seconds)]
        rate = e.flops / max(e.products, 1e-12) / 1e12
        yield f"{'estimate of ' + kernels.name:32}{ms[0]:14.3f}{ms[1]:12.3f}{ms[2]:10.3f}{ms[3]:10.3f}{rate:9.0f}"
    yield from _sources(kernels_on(gpu))


def _sources(kinds: Sequence[Kernels]) -> Iterator[str]:
    yield "estimated from"
    for kernels in kinds:
        yield f"  {kernels.name}: {kernels.reached.share:.0%} of the tensor cores' rate ({kernels.reached.source})"
        if kernels.tiles.vendor_from:
            yield f"  cuBLAS, from {kernels.tiles.vendor_from} on: {_CUBLAS.share:.0%} ({_CUBLAS.source})"
    yield f"  memory: {_MEMORY.share:.0%} of its rate ({_MEMORY.source})"
    yield f"  gaps: {1e6 * _BOUNDARY.share:.1f} µs ({_BOUNDARY.source})"
    yield "  what a tile takes beside its k: 3.5 µs for 128 x 128, 4 for 128 x 256 (LeetCUDA 416, TLX 1038, H100)"
    yield "  fused steps: 0.35 ms for 128 x 4096 on one multiprocessor, predicted"
    yield "  FLOP/s, bytes/s and multiprocessors: NVIDIA's data sheet"
