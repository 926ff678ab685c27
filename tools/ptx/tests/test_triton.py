"""PTX by Triton gives the right numbers, and faults planted in it are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..module import LaunchError, load, tensor_map

pytest.importorskip("triton")

from ..toys.triton_matmul import compiled

BLOCKS = {80: (64, 64, 32), 90: (128, 64, 64)}
MODES: list[dict[str, Any]] = [
    {},
    {"order": "backward", "asynchrony": "late"},
    {"order": "random", "asynchrony": "random", "seed": 1},
    {"races": True, "asynchrony": "late"},
]


def error(arch: int, tma: bool, edit: tuple[str, str, int] | None = None, **mode: Any) -> float:
    """Largest error against float64, in units of bf16's last place. `edit` replaces one occurrence in the PTX."""
    block_m, block_n, block_k = BLOCKS[arch]
    text, name, shared = compiled(tma, arch, block_m, block_n, block_k)
    if edit:
        old, new, occurrence = edit
        pieces = text.split(old)
        assert len(pieces) > occurrence + 1, f"{old} is not in the PTX"
        text = old.join(pieces[: occurrence + 1]) + new + old.join(pieces[occurrence + 1 :])
    # Enough steps in k to use every buffer more than once; ragged where the kernel allows it.
    m, n, k = (192, 112, 272) if not tma else (200, 120, 520)
    torch.manual_seed(0)
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    c = torch.full((m, n), float("nan")).bfloat16()
    if tma:
        b = b.T.contiguous()
        boxes = [(a, [block_m, block_k]), (b, [block_n, block_k]), (c, [block_m, block_n])]
        args = [x for t, box in boxes for x in (tensor_map(t, box), *t.shape, *t.stride())] + [m, n, k, 0, 0]
        want = a.double() @ b.double().T
    else:
        args = [a, b, c, m, n, k, k, n, n, 0, 0]
        want = a.double() @ b.double()
    grid = -(-m // block_m) * -(-n // block_n)
    load(text).kernel(name).launch(grid, 128, args, shared, memory=[a, b, c], **mode)
    return float(((c.double() - want).abs() / want.abs().clamp(min=1)).nan_to_num(nan=float("inf")).max() * 256)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(("arch", "tma"), [(80, False), (90, False), (90, True)], ids=["sm80", "sm90", "sm90-tma"])
def test_matmul(arch: int, tma: bool, mode: dict[str, Any]) -> None:
    assert error(arch, tma, **mode) <= 1.05


FAULTS = {
    "no wait for a copy": (80, False, ("cp.async.wait_group \t2;", "cp.async.wait_group \t5;", 0)),
    "no barrier": (80, False, ("bar.sync \t0;", "", 0)),
    "wrong fragment": (80, False, ("ldmatrix.sync.aligned.m8n8.x4.trans.", "ldmatrix.sync.aligned.m8n8.x4.", 0)),
    "no fence of the proxy": (90, False, ("fence.proxy.async.shared::cta;", "", 0)),
    "no fence of the proxy before a bulk store": (90, True, ("fence.proxy.async.shared::cta;", "", 0)),
    "no wait for wgmma": (90, True, ("wgmma.wait_group.sync.aligned 0;", "", 0)),
    "lazy wait for wgmma": (90, True, ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;", 0)),
    "not transposed": (90, False, (", 1, 1, 0, 1;", ", 1, 1, 0, 0;", 0)),
    "too few bytes expected": (90, True, ("_, [%r5], 24576;", "_, [%r5], 16384;", 0)),
    "too many bytes expected": (90, True, ("_, [%r5], 24576;", "_, [%r5], 32768;", 0)),
    "wrong parity": (90, True, ("mbarrier.try_wait.parity.shared::cta.b64 complete, [%r38], %r130;",
                                "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r38], 1;", 0)),
    "no wait for an mbarrier": (90, True, ("@!complete bra.uni waitLoop;", "", 0)),
}  # fmt: skip


def found(arch: int, tma: bool, edit: tuple[str, str, int]) -> str:
    for mode in MODES[::-1]:
        try:
            if not error(arch, tma, edit, **mode) <= 1.05:
                return f"numbers with {mode}"
        except LaunchError as fault:
            return str(fault)
    return ""


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str) -> None:
    assert found(*FAULTS[name])
