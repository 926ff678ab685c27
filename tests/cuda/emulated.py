"""The compiled module on the stand-in runtime: real launch code on the host, whose launches run PTX on the CPU."""

from __future__ import annotations

from checks.step import Gpu
from ptx import standin

from muon_kernels.cli.verify.emulation import ROOT, OnTheCpu, build, running

__all__ = ["ROOT", "OnTheCpu", "build", "on", "running"]


def on(runtime: standin.Runtime) -> Gpu:
    """What tests of steps need of the stand-in runtime."""

    def replay() -> None:
        assert runtime.replay() == 0

    def launches() -> int:
        assert not runtime.failures
        return len(runtime.log)

    return Gpu("cuda", "cpu", runtime.capture, replay, launches)
