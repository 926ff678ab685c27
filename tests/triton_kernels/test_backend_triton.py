"""The backend: who is refused, Newton-Schulz over its products; and their kernel in Triton's interpreter."""

from __future__ import annotations

import glob
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_kernels import Muon, backends, newton_schulz
from muon_kernels.backends import triton as backend
from muon_kernels.checks.matrices import make
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
    schedule = resolve("polar_express", 5)
    X = torch.stack([make("power -1/2", m, n, seed=i).float() for i in range(batch)])
    X = (X / X.norm(dim=(1, 2), keepdim=True)).bfloat16()
    scale = torch.full((batch,), 1 / schedule.margin)

    def run(ops: Any) -> Tensor:
        squares = [Square(torch.full((batch, m, m), torch.nan).bfloat16(), torch.empty(batch, m)) for _ in range(5)]
        algorithm = newton_schulz.ALGORITHMS[form]
        buffers = X.clone(), torch.empty_like(X)
        run = lambda: algorithm.run(ops, *buffers, squares[: algorithm.squares], scale, schedule)
        return ops.program(run)()

    with emulated(arch) as device:
        ours = run(backend)
    assert {ran.name for ran in device.log} == {"_product"}
    right = polynomial(X.double() / schedule.margin, schedule.triples)
    error = lambda t: float((t.double() - right).norm() / right.norm())
    assert error(ours) <= 1.1 * error(run(backends.get("cpu")))


# Triton's interpreter runs a kernel in numpy, if a variable is set before triton is imported. Its tl.dot multiplies the
# bits of bf16, so f16 it is.
INTERPRETED = """
import torch
from checks import products as checks
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


@pytest.fixture
def a_gpu_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backend._triton_unfit.cache_clear()
    yield
    backend._triton_unfit.cache_clear()


@needs_triton
def test_with_an_old_triton(a_gpu_that_torch_finds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from emulated_gpu import emulated

    monkeypatch.setattr(triton, "__version__", "3.1.0")
    assert "3.1.0 is too old; upgrade torch" in str(backend.unavailable())
    backend._triton_unfit.cache_clear()
    monkeypatch.setattr(triton, "__version__", "4.0.0+git")
    with emulated(80):
        assert backend.unavailable() is None


@needs_triton
@pytest.mark.skipif(bool(glob.glob("/dev/nvidia*")), reason="there is a driver")
def test_without_a_driver(a_gpu_that_torch_finds: None) -> None:
    reason = str(backend.unavailable())
    assert "cannot reach the GPU (" in reason and "libcuda" in reason and "nvidia-smi" in reason
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run here: triton .* cannot reach the GPU"):
        Muon([nn.Parameter(torch.ones(2, 3))], backend="triton")


@needs_triton
def test_a_cache_that_cannot_be_written(
    a_gpu_that_torch_finds: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from emulated_gpu import emulated

    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with emulated(80):
        assert "cannot write its cache" in str(backend.unavailable())
    assert "set TRITON_CACHE_DIR to a directory that can be written" in str(backend.unavailable())


@needs_triton
@pytest.mark.parametrize("shape", [(24, 40), (130, 150)], ids=["fused_step", "products"])
@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (PermissionError(13, "Permission denied"), "PermissionError: .*; set TRITON_CACHE_DIR"),
        (
            RuntimeError("Failed to find C compiler."),
            "RuntimeError: Failed to find C compiler.*; install gcc or clang, or set CC",
        ),
        (ValueError("inside\na compiler"), "ValueError: inside\\); use backend='cuda' or backend='eager'"),
    ],
    ids=["cache", "compiler", "anything"],
)
def test_what_cannot_be_compiled_changes_nothing(
    on_the_cpu: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, mend: str, shape: tuple[int, int]
) -> None:
    """Whichever kernel of a step it is."""
    from emulated_gpu import compiling
    from triton.runtime.jit import JITFunction

    from muon_kernels.triton_kernels import launch

    real = JITFunction.warmup
    seen: list[str] = []
    failing: list[str] = []

    def warmup(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(self.__name__)
        if self.__name__ in failing:
            raise error
        return real(self, *args, **options)

    monkeypatch.setattr(JITFunction, "warmup", warmup)
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.ones(shape)
    with compiling(80, 108, binary=False) as device:
        monkeypatch.setattr(launch, "_compiled", {})
        Muon([p], backend="triton").step()
        names = list(dict.fromkeys(seen))
        assert len(names) == (2 if shape == (24, 40) else 5)
        device.log.clear()
        for name in names:
            monkeypatch.setattr(launch, "_compiled", {})
            failing[:] = [name]
            muon = Muon([p], backend="triton")
            target = rf"triton \S+ could not make {name} for cuda 80 \({mend}"
            with pytest.raises(RuntimeError, match=f"{target}.*, for 1 of {shape[0]}x{shape[1]} on cpu"):
                muon.step()
            assert not muon.state and not device.log, "a step begins when all is compiled"
        failing.clear()
        muon.step()
        assert device.log, "and goes on when it is"


@needs_triton
def test_an_address_less_aligned_asks_for_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels may rely on what it saw of the arguments for which it made them."""
    from emulated_gpu import compiling

    from muon_kernels.triton_kernels import launch, products

    monkeypatch.setattr(launch, "_compiled", {})
    memory = torch.zeros(3, 17 * 17 + 8).bfloat16()
    for arch, others in ((80, 0), (86, 2)):
        with compiling(arch, binary=False):
            for offset, kernels in ((0, 1), (8, 1), (1, 2), (3, 2)):
                a, b, out = (m[offset : offset + 17 * 17].view(1, 17, 17) for m in memory)
                with launch.rehearsal():
                    products.product(a, b, out)
                assert len(launch._compiled) == others + kernels, "another device needs its own"
    assert all(kernel.module is not None for kernel in launch._compiled.values()), "loaded, too"
    assert launch._type(2**31) != launch._type(1), "a wider argument"


