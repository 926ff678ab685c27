"""The axes that tests run along: backends, and instruction sets of the CPU backend."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

# Threads that spin for each other stand still when something else has the core: minutes become an hour.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from muon_kernels import backends, memory
from muon_kernels.backends import cpu

# (backend, instruction set); a new backend or instruction set becomes an axis of every test by itself.
VARIANTS = [
    *[("cpu", isa) for isa in cpu.instruction_sets()],
    # tests/cuda and tests/triton_kernels run those two.
    *[(name, None) for name in backends.BACKENDS if name not in ("cpu", "cuda", "triton")],
]


def _context(variant: tuple[str, str | None]) -> AbstractContextManager[None]:
    _, isa = variant
    return cpu.forced(isa) if isa else nullcontext()


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join(str(part) for part in v if part))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, with the variant of it that is under test in force."""
    name = request.param[0]
    if reason := backends.unavailable(name):
        pytest.fail(f"backend {name} is not ready: {reason}")
    with _context(request.param):
        yield name


@pytest.fixture(scope="session", autouse=True)
def _nothing_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `tune` kept on this machine chooses nothing in tests."""
    os.environ["MUON_KERNELS_CACHE_DIR"] = str(tmp_path_factory.mktemp("kept"))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """Work is shared in every test, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workspace_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in bytes of the blocks of memory that are allocated during the test, in order."""
    blocks: list[int] = []
    empty = torch.empty

    def counting(*size: Any, **options: Any) -> torch.Tensor:
        t = empty(*size, **options)
        if t.dtype == torch.uint8:
            blocks.append(t.numel())
        return t

    # Scratch of single operations, which each thread keeps, is not counted.
    taken = lambda device, *wanted: [empty(*shape, dtype=dtype, device=device) for shape, dtype in wanted]
    monkeypatch.setattr(torch, "empty", counting)
    monkeypatch.setattr(memory, "take", taken)
    return blocks
