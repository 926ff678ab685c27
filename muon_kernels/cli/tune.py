"""Measure which products are fastest on this machine's GPU, and keep that for later processes.

It first measures which tiles the Triton kernels are fastest in. Where a GPU has several kinds of products, triton's and
those of csrc/cuda by wgmma and by mma.sync, it then measures which of them is fastest from how many rows on.

Both are kept in MUON_KERNELS_CACHE_DIR, or else in muon_kernels below XDG_CACHE_HOME or ~/.cache. Without the first, a
table by architecture is used that was counted, not measured; without the second, what is expected to be faster runs. A
step measures nothing.
"""

from __future__ import annotations

import argparse
import sys

import torch

from .. import backends, kept

_ROUNDS = 7  # of what is timed in turns
_RUNS = 4  # of a graph: launches cost the host different times, which a step's queue hides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options."""


def run(args: argparse.Namespace) -> int:
    """Measure and keep what can be measured; return 0, or 1 where that cannot be done."""
    device = torch.accelerator.current_accelerator() or torch.device("cuda")
    reason = _reason("triton", device)
    several = _kinds_to_compare(device)
    if reason is not None and not several:
        print(f"nothing can be measured: {reason}", file=sys.stderr)
        return 1
    try:
        if reason is None:
            _measure_tiles()
        if several:
            _measure_kinds(device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _reason(name: str, device: torch.device) -> str | None:
    """Return why a backend cannot run here; None if it can."""
    backend = backends.get(name)
    return backend.unavailable() or backend.refuses(device, [torch.bfloat16], torch.bfloat16)


def _kinds_to_compare(device: torch.device) -> bool:
    """Return whether there are kinds of products to compare."""
    from ..backends import cuda

    return _reason("cuda", device) is None and len(cuda.kinds_there(device)) > 1


def _measure_tiles() -> None:
    from triton.testing import do_bench

    from ..triton_kernels import measured, products, tuning

    name = measured.name_of_gpu()
    file = measured.file_of(name)
    kept.writable(file)
    print(f"tiles of triton's products on {name}")
    for what, tflops, table in tuning.measure(lambda call: float(do_bench(call, return_mode="median"))):
        if table is None:
            _show(what, tflops)
        else:
            measured.save(file, table)
            products.forget_choices()  # the new table's are needed, when kinds of products are compared
            print(f"kept in {file}")


def _measure_kinds(device: torch.device) -> None:
    from ..backends import cuda, kinds, tuning
    from .verify.timing import repeated, turns

    def seconds(runs: tuning.Runs) -> dict[str, list[float]]:
        graphs = {kind: repeated(run, _RUNS, device.type) for kind, run in runs.items()}
        taken = turns(graphs, device.type, _ROUNDS)
        return {kind: [s / _RUNS for s in each] for kind, each in taken.items()}

    file = cuda.rankings_file(device)
    kept.writable(file)
    print("kinds of products, by a step of the iteration")
    try:
        for what, tflops, rankings in tuning.measure(seconds, device):
            if rankings is None:
                _show(what, tflops)
                continue
            kinds.save(file, rankings)
            for ranking in rankings:
                print(f"  {ranking}, the fastest first")
            print(f"kept in {file}")
    except tuning.DifferentResults:
        file.unlink(missing_ok=True)  # it may rank first what has just been found wrong
        raise


def _show(what: str, tflops: float) -> None:
    print(f"  {what:32}{tflops:8.1f} TFLOP/s", flush=True)
