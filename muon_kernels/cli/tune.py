"""Measure which tiles products are fastest in on this machine's GPU, for the Triton kernels.

The table is kept in MUON_KERNELS_CACHE_DIR, or else in muon_kernels below XDG_CACHE_HOME or ~/.cache, and later
processes read it. Without it, a table by architecture is used that was counted, not measured. A step measures nothing.
"""

from __future__ import annotations

import argparse
import sys

import torch

from .. import backends, kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options."""


def run(args: argparse.Namespace) -> int:
    """Measure and keep a table; return 0, or 1 where that cannot be done."""
    reason = backends.unavailable("triton")
    if reason is None:
        device = torch.accelerator.current_accelerator() or torch.device("cuda")
        reason = backends.get("triton").refuses(device, [torch.bfloat16], torch.bfloat16)
    if reason is not None:
        print(f"nothing can be measured: {reason}", file=sys.stderr)
        return 1
    try:
        _measure()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _measure() -> None:
    from triton.testing import do_bench

    from ..triton_kernels import measured, tuning

    name = measured.name_of_gpu()
    file = measured.file_of(name)
    kept.writable(file)
    print(name)
    for what, tflops, table in tuning.measure(lambda call: float(do_bench(call, return_mode="median"))):
        if table is None:
            print(f"  {what:24}{tflops:8.1f} TFLOP/s", flush=True)
        else:
            measured.save(file, table)
            print(f"kept in {file}")
