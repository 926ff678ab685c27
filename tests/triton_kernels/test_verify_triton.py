"""Stages of `python -m muon_kernels verify` with Triton's products, of a tile of their choice and of a given one."""

from __future__ import annotations

import pytest
import torch
from emulated_gpu import emulated
from places import OnTheCpu

from muon_kernels.checks import products as checks
from muon_kernels.cli.verify.correct import DTYPES, _product_cases
from muon_kernels.cli.verify.implementations import implementations
from muon_kernels.cli.verify.stage import Context, Place
from muon_kernels.cli.verify.workloads import FULL
from muon_kernels.triton_kernels import products
from muon_kernels.triton_kernels.configs import table

PLACE = Place("executor", "cpu", ("triton",))


def test_every_tile_of_the_table_is_an_implementation(on_the_cpu: OnTheCpu) -> None:
    with emulated(80, 108, None):
        all_ = list(implementations(PLACE, torch.bfloat16))
    configs = table(80).configs
    tiles = [f"triton, {c.block_m}x{c.block_n}x{c.block_k}, {c.num_warps} warps" for c in configs]
    assert [each.name for each in all_] == ["triton", *tiles]
    assert [each.square for each in all_] == [True, *(c.block_m == c.block_n for c in configs)]
    assert [each.fixed for each in all_] == [False, *[True] * len(configs)]


@pytest.mark.parametrize("symmetric", [False, True])
def test_tiles_are_those_that_are_asked_for(
    on_the_cpu: OnTheCpu, monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    """Symmetric products have square tiles: of one that is not, the choice is left to the table."""
    asked = []
    monkeypatch.setattr(products, "product", lambda *_, config=None, **__: asked.append(config))
    with emulated(80, 108, None):
        for each in implementations(PLACE, torch.bfloat16):
            if each.fixed:
                each.run(*[torch.zeros(1, 8, 8)] * 3, symmetric=symmetric)
    assert asked == [None if symmetric and c.block_m != c.block_n else c for c in table(80).configs]


def test_a_tile_has_few_checks(on_the_cpu: OnTheCpu) -> None:
    """But all of them some; what a tile does not have of its own, the choice among them has."""
    with emulated(80, 108, None):
        found = [case.name for dtype in DTYPES for _, case in _product_cases(Context(PLACE, FULL), dtype, {})]
    for c in table(80).configs:
        tile = f"triton, {c.block_m}x{c.block_n}x{c.block_k}, {c.num_warps} warps"
        assert [name.partition(": ")[2] for name in found if name.startswith(f"{tile}, bf16")] == [
            "exact, 3 of 72x136, 16 bytes",
            "exact, 2 of 77x93, 2 bytes",
            "parts of squares, 72",
        ]
        assert sum(name.startswith(f"{tile}, f16") for name in found) == 1
    assert sum(name.startswith("triton, bf16") for name in found) > 30


def test_a_tile_s_products_are_right(on_the_cpu: OnTheCpu) -> None:
    """The smallest, by all of the way from a backend's name to the launch."""
    with emulated(80, 108, None) as device:
        smallest = list(implementations(PLACE, torch.bfloat16))[-1]
        X, out = checks.placed(checks.integers(1, 17, 21), 2), checks.empty(1, 17, 17, width=2)
        checks.twice(smallest.run)(X, X, out, b_transposed=True, symmetric=True)
    assert torch.equal(out, checks.exact(X, X, True).bfloat16()) and checks.untouched(out)
    assert len(device.log) == 2
