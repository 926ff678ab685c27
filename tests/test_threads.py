"""Several threads of Python: others run while a verb of the CPU does, and optimizers may be stepped side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checks import needs
from checks.threads import VERBS, Operands, runs_meanwhile
from torch import Tensor, nn

from muon_kernels import Muon, orthogonalize
from muon_kernels.backends import cpu, native


def test_who_holds_the_interpreter_is_found_out() -> None:
    assert not runs_meanwhile(lambda: sum(range(1000)), patience=0.2)
    assert runs_meanwhile(lambda: time.sleep(1e-4))


@needs.cpu_kernels
@pytest.mark.parametrize("verb", VERBS)
def test_others_run_while_a_verb_does(verb: str) -> None:
    _C = native.required()
    where = getattr(_C.cpu.Isa, cpu.instruction_sets()[0]), 1
    of = Operands(_C, 256, 2048)
    calls: dict[str, Callable[[], None]] = {
        "products": lambda: _C.cpu.products(*where, of.products),
        "momentum_update": lambda: _C.cpu.momentum_update(*where, of.momentum),
        "apply_update": lambda: _C.cpu.apply_update(*where, of.apply, of.options),
        "fused_step": lambda: _C.cpu.fused_step(*where, 1, of.momentum, of.products, of.apply, of.options),
    }
    assert runs_meanwhile(calls[verb])


def test_optimizers_are_stepped_side_by_side(backend: str) -> None:
    """And functions called: the same bits as one after the other. Fused and not, in chunks, with momenta of 8 bits."""

    def work(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(*shape, generator=generator)
        params = [nn.Parameter(make(*shape)) for shape in ((9, 24, 40), (70, 30), (33, 65))]
        muon = Muon([{"params": params[:2]}, {"params": params[2:], "momentum_dtype": torch.int8}], backend=backend)
        for _ in range(4):
            for p in params:
                p.grad = make(*p.shape)
            muon.step()
        return [*(p.detach() for p in params), orthogonalize(make(5, 30, 50), backend=backend)]

    with ThreadPoolExecutor(1) as pool:
        expected = list(pool.map(work, range(4)))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    for one, other in zip(expected, results, strict=True):
        assert all(map(torch.equal, one, other))
