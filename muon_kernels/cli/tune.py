"""Measure which tiles products are fastest in on this machine's GPU, for the Triton kernels.

The table is kept in MUON_KERNELS_CACHE_DIR, or else in muon_kernels below XDG_CACHE_HOME or ~/.cache, and later
processes read it. Without it a table is used that was counted, not measured, by architecture; a step measures nothing.
"""

from __future__ import annotations

import argparse
import sys

from .. import backends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: there is nothing to choose."""


def run(args: argparse.Namespace) -> int:
    """Measure and keep a table; return 0, or 1 where that cannot be done."""
    if reason := backends.unavailable("triton"):
        print(f"nothing can be measured: {reason}", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    from ..triton_kernels import measured, tuning

    name = measured.name_of_gpu()
    file = measured.file_of(name)
    try:
        measured.writable(file)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(name)
    for what, tflops, table in tuning.measure(lambda call: float(do_bench(call, return_mode="median"))):
        if table is None:
            print(f"  {what:24}{tflops:8.1f} TFLOP/s", flush=True)
        else:
            measured.save(file, table)
            print(f"kept in {file}")
    return 0
