"""Whether threads of Python run side by side, and what the compiled module's verbs are called with."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from threading import Thread
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from muon_kernels.backends import native
from muon_kernels.layout import Matrices, layout
from muon_kernels.newton_schulz import Square
from muon_kernels.verbs import ApplyOptions, ApplyUpdate, MomentumUpdate

VERBS = ["products", "momentum_update", "apply_update", "fused_step"]


class Operands:
    """csrc's arguments of all verbs, for one matrix, and what must live as long."""

    def __init__(self, _C: ModuleType, m: int, n: int) -> None:
        G, B, P = torch.randn(3, 1, m, n).unbind()
        X, R, scale = torch.randn(1, m, n).bfloat16(), torch.empty(1, m, m).bfloat16(), torch.empty(1)
        queue = native.Queue(lambda products, operands: None)
        with queue.collect() as (self.products, squares):
            queue.product(_C, Square(X), Square(X), Square(R), transposed=True, symmetric=True)
        momentum = MomentumUpdate([_seen(G)], [_seen(B)], X, 0.9, True, True, 1.0, 1e-7, 1.0)
        self.momentum, grads = native.momentum_update(_C, momentum, scale)
        self.apply, params = native.apply_update(_C, ApplyUpdate([_seen(P)], X, 0.1, 0.1, [1.0]), X, 0.1, 0.1)
        self.options: Any = native.apply_options(_C, ApplyOptions())[0]
        self._alive = G, B, P, scale, squares, grads, params


def _seen(t: Tensor) -> Matrices:
    at = layout(t.shape, t.stride(), None, ())
    assert at is not None
    return Matrices(t, at)


def runs_meanwhile(verb: Callable[[], object], patience: float = 5.0) -> bool:
    """Whether another thread of Python ever runs while `verb` does, which is called again and again until then."""
    ran, over = 0, False

    def count() -> None:
        nonlocal ran
        while not over:
            ran += 1
            time.sleep(0)  # lets others run

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60.0)  # nobody is made to: that `verb` gives way must be its own doing
    other = Thread(target=count)
    other.start()
    try:
        end = time.monotonic() + patience
        while time.monotonic() < end:
            before = ran
            verb()
            if ran > before:
                return True
        return False
    finally:
        over = True
        other.join()
        sys.setswitchinterval(interval)
