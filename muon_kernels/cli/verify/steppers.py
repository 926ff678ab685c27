"""Steps that ours are compared with: torch's, eager and compiled, a batched loop, and peers that can be imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ...optimizers.muon import Muon
from ..ledger import batched_loop
from .workloads import Shapes

Step = Callable[[], object]
Maker = Callable[[list[nn.Parameter]], Step]
TORCH, COMPILED, BATCHED = "torch.optim.Muon", "torch.optim.Muon, compiled", "batched loop, compiled"
# A compiled step of more matrices takes minutes to compile; then the iteration alone is compiled, once for each shape.
_WHOLE = 16


def parameters(shapes: Shapes, device: str = "cpu") -> list[nn.Parameter]:
    """Return parameters of these shapes with gradients, random, in fp32."""
    params = []
    for rows, cols, count in shapes:
        for _ in range(count):
            p = nn.Parameter(torch.randn(rows, cols, device=device) * 0.02)
            p.grad = torch.randn(rows, cols, device=device)
            params.append(p)
    return params


def _torchs(params: list[nn.Parameter]) -> Step:
    step: Step = torch.optim.Muon(params).step
    return step


def compiled_muon(params: list[nn.Parameter], compiler: str = "inductor") -> Step:
    """Return torch.optim.Muon's step, compiled: whole, or its iteration where there are many matrices."""
    optimizer: Any = torch.optim.Muon(params)
    if len(params) <= _WHOLE:
        whole: Step = torch.compile(optimizer.step, dynamic=False, backend=compiler)
        return whole
    from torch.optim import _muon

    eager = _muon._zeropower_via_newtonschulz
    iteration = torch.compile(eager, dynamic=False, backend=compiler)

    def step() -> None:
        _muon._zeropower_via_newtonschulz = iteration
        try:
            optimizer.step()
        finally:
            _muon._zeropower_via_newtonschulz = eager

    return step


def compiled_batched(params: list[nn.Parameter], compiler: str = "inductor") -> Step:
    """Return the bf16 loop over stacks of equal shapes, compiled: the fairest rival without kernels of its own."""
    step: Step = torch.compile(batched_loop(params), dynamic=False, backend=compiler)
    return step


def rivals(compiler: str = "inductor") -> dict[str, Maker]:
    """Return the steps of others by name: torch's, and those of peers that can be imported."""
    makers: dict[str, Maker] = {
        TORCH: _torchs,
        COMPILED: partial(compiled_muon, compiler=compiler),
        BATCHED: partial(compiled_batched, compiler=compiler),
    }
    return makers | {name: make for name, (module, make) in PEERS.items() if find_spec(module) is not None}


def own(backends_: Sequence[str]) -> dict[str, Maker]:
    """Return our steps by backend."""
    return {name: partial(_own, backend=name) for name in backends_}


def _own(params: list[nn.Parameter], backend: str) -> Step:
    return Muon(params, backend=backend).step


def _dion(params: list[nn.Parameter]) -> Step:
    module: Any = importlib.import_module("dion")
    step: Step = module.Muon(params, lr=1e-3, mu=0.95, nesterov=True, use_triton=True).step
    return step


def _gram(params: list[nn.Parameter]) -> Step:
    module: Any = importlib.import_module("gram_newton_schulz")
    step: Step = module.Muon(params, lr=1e-3, momentum=0.95, nesterov=True, ns_use_kernels=True).step
    return step


# By name: the module that is looked for, and what makes the step, by the signatures of their READMEs. A peer that
# raises has a row that says so.
PEERS: dict[str, tuple[str, Maker]] = {
    "dion": ("dion", _dion),
    "gram-newton-schulz": ("gram_newton_schulz", _gram),
}