@needs_triton
@pytest.mark.parametrize("change", ["nesterov", "dampened", "lr", "weight_decay", "gradient"])
def test_a_later_step_of_another_kind_is_made_ready_as_well(
    on_the_cpu: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Of the second of two groups, so that without it there would be launches before what fails.

    Their learning rates differ, or the first step would be of both as one, and the later one would be prepared anew.
    """
    from emulated_gpu import compiling
    from triton.runtime.jit import JITFunction

    from muon_kernels import options
    from muon_kernels.triton_kernels import launch

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(options, "on_host", lambda value: not isinstance(value, Tensor))
    params = [nn.Parameter(torch.ones(136, n)) for n in (136, 144)]
    for p in params:
        p.grad = torch.ones_like(p)
    with compiling(80, 108, binary=False) as device:
        muon = Muon([{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.2), strict=True)], backend="triton")
        muon.step()
        device.log.clear()
        group = muon.param_groups[1]
        if change == "gradient":
            params[1].grad = torch.ones(136 * 144 + 1)[1:].view(136, 144)
        else:
            group[change] = torch.tensor(0.1) if change in ("lr", "weight_decay") else not group[change]
        monkeypatch.setattr(JITFunction, "warmup", fails)
        with pytest.raises(RuntimeError, match="no room"):
            muon.step()
        assert not device.log


@needs_triton
def test_an_error_of_a_launch(on_the_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from emulated_gpu import _Launcher, emulated

    def fails(*_: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    p = nn.Parameter(torch.ones(24, 40))
    p.grad = torch.ones(24, 40)
    with emulated(80, 108, None):
        muon = Muon([p], backend="triton")
        with monkeypatch.context() as m, pytest.raises(RuntimeError, match=r"out of memory, for 1 of 24x40 on cpu"):
            m.setattr(_Launcher, "__call__", fails)
            muon.step()
        assert torch.equal(p, torch.ones(24, 40))
        muon.step()
        assert not torch.equal(p, torch.ones(24, 40))


@needs_triton
def test_a_plan_says_who_multiplies(on_the_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from emulated_gpu import emulated

    from muon_kernels.triton_kernels import configs, measured

    p = nn.Parameter(torch.ones(130, 150))
    with emulated(100):
        assert Muon([p], backend="triton").plan().notes == ()
        monkeypatch.setattr(measured, "load", lambda *_: configs.table(100)._replace(vendor_from=130))
        library, tiles = Muon([p], backend="triton").plan().notes
        assert library == "of 130x150, products with the matrices themselves are left to the GPU vendor's library"
        assert "python -m muon_kernels tune measured" in tiles


def test_what_is_refused(on_the_cpu: Any) -> None:
    assert backend.refuses(torch.device("cpu"), [torch.bfloat16], torch.bfloat16) is None
    assert "float64" in str(backend.refuses(torch.device("cpu"), [torch.float64], torch.bfloat16))
    assert "GPU" in str(backend.refuses(torch.device("meta"), [torch.bfloat16], torch.bfloat16))
    on_the_cpu.capabilities = (7, 5)
    assert "7.5" in str(backend.refuses(torch.device("cpu"), [torch.bfloat16], torch.bfloat16))
