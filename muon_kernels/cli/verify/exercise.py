"""Script that tools watch: a few kernels of each backend it is given, on small matrices, whose results are checked.

compute-sanitizer python -m muon_kernels.cli.verify.exercise cuda triton
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ... import backends
from ...checks import products, steps
from .correct import Here
from .workloads import TINY


def exercise(names: Sequence[str], device: str) -> None:
    """Make products of two shapes, aligned and not, and steps of one launch and of several; raise what is wrong."""
    for name in names:
        run = products.of_backend(backends.get(name))
        with torch.device(device):
            products.any_shape(run, 2, 72, 136)
            products.any_shape(run, 2, 65, 129, 2)
            products.parts_of_squares(run, 65, 16, torch.bfloat16)
        steps.steps_are_exact(Here(name, device), TINY.steps, steps=1)


if __name__ == "__main__":
    exercise(sys.argv[1:], "cuda")
    print("exercised", *sys.argv[1:])
