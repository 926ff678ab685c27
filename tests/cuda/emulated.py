"""The compiled module on the stand-in runtime: real launch code on the host, whose launches run PTX on the CPU."""

from __future__ import annotations

from muon_kernels.cli.verify.emulation import ROOT, OnTheCpu, build, running

__all__ = ["ROOT", "OnTheCpu", "build", "running"]
