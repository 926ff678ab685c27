"""Other threads of Python run while a launch does: on a GPU it waits where the stream is full, here it runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks.threads import VERBS, Operands, runs_meanwhile
from ptx import standin
from test_end_to_end import needs_nvcc

from muon_kernels.backends import cuda


@needs_nvcc
@pytest.mark.parametrize("verb", VERBS)
def test_others_run_while_a_verb_does(emulated: standin.Runtime, verb: str) -> None:
    _C, m, n = cuda._device.module(), 16, 64
    of, dtype = Operands(_C, m, n), _C.DType.bf16
    partial = torch.empty(_C.cuda.momentum_partials(of.momentum), dtype=torch.float64)
    calls: dict[str, Callable[[], None]] = {
        "products": lambda: _C.cuda.products(of.products, dtype, 0),
        "momentum_update": lambda: _C.cuda.momentum_update(of.momentum, dtype, partial.data_ptr(), 0),
        "apply_update": lambda: _C.cuda.apply_update(of.apply, of.options, dtype, 0),
        "fused_step": lambda: _C.cuda.fused_step(
            1, m, n, of.momentum, of.apply, [1.5, -0.5, 0.0], 2, 1, 0, of.options, 0
        ),
    }
    calls[verb]()  # the first time, the stand-in runtime runs Python to build the kernel
    assert runs_meanwhile(calls[verb])
