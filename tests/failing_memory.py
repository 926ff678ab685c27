"""Steps in which the k-th tensor finds no memory, for every k.

`python failing_memory.py LIBRARY`, which is failing_memory.c and has to be preloaded, prints what should not be: a step
that raises and has written, or one that does not raise, or one after it that is not as if nothing had been.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from garbling import snapshot
from torch import nn
from torch.optim import Optimizer

from muon_kernels import Muon, MuonAdamW, SpectralMomentum, backends, memory, split
from muon_kernels.backends import eager_products

BF16 = torch.bfloat16
SHAPES = [(24, 16), (16, 24), (2, 16, 20), (8, 4, 3, 3), (24, 16)]


def _params(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    made.append(nn.Parameter(torch.randn(3, 8, 10, generator=generator).to(dtype)[:, ::2, 1::3]))
    return made


def _muon(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[str], Optimizer]:
    def make(backend: str) -> Optimizer:
        params = _params(dtype)
        return Muon([{"params": params[:3]}, {"params": params[3:]}], backend=backend, **options)

    return make


def _both(backend: str) -> Optimizer:
    vectors = [nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(5, 3))]
    groups = [{"params": _params(torch.float32), "use_muon": True}, {"params": vectors, "use_muon": False}]
    return MuonAdamW(groups, muon_options={"backend": backend})


OPTIMIZERS: dict[str, Callable[[str], Optimizer]] = {
    "plain": _muon(),
    "several passes": _muon(max_workspace_bytes=8000),
    "bf16": _muon(BF16, momentum_dtype=torch.float32, nesterov=False, dampened=False),
    "gram": _muon(BF16, ns_algorithm="gram", ns_coefficients="polar_express"),
    "int8": _muon(momentum_dtype=torch.int8),
    "masters": _muon(BF16, master_weights=True, momentum_dtype=torch.int8),
    "neuron": _muon(second_moment="neuron", cautious=True),
    "element, signs": _muon(BF16, second_moment="element", sign_momentum=True),
    "stochastic": _muon(BF16, stochastic_rounding=True, cautious=True, momentum_dtype=torch.float32),
    "stochastic, element": _muon(BF16, stochastic_rounding=True, second_moment="element"),
    "maximize": _muon(maximize=True, split=split.equal(2)),
    "power 1": _muon(power=1.0, maximize=True),
    "power 1, bf16": _muon(BF16, power=1.0, dampened=False, momentum_dtype=torch.float32),
    "power 1/4": _muon(power=0.25),
    "SpectralMomentum": lambda backend: SpectralMomentum(_params(torch.float32), power=0.5, backend=backend),
    "MuonAdamW": _both,
}


def _elsewhere(step: Callable[[], object]) -> None:
    """Run a step in a thread of its own, which has kept no memory, though its number may be one that has been."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(step).result()


class History(NamedTuple):
    """What was before the step: how many, in which the last `missing` parameters had no gradients, and who runs all."""

    steps: int
    missing: int
    run: Callable[[Callable[[], object]], object]


HISTORIES = {
    "at first": History(0, 0, lambda step: step()),
    "after steps of fewer parameters": History(2, 3, lambda step: step()),
    "in other threads": History(2, 0, _elsewhere),
}


def _backward(optimizer: Optimizer, step: int, last: int) -> None:
    """Gradients of all parameters but the `last`."""
    generator = torch.Generator().manual_seed(step)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = grad if i < len(params) - last else None


def attempt(library: Any, make: Callable[[], Optimizer], history: History) -> tuple[int, list[str]]:
    """How many k there are, and what is wrong for some."""

    def ready() -> Optimizer:
        memory._kept.block = None  # as in a process that has not stepped yet
        optimizer = make()
        for step in range(history.steps):
            _backward(optimizer, step, history.missing)
            history.run(optimizer.step)
        _backward(optimizer, 9, last=0)
        return optimizer

    optimizer = ready()
    library.failing_memory_begin(-1)
    history.run(optimizer.step)
    count = library.failing_memory_end()
    expected, wrong = snapshot(optimizer), []
    for k in range(count):
        optimizer = ready()
        before = snapshot(optimizer)
        raised: Exception | None = None
        library.failing_memory_begin(k)
        try:
            history.run(optimizer.step)
        except (RuntimeError, MemoryError) as error:
            raised = error
        library.failing_memory_end()
        if raised is None:
            wrong.append(f"{k} of {count}: does not raise")
            continue
        if snapshot(optimizer) != before:
            wrong.append(f"{k} of {count}: has written")
        history.run(optimizer.step)
        if snapshot(optimizer) != expected:
            wrong.append(f"{k} of {count}: the next step is another")
    return count, wrong


def main(path: str) -> int:
    """Print what is wrong and how many were tried; return how many are wrong."""
    torch.set_num_threads(1)
    library = ctypes.CDLL(path)
    library.failing_memory_begin.argtypes = [ctypes.c_long]
    library.failing_memory_end.restype = ctypes.c_long
    # oneDNN's 16-bit product asks for memory of its own every time.
    eager_products.emulates = lambda device_type, dtype: True
    tried, failed = 0, 0
    for backend, name, (when, history) in product(("cpu", "eager"), OPTIMIZERS, HISTORIES.items()):
        if backends.unavailable(backend):
            continue
        count, wrong = attempt(library, partial(OPTIMIZERS[name], backend), history)
        tried, failed = tried + count, failed + len(wrong)
        for sentence in wrong:
            print(f"{backend}, {name}, {when}, {sentence}")
    print(f"{tried} tried, {failed} wrong")
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
