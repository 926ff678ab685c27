"""Calls momentum_update and apply_update of muon_kernels.triton_kernels with torch tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from checks.elementwise import RULES, Implementation, MomentumOptions, Rates
from emulated_gpu import Device, Ran, emulated
from torch import Tensor

from muon_kernels.layout import Matrices, layout
from muon_kernels.triton_kernels import configs, elementwise
from muon_kernels.verbs import ApplyOptions, ApplyUpdate, MomentumUpdate


def matrices(tensors: Sequence[Tensor]) -> list[Matrices]:
    """Describe tensors as step/operands.py does."""
    found = []
    for t in tensors:
        at = layout(t.shape, t.stride(), None, ())
        assert at
        found.append(Matrices(t, at))
    return found


def device_at(place: int, memory: Sequence[Tensor], **options: Any) -> AbstractContextManager[Device]:
    """Launches inside run there, see conftest.py; what they reach by addresses is `memory` and no more."""
    return emulated(place, memory=memory, guard=True, **options) if place else nullcontext(Device(0))


class Verbs(Implementation):
    """The two verbs, launched at one place. `log`: the launches since the last `options`."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.log: list[Ran] = []
        self.compiled: list[Any] = []
        self._options: dict[str, Any] = {}

    @contextmanager
    def options(self, **options: Any) -> Iterator[None]:
        self._options, self.log = options, []
        try:
            yield
        finally:
            self._options = {}

    def grids(self) -> list[tuple[int, ...]]:
        return [ran.grid for ran in self.log]

    def rules(self, *dtypes: torch.dtype) -> Sequence[tuple[bool, bool, float]]:
        """Each pair of flags is a compilation."""
        plain = dtypes[:2] == (torch.float32, torch.float32)
        return RULES if not self.place or (plain and self.place == 80) else [(True, True, 0.9), (False, False, 0.9)]

    @contextmanager
    def _running(self, memory: Sequence[Tensor | None]) -> Iterator[None]:
        with device_at(self.place, [t for t in memory if t is not None], **self._options) as device:
            yield
        assert not device.warnings()
        self.log += device.log
        self.compiled += device.compiled

    def _momentum_update(
        self, grads: Sequence[Tensor], momenta: Sequence[Tensor] | None, X: Tensor, options: MomentumOptions
    ) -> Tensor:
        # Neither has an initial value, and there are sentinels around both.
        size = len(X) * configs.scratch_bytes(*X.shape[1:])
        block = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
        scratch = block[32:-32]
        with self._running([*grads, *(momenta or ()), X, scratch, options.norms]):
            momentum = None if momenta is None else matrices(momenta)
            *rule, norms = options
            scale = elementwise.momentum_update(MomentumUpdate(matrices(grads), momentum, X, *rule, scratch, norms))
        assert (block[:32] == 0xFF).all() and (block[-32:] == 0xFF).all(), "written outside scratch"
        return scale

    def _apply_update(
        self, params: Sequence[Tensor], X: Tensor, rates: Rates, ratios: Sequence[float], options: ApplyOptions
    ) -> None:
        with self._running([*params, X, *(v for v in rates if isinstance(v, Tensor))]):
            elementwise.apply_update(ApplyUpdate(matrices(params), X, *rates, ratios), options)
