"""setmaxnreg in the words of the PTX manual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ..module import LaunchError, load
from ..standin import compile_ptx, nvcc

if not nvcc():
    pytest.skip("no nvcc", allow_module_level=True)

TOY = Path(__file__).parents[1] / "toys" / "roles.cu"


def roles(less: int = 40, more: int = 232, **mode: Any) -> torch.Tensor:
    """Change the numbers in PTX: nvcc refuses some."""
    text = compile_ptx(TOY, "sm_90a")
    for kind, before, after in (("dec", 40, less), ("inc", 232, more)):
        assert f".{kind}.sync.aligned.u32 {before};" in text
        text = text.replace(f".{kind}.sync.aligned.u32 {before};", f".{kind}.sync.aligned.u32 {after};")
    out = torch.zeros(384, dtype=torch.int32)
    load(text).kernel("roles").launch(1, 384, [out], **mode)
    return out


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
@pytest.mark.parametrize(("less", "more"), [(40, 232), (24, 240)])
def test_registers_go_from_one_warpgroup_to_others(less: int, more: int, order: Any) -> None:
    """Manual: inc "blocks execution until sufficient registers are available in the per-CTA-register pool"."""
    assert torch.equal(roles(less, more, order=order), torch.arange(384, dtype=torch.int32))


@pytest.mark.parametrize(
    ("less", "more", "why"),
    [
        (40, 240, "wait for registers"),
        (176, 232, "setmaxnreg.dec: 176 registers for a thread that has 168"),
        (40, 160, "setmaxnreg.inc: 160 registers for a thread that has 168"),
        (42, 232, "setmaxnreg: 42 registers"),
        (16, 232, "setmaxnreg: 16 registers"),
    ],
)
def test_a_fault_is_found(less: int, more: int, why: str) -> None:
    """Manual: "in the range 24 to 256 (both inclusive) and must be a multiple of 8"."""
    with pytest.raises(LaunchError, match=why):
        roles(less, more, spin_limit=10)
