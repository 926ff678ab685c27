"""Calls momentum_update and apply_update of the module built on the stand-in runtime, with torch tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from checks.elementwise import RULES, Implementation, MomentumOptions, Rates, wide
from ptx.standin import Runtime
from torch import Tensor

from muon_kernels.backends import native
from muon_kernels.verbs import ApplyOptions

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _refs(tensors: Sequence[Tensor]) -> array[int]:
    refs = array("q")
    for t in map(wide, tensors):
        batch, step = (t.shape[0], t.stride(0) * t.element_size()) if t.ndim == 3 else (1, 0)
        for i in range(batch):
            refs.extend((t.data_ptr() + i * step, *t.stride()[-2:]))
    return refs


def _address(a: array[Any]) -> int:
    return int(a.buffer_info()[0])


class Verbs(Implementation):
    """The two verbs of one build; everything that they may touch is registered for as long as a call takes."""

    def __init__(self, module: ModuleType, runtime: Runtime) -> None:
        self.module, self.runtime = module, runtime

    def options(self, **options: Any) -> AbstractContextManager[Any]:
        """How the executor runs what is launched inside."""
        return self.runtime.options(**options)

    def grids(self) -> list[tuple[int, ...]]:
        return [launch.grid for launch in self.runtime.log]

    def rules(self, *dtypes: torch.dtype) -> Sequence[tuple[bool, bool, float]]:
        """All: a flag costs no compilation."""
        return RULES

    def dtype(self, t: Tensor) -> Any:
        return getattr(self.module.DType, DTYPES[t.dtype])

    def _run(self, memory: Sequence[Tensor | None], verb: Any, *args: Any) -> None:
        self.runtime.forget_memory()
        self.runtime.register(*(t for t in memory if t is not None and t.numel()), guard=True)
        try:
            verb(*args)
        except RuntimeError as error:
            raise (self.runtime.failures or [error])[0] from error
        assert not any(launch.warnings for launch in self.runtime.log)

    def _momentum_update(
        self, grads: Sequence[Tensor], momenta: Sequence[Tensor] | None, X: Tensor, options: MomentumOptions
    ) -> Tensor:
        m = self.module
        # Neither has an initial value, and both have a sentinel behind them.
        scale = torch.full((X.shape[0] + 1,), torch.nan)
        refs, buffers = _refs(grads), _refs(momenta or [])
        kind = self.dtype(grads[0]) if grads else m.DType.f32
        update = m.MomentumUpdate(
            _address(refs),
            kind,
            _address(buffers) if momenta else 0,
            self.dtype(momenta[0]) if momenta else kind,
            (X.data_ptr(), *X.shape, X.stride(0), X.stride(1)),
            scale.data_ptr(),
            0 if options.norms is None else options.norms.data_ptr(),
            options.eps,
            options.margin,
            options.grad_scale,
            options.mu,
            options.nesterov,
            options.dampened,
        )
        partial = torch.full((m.cuda.momentum_partials(update),), torch.nan, dtype=torch.float64)
        memory = [*grads, *(momenta or []), X, scale[:-1], partial, options.norms]
        self._run(memory, m.cuda.momentum_update, update, self.dtype(X), partial.data_ptr(), 0)
        return scale[:-1]

    def _apply_update(
        self, params: Sequence[Tensor], X: Tensor, rates: Rates, ratios: Sequence[float], options: ApplyOptions
    ) -> None:
        m = self.module
        refs, factors = _refs(params), array("d", ratios)
        on_device = [v if isinstance(v, Tensor) else None for v in rates]
        numbers = [0.0 if isinstance(v, Tensor) else v for v in rates]
        given, _numbers = native.apply_options(m, options, *map(native.pointer, on_device))
        stack = (X.data_ptr(), *X.shape, X.stride(0), X.stride(1))
        update = m.ApplyUpdate(
            _address(refs), self.dtype(params[0]) if params else m.DType.f32, stack, *numbers, _address(factors)
        )
        self._run([*params, X, *on_device], m.cuda.apply_update, update, given, self.dtype(X), 0)
