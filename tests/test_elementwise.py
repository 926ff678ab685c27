"""momentum_update and apply_update of every backend, against the formulas in float64."""

import mmap
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from muon_kernels import backends
from muon_kernels.backends import cpu
from muon_kernels.coefficients import resolve
from muon_kernels.layout import Matrices, Window, layout
from muon_kernels.newton_schulz import Square
from muon_kernels.verbs import ApplyOptions, ApplyUpdate, MomentumUpdate, Step

# How a parameter of (rows, cols) may lie in memory.
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "contiguous": lambda m, n: torch.empty(m, n),
    "transposed": lambda m, n: torch.empty(n, m).T,
    "sliced": lambda m, n: torch.empty(m + 2, n + 3)[1:-1, 2:-1],
    "every second": lambda m, n: torch.empty(2 * m, 2 * n)[::2, ::2],
}
SHAPES = [(1, 1), (1, 40), (40, 1), (17, 33), (33, 17), (16, 300), (300, 16), (130, 700), (700, 130)]


def matrices(t: Tensor) -> Matrices:
    at = layout(t.shape, t.stride(), None, ())
    assert at is not None
    return Matrices(t, at)


def random(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> Tensor:
    t = LAYOUTS[kind](*shape).to(dtype)
    return t.copy_(torch.randn(shape))


def workspace(batch: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """A strided X full of NaN inside a block of sentinels, and the block."""
    block = torch.full((batch, m + 2, n + 6), 77.0, dtype=torch.bfloat16)
    X = block[:, 1:-1, 3:-3]
    return X.fill_(torch.nan), block


def assert_untouched(block: Tensor) -> None:
    around = block.clone()
    around[:, 1:-1, 3:-3] = 77
    assert (around == 77).all(), "written outside the workspace"


def wide(t: Tensor) -> Tensor:
    return t.mT if t.shape[0] > t.shape[1] else t


def plain_direction(grads: list[Matrices], X: Tensor, margin: float = 1.0) -> MomentumUpdate:
    """The gradient itself."""
    return MomentumUpdate(grads, None, X, 0.0, False, True, 1.0, 1e-7, margin)


@pytest.mark.parametrize("dampened", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_momentum_update(backend: str, kind: str, dtype: torch.dtype, nesterov: bool, dampened: bool) -> None:
    ops = backends.get(backend)
    for shape, mu in zip(SHAPES, cycle((0.9, 0.3))):  # torch.lerp has a branch for each
        m, n = sorted(shape)
        grads = [random(shape, k, dtype) for k in (kind, "contiguous", "transposed")]
        buffers = [random(shape, k, torch.float32) for k in (kind, kind, "contiguous")]
        kept, before = [g.clone() for g in grads], [b.double() for b in buffers]
        X, block = workspace(3, m, n)
        scale = ops.momentum_update(
            MomentumUpdate(
                [matrices(g) for g in grads], [matrices(b) for b in buffers], X, mu, nesterov, dampened, -0.5, 1e-7, 1.0
            )
        )
        assert_untouched(block)
        for i, (g, b, old) in enumerate(zip(grads, buffers, before, strict=True)):
            assert torch.equal(g, kept[i]), "a gradient was written"
            grad = -0.5 * g.double()
            new = old + (1 - mu) * (grad - old) if dampened else mu * old + grad
            torch.testing.assert_close(b.double(), new, rtol=1e-6, atol=1e-6)
            direction = new
            if nesterov:
                direction = grad + mu * (new - grad) if dampened else grad + mu * new
            norm = direction.norm()
            x = X[i].double() * (1.0 if scale is None else scale[i])
            torch.testing.assert_close(x, wide(direction) / norm, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_apply_update(backend: str, kind: str, dtype: torch.dtype) -> None:
    ops = backends.get(backend)
    for shape in SHAPES:
        m, n = sorted(shape)
        params = [random(shape, k, dtype) for k in (kind, "contiguous", "transposed")]
        before = [p.double() for p in params]
        X = workspace(3, m, n)[0].copy_(torch.randn(3, m, n))
        versions = [p._version for p in params]
        ops.apply_update(ApplyUpdate([matrices(p) for p in params], X, 0.5, 0.5, [1.0, 2.0, 4.0]))
        for i, p in enumerate(params):
            update = (X[i].mT if shape[0] > shape[1] else X[i]).double()
            exact = 0.75 * before[i] - [0.5, 1.0, 2.0][i] * update
            tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(p.double(), exact, rtol=tolerance, atol=tolerance)
            assert p._version > versions[i], "autograd does not know"


def test_a_parameter_may_hold_several_matrices(backend: str) -> None:
    ops = backends.get(backend)
    params = [torch.randn(2, 5, 7), torch.randn(7, 3, 5).movedim(0, 2)]
    before = [p.clone() for p in params]
    grads = [torch.randn(p.shape) for p in params]
    X = torch.empty(5, 5, 7, dtype=torch.bfloat16)
    scale = ops.momentum_update(plain_direction([matrices(g) for g in grads], X))
    directions = torch.cat(grads).double()
    exact = directions / directions.norm(dim=(1, 2), keepdim=True)
    x = X.double() if scale is None else X.double() * scale[:, None, None]
    torch.testing.assert_close(x, exact, rtol=2**-8, atol=0)
    ops.apply_update(ApplyUpdate([matrices(p) for p in params], X, 0.5, 1.0, [2.0, 2.0, 4.0, 4.0, 4.0]))
    for p, old, x, step_size in zip(params, before, X.split([2, 3]), [1.0, 2.0], strict=True):
        torch.testing.assert_close(p, 0.5 * old - step_size * x.float(), rtol=1e-6, atol=1e-6)


def test_the_direction_is_rounded_to_nearest_even(backend: str) -> None:
    if backend != "cpu":
        pytest.skip("X may be the direction times a factor")
    G = torch.randn(24, 40)
    G[0, :6] = torch.tensor([257.0, 259.0, -257.0, -259.0, 257.001, 258.999])
    X = torch.empty(2, 24, 40, dtype=torch.bfloat16)
    nan = torch.full_like(G, torch.nan)
    nan.view(torch.int32)[::2] = 0x7FFFFFFF  # whose upper half plus one would be a zero
    backends.get(backend).momentum_update(plain_direction([matrices(G), matrices(nan)], X))
    assert torch.equal(X[0], G.bfloat16())
    assert X[1].isnan().all()


def test_memory_around_a_slice_is_untouched(backend: str) -> None:
    ops = backends.get(backend)
    for make in (lambda: torch.full((40, 50), 77.0), lambda: torch.full((50, 40), 77.0).T):
        block = make()
        p = block[3:33, 5:25]
        X = torch.randn(1, 20, 30).bfloat16()
        ops.apply_update(ApplyUpdate([matrices(p)], X, 1.0, 0.0, [1.0]))
        inside = torch.zeros_like(block, dtype=torch.bool)
        inside[3:33, 5:25] = True
        assert (block[~inside] == 77).all()
        assert (p != 77).all()


@pytest.mark.parametrize("factor", [1e-30, 1e-25, 1e-20, 1e-5, 1e5, 1e20, 1e25, 1e30])
def test_direction_keeps_its_digits_at_any_scale(backend: str, factor: float) -> None:
    ops = backends.get(backend)
    G = torch.randn(20, 30)
    results = []
    for g in (G, G * factor):
        X = torch.empty(1, 20, 30, dtype=torch.bfloat16)
        scale = ops.momentum_update(plain_direction([matrices(g)], X))
        scale = torch.ones(1) if scale is None else scale
        assert 2.0**-30 <= float(scale) <= 2.0**30
        results.append(X.double() * scale)
    torch.testing.assert_close(results[1], results[0], rtol=2**-7, atol=0)


def test_scale_does_not_depend_on_threads(backend: str) -> None:
    ops = backends.get(backend)
    G = torch.randn(300, 1000)
    X = torch.empty(1, 300, 1000, dtype=torch.bfloat16)
    scales = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        scales.append(ops.momentum_update(plain_direction([matrices(G)], X)))
    if scales[0] is not None:
        assert torch.equal(*scales)
        torch.testing.assert_close(scales[0].double(), 1 / G.double().norm()[None], rtol=2**-24, atol=0)


def test_scale_of_what_has_no_norm(backend: str) -> None:
    """Zero, infinity, NaN, and a margin; each its own matrix's."""
    G = torch.randn(4, 6, 9)
    G[0] = 0
    G[1, 2, 3] = torch.inf
    G[2, 5, 8] = torch.nan
    X = torch.empty(4, 6, 9, dtype=torch.bfloat16)
    scale = backends.get(backend).momentum_update(plain_direction([matrices(G)], X, margin=1.25))
    if scale is not None:  # so that a whole matrix is spoilt, not an element
        assert scale[0] == 0 and scale[1:3].isnan().all()
    x = X.float() if scale is None else X * scale[:, None, None]
    assert not x[0].any()
    assert not x[1].isfinite().all() and x[2].isnan().any()
    assert float(x[3].norm()) == pytest.approx(0.8, rel=2**-8)


@pytest.mark.parametrize(
    ("nesterov", "dampened", "momentum_dtype"),
    [(True, True, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"cautious": True, "stochastic_rounding": True, "seed": 5, "window": Window(3, 1, 900, True)}],
    ids=len,
)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("shape", [(20, 33), (300, 40), (700, 130), (1, 7)], ids=str)
def test_fused_step_is_its_parts(
    backend: str,
    shape: tuple[int, int],
    kind: str,
    nesterov: bool,
    dampened: bool,
    momentum_dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    """Bit for bit, whatever thread takes a matrix, and nothing else is written."""
    ops = backends.get(backend)
    m, n = sorted(shape)
    count = 4 * torch.get_num_threads() + 3
    schedule = resolve("keller", None)
    if options:
        options = {**options, "number": range(2 * count, 0, -2)}
    fused = ops.fused_plan(m, n, count, schedule)
    if fused is None:
        pytest.skip("the backend says that it has none")
    slots = fused.slots
    assert ops.fused_plan(m, n, 1, schedule) is None
    # Norms on both sides of where a matrix is rescaled.
    scales = [10.0 ** (7 * (i - count // 2)) for i in range(count)]
    grads = [random(shape, kind, torch.float32) * s for s in scales]
    begun = [
        ((random(shape, kind, torch.float32) * s).to(momentum_dtype), random(shape, "contiguous", torch.bfloat16))
        for s in scales
    ]
    ratio = [1.0 + i for i in range(count)]

    def iteration(batch: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        X, block = workspace(batch, m, n)
        Y, A = torch.empty_like(X), Square(torch.empty(batch, m, m, dtype=torch.bfloat16), torch.empty(batch, m))

        def iterate(scale: Tensor) -> Tensor:
            ops.syrk(X, out=A, scale=scale)
            ops.gemm(A, X, C=X, out=Y, alpha=-0.5, beta=1.5, scale=scale)
            return Y

        return X, block, iterate

    results = []
    for fused in (True, False):
        momenta, params = ([t.clone() for t in ts] for ts in zip(*begun, strict=True))
        versions = [p._version for p in params]
        g, b, p = ([matrices(t) for t in ts] for ts in (grads, momenta, params))
        X, block, iterate = iteration(slots if fused else count)
        momentum = MomentumUpdate(g, b, X, 0.9, nesterov, dampened, 2.0, 1e-7, 1.0)
        apply = ApplyUpdate(p, X, 0.5, 0.5, ratio)
        if fused:
            ops.fused_step(Step(momentum, iterate, (), apply, ApplyOptions(**options)))
        else:
            scale = ops.momentum_update(momentum)
            assert scale is not None
            ops.apply_update(apply._replace(x=iterate(scale)), ApplyOptions(**options))
        assert_untouched(block)
        assert all(t._version > was for t, was in zip(params, versions, strict=True))
        results.append(momenta + params)
    assert all(map(torch.equal, *results))
    assert all(t.isfinite().all() for t in results[0])
    assert not any(torch.equal(t, old) for t, (_, old) in zip(results[0][count:], begun, strict=True))


def without_memory(call: Callable[[], object]) -> BaseException | None:
    """What `call` raises where a few MiB are left, on a thread that keeps hardly any scratch of earlier calls."""
    raised: list[BaseException] = []

    def run() -> None:
        # OpenMP ends the process if it cannot start the threads that share this one's work: they are started before.
        tiny = torch.ones(32, 4, 4, dtype=torch.bfloat16)
        cpu.syrk(tiny, out=Square(torch.empty_like(tiny)))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), limits[1]))
        try:
            call()
        except BaseException as error:
            raised.append(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def miss_memory(isa: str) -> None:
    """Products whose sums take 64 MiB a thread; of their operands, which nobody reads, hardly a page exists."""
    slots, count = 2, 5
    A, B, out = (
        torch.empty(slots, *shape, dtype=torch.bfloat16) for shape in ((1 << 16, 2100), (2100, 8), (1 << 16, 8))
    )
    out[:, ::4096] = 1.0
    grads, momenta, params = ([random((8, 9), "contiguous", torch.float32) for _ in range(count)] for _ in range(3))
    before = [t.clone() for t in momenta + params]
    X, block = workspace(slots, 8, 9)

    def iterate(scale: Tensor) -> Tensor:
        cpu.gemm(Square(A), B, out=out)
        return X

    def step(iterate: Callable[[Tensor], Tensor]) -> None:
        p, g, b = ([matrices(t) for t in ts] for ts in (params, grads, momenta))
        momentum = MomentumUpdate(g, b, X, 0.9, True, True, 1.0, 1e-7, 1.0)
        cpu.fused_step(Step(momentum, iterate, (), ApplyUpdate(p, X, 0.5, 0.5, [1.0] * count), ApplyOptions()))

    with cpu.forced(isa):
        for call in (lambda: cpu.gemm(Square(A), B, out=out), lambda: step(iterate)):
            error = without_memory(call)
            assert type(error) is MemoryError and "nothing was written" in str(error)
        assert all(map(torch.equal, before, momenta + params)) and X.isnan().all()
        assert (out[:, ::4096] == 1).all()
        assert without_memory(lambda: step(lambda scale: X)) is None, "a little memory is enough"
        assert not any(map(torch.equal, before, momenta + params))
    assert_untouched(block)


@pytest.mark.parametrize("isa", cpu.instruction_sets())
def test_memory_that_is_missing_is_missed_before_anything_is_written(isa: str) -> None:
    """In a process of its own: the threads of whoever runs tests need memory as well."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__, isa], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    torch.set_num_threads(2)
    miss_memory(sys.argv[1])
