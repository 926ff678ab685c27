"""Clusters, in the words of the PTX manual: ranks, barrier.cluster, mapa, remote arrivals and multicast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ..module import LaunchableKernel, LaunchError, load
from ..parser import PtxError
from ..standin import compile_ptx, nvcc

if not nvcc():
    pytest.skip("no nvcc", allow_module_level=True)

TOYS = Path(__file__).parents[1] / "toys"
MODES: list[dict[str, Any]] = [
    {},
    {"order": "backward", "asynchrony": "late"},
    {"order": "random", "asynchrony": "random", "seed": 3},
    {"order": "random", "asynchrony": "late", "seed": 5, "resident": 4},
    {"races": True, "asynchrony": "late", "order": "random"},
]
modes = pytest.mark.parametrize("mode", MODES, ids=str)


def toy(name: str, *flags: str) -> LaunchableKernel:
    return load(compile_ptx(TOYS / "clusters.cu", "sm_90", flags)).kernel(name)


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_ranks(cluster: int) -> None:
    """Manual: "%cluster_ctarank specifies the CTA rank in a cluster across all dimensions"; neighbours in x."""
    out = torch.full((8, 4), -1, dtype=torch.int32)
    toy("ids").launch(8, 32, [out], cluster=cluster)
    assert out.tolist() == [[i % cluster, cluster, i // cluster, 8 // cluster] for i in range(8)]


@modes
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_remote_arrivals(cluster: int, mode: dict[str, Any]) -> None:
    """Manual: mapa gives "the shared memory address of the corresponding variable in the CTA specified"."""
    out = torch.zeros(8, 32, dtype=torch.int32)
    result = toy("meet").launch(8, 32, [out, 3], cluster=cluster, **mode)
    assert out.eq(3).all() and not result.warnings


def shared(cluster: int, *flags: str, **mode: Any) -> torch.Tensor:
    """Return out of `share`: (8 blocks, 5 turns, cluster, 4 words)."""
    rows = torch.arange(5 * cluster * 4, dtype=torch.int32)
    out = torch.full((8, 5, cluster, 4), -1, dtype=torch.int32)
    result = toy("share", *flags).launch(8, 32, [rows, out, 5], cluster=cluster, **mode)
    assert not result.warnings, result.warning
    return out


@modes
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_multicast(cluster: int, mode: dict[str, Any]) -> None:
    """Manual: "each bit position in the 16-bit ctaMask operand corresponds to the %ctaid of the destination CTA"; bytes
    and the mbarrier's signal go to "the same CTA-relative offset" in each.
    """
    right = torch.arange(5 * cluster * 4, dtype=torch.int32).view(5, cluster, 4)
    assert torch.equal(shared(cluster, **mode), right.expand(8, -1, -1, -1))


FAULTS = {
    "an mbarrier that may not be there yet": ("meet", "-DSYNC_BEGIN=(void)0", "no mbarrier was initialised|race"),
    "a barrier of the block alone": ("meet", "-DSYNC_BEGIN=__syncthreads()", "no mbarrier was initialised|race"),
    "arrivals at a block that may have left": (
        "share",
        "-DSYNC_END=(void)0 -DSKIPPED=1",
        "has exited",
    ),
    "mask of itself": ("share", "-DMASK=(1u<<rank)", "deadlock"),
    "mask of the first block": ("share", "-DMASK=1", "deadlock|race"),
    "mask of nobody": ("share", "-DMASK=0", "mask 0x0"),
    "mask of a block that there is not": ("share", "-DMASK=(2*all)", "mask 0x6"),
    "filled while others read": ("share", "-DWAIT_EMPTY=(void)0", "race"),
    "copies to a block that may have left": ("share", "-DSYNC_END=(void)0 -DWAIT_EMPTY=(void)0", "exited|race"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    kernel, flags, why = FAULTS[name]
    rows, out = torch.zeros(5 * 2 * 4, dtype=torch.int32), torch.zeros(8 * 5 * 2 * 4, dtype=torch.int32)
    args = [rows, out, 5] if kernel == "share" else [out, 3]
    for mode in (*MODES, {"races": True, "order": "backward"}):
        try:
            toy(kernel, *flags.split()).launch(8, 32, args, cluster=2, **mode)
        except LaunchError as error:
            assert any(part in str(error) for part in why.split("|")), error
            return
    pytest.fail("not found")


def test_mapa_of_a_block_that_there_is_not() -> None:
    with pytest.raises(LaunchError, match="mapa: CTA 2 of a cluster of 2"):
        toy("beyond").launch(2, 1, [torch.zeros(4, dtype=torch.int32)], cluster=2)


def test_barrier_of_the_cluster() -> None:
    """Manual: "barrier.cluster.wait causes the executing thread to wait for all non-exited threads of the cluster"."""
    out = torch.zeros(4, dtype=torch.int32)
    toy("some_leave").launch(4, 64, [out], cluster=2)
    assert out.tolist() == [0, 1, 0, 1]
    with pytest.raises(LaunchError, match="wait before"):
        toy("wait_only").launch(2, 32, [], cluster=2)
    with pytest.raises(LaunchError, match="twice"):
        toy("arrive_twice").launch(2, 32, [], cluster=2)


@pytest.mark.parametrize(("grid", "cluster"), [(3, 2), (16, 16), (2, 0)])
def test_a_cluster_that_no_device_has_is_refused(grid: int, cluster: int) -> None:
    with pytest.raises(PtxError, match="expected clusters of at most 8"):
        toy("ids").launch(grid, 32, [torch.zeros(64, dtype=torch.int32)], cluster=cluster)
