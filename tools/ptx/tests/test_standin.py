"""Real host code runs on the stand-in runtime: launches, limits, queries and errors, through pybind11 bindings."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from ..standin import Runtime, build, nvcc

pytest.importorskip("pybind11")
if not nvcc():
    pytest.skip("no nvcc", allow_module_level=True)

TOYS = Path(__file__).parents[1] / "toys"
SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION, OUT_OF_RESOURCES, LAUNCH_FAILURE = 0, 1, 9, 701, 719
CAPTURE_UNSUPPORTED = 900


@pytest.fixture(scope="module")
def toy() -> tuple[ModuleType, Runtime]:
    module, runtime = build("toy_launches", [TOYS / "launches.cu"], TOYS / "launches_bindings.cpp")
    assert module
    return module, runtime


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_launches(toy: tuple[ModuleType, Runtime], order: str) -> None:
    module, runtime = toy
    x, y = torch.randn(300), torch.full((300,), float("nan"))
    runtime.forget_memory()
    runtime.register(x, y)
    with runtime.options(order=order, races=order == "random"):  # type: ignore[arg-type]
        assert module.run(y.data_ptr(), x.data_ptr(), 2.0, 300, 512, 0) == SUCCESS
        torch.testing.assert_close(y, 6 + 4 * x)
        log = runtime.log
    assert [("fill" in e.kernel, e.grid, e.block, e.shared_bytes, e.error) for e in log] == [
        (True, (3, 1, 1), (128, 1, 1), 0, 0),
        (False, (3, 1, 1), (128, 1, 1), 512, 0),
        (False, (3, 1, 1), (128, 1, 1), 512, 0),
    ]


def test_some_blocks_of_a_grid(toy: tuple[ModuleType, Runtime]) -> None:
    module, runtime = toy
    x, y = torch.randn(300), torch.full((300,), float("nan"))
    runtime.forget_memory()
    runtime.register(x, y)
    with runtime.options(blocks=[0, 2]):
        assert module.run(y.data_ptr(), x.data_ptr(), 2.0, 300, 512, 0) == SUCCESS
        assert {launch.grid for launch in runtime.log} == {(3, 1, 1)}
    torch.testing.assert_close(y[:128], 6 + 4 * x[:128])
    torch.testing.assert_close(y[256:], 6 + 4 * x[256:])
    assert y[128:256].isnan().all()
    with runtime.options():
        assert module.run(y.data_ptr(), x.data_ptr(), 2.0, 300, 512, 0) == SUCCESS
    assert y.isfinite().all()


def test_an_error_is_kept_until_somebody_asks(toy: tuple[ModuleType, Runtime]) -> None:
    """As with CUDA, the error of a call whose result is ignored is returned by a later launch that succeeded."""
    module, runtime = toy
    x, y = torch.randn(300), torch.zeros(300)
    runtime.register(x, y)
    with runtime.options():
        runtime.fail_next(OUT_OF_RESOURCES, "cudaFuncSetAttribute")
        assert module.run(y.data_ptr(), x.data_ptr(), 1.0, 300, 512, 1024) == OUT_OF_RESOURCES
        assert [launch.error for launch in runtime.log] == [SUCCESS, SUCCESS] and y.any()
        assert runtime.last_error == SUCCESS
        assert module.run(y.data_ptr(), x.data_ptr(), 1.0, 300, 512, 1024) == SUCCESS


def test_limits(toy: tuple[ModuleType, Runtime]) -> None:
    module, runtime = toy
    x, y = torch.randn(300), torch.zeros(300)
    runtime.register(x, y)
    run = lambda shared, opt_in: module.run(y.data_ptr(), x.data_ptr(), 1.0, 300, shared, opt_in)
    with runtime.options():
        assert run(50 << 10, 0) == INVALID_VALUE  # above 48 KiB without the attribute
        assert run(50 << 10, 164 << 10) == INVALID_VALUE  # an attribute that no sm_80 can grant
        assert run(50 << 10, 60 << 10) == SUCCESS
        assert [module.run_small(y.data_ptr(), n) for n in (64, 128, 2048)] == [
            SUCCESS,
            OUT_OF_RESOURCES,
            INVALID_CONFIGURATION,
        ]
    runtime.pretend(9)
    try:
        assert (module.multiprocessors(), runtime.device.shared_optin) == (132, 232448)
    finally:
        runtime.pretend(8)


def test_symbols(toy: tuple[ModuleType, Runtime]) -> None:
    module, runtime = toy
    x, y = torch.zeros(300), torch.zeros(300)
    runtime.register(x, y)
    with runtime.options():
        assert module.set_scale(5.0) == SUCCESS
        assert module.run(y.data_ptr(), x.data_ptr(), 1.0, 300, 512, 0) == SUCCESS
        assert y.eq(15).all()
        module.set_scale(2.0)


def test_a_fault_is_an_error_code_and_a_report(toy: tuple[ModuleType, Runtime]) -> None:
    module, runtime = toy
    x, y = torch.zeros(300), torch.zeros(300)
    runtime.forget_memory()
    runtime.register(x, y, guard=True)
    with runtime.options():
        assert module.run(y.data_ptr(), x.data_ptr(), 1.0, 301, 512, 0) == LAUNCH_FAILURE
        assert "write of 4 bytes outside every allocation" in runtime.failures[0].why
        assert runtime.failures[0].location and runtime.failures[0].location.file.endswith("launches.cu")
    runtime.forget_memory()
    x, y = torch.zeros(300), torch.zeros(300)
    with runtime.options(any_memory=True):
        assert module.run(y.data_ptr(), x.data_ptr(), 1.0, 300, 512, 0) == SUCCESS


def test_profiles(toy: tuple[ModuleType, Runtime]) -> None:
    module, runtime = toy
    x, y = torch.zeros(256), torch.zeros(256)
    runtime.register(x, y)
    with runtime.options(profile=True):
        module.run(y.data_ptr(), x.data_ptr(), 1.0, 256, 512, 0)
        profiles = {("fill" in name): p for name, p in runtime.profiles.items()}
    assert profiles[True].total("bytes", lambda row: row.op.startswith("st.global")) == 4 * 256
    assert profiles[False].total("threads", lambda row: row.op.startswith("st.global")) == 2 * 256


def test_capture(toy: tuple[ModuleType, Runtime]) -> None:
    """Captured launches run when replayed, with their first parameters; a call that waits spoils the capture."""
    module, runtime = toy
    x, y = torch.randn(300), torch.zeros(300)
    runtime.forget_memory()
    runtime.register(x, y)
    with runtime.options():
        with runtime.capture():
            assert module.run(y.data_ptr(), x.data_ptr(), 2.0, 300, 512, 0) == SUCCESS
        assert not y.any() and not runtime.log
        x.mul_(3)
        for _ in range(2):
            y.fill_(float("nan"))
            assert runtime.replay() == SUCCESS
            torch.testing.assert_close(y, 6 + 4 * x)
        with runtime.capture():
            assert module.run(y.data_ptr(), x.data_ptr(), 2.0, 300, 512, 0) == SUCCESS
            assert module.set_scale(1.0) == CAPTURE_UNSUPPORTED  # a copy that waits
        y.zero_()
        assert runtime.replay() != SUCCESS and not y.any()
        runtime.fail_next(LAUNCH_FAILURE)
        assert module.run_small(y.data_ptr(), 64) == LAUNCH_FAILURE
        assert not y.any() and module.run_small(y.data_ptr(), 64) == SUCCESS and y.any()
