"""Memory that steps share and keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..coefficients import Schedule
from ..graphs import capturing, stream
from ..newton_schulz import Blend, Square, squares_of
from ..stages.packed import floats
from .plan import Bucket
from .work import Work


class Stacks(NamedTuple):
    """Memory that a chunk of `batch` matrices needs beside parameters and state."""

    X: Tensor  # (batch, m, n)
    Y: Tensor
    squares: list[Square]
    blend: Blend | None  # where iterates have weights
    scratch: Tensor  # (batch * scratch_bytes,) uint8
    stage_scratch: Tensor  # (batch * stage_floats,) fp32, see `Work`
    unpacked: Tensor | None  # (batch, floats) fp32, of momentum or parameters that are kept packed
    partials: Tensor | None  # uint8, where the parts of a fused step's matrices meet
    derived: dict[str, Any]  # what is computed from them once


class Workspace:
    """Memory that steps share and keep, one block a device; it grows to the largest chunk and stays.

    A CUDA graph keeps addresses of the block that a step was captured with: such a one is kept when a larger one has
    taken its place, or a replay would write to what is somebody else's by then.
    """

    def __init__(self) -> None:
        self._blocks: dict[torch.device, Tensor] = {}
        self._stacks: dict[tuple[Bucket, Schedule, int, torch.device, int], Stacks] = {}
        self._captured: list[Tensor] = []

    def reserve(self, device: torch.device, bytes_: int) -> None:
        """Have at least `bytes_` on `device`, for launches on the current stream; see `keep`."""
        block = self._blocks.get(device)
        if block is None or block.numel() < bytes_:
            self._stacks.clear()
            self._blocks.pop(device, None)
            self._blocks[device] = torch.empty(bytes_, dtype=torch.uint8, device=device)
        self.keep(device, [self._blocks[device]])

    def keep(self, device: torch.device, memory: Iterable[Tensor]) -> None:
        """Let `memory` outlive what is about to be launched with it on the current stream.

        Memory that is given back while another stream than its own works with it waits for that one. A graph works with
        the addresses that it captured whenever it is replayed: what it has seen stays as long as this workspace.
        """
        current, captured = stream(device), capturing(device)
        for t in memory:
            if current is not None:
                t.record_stream(current)
            if captured and not any(t is other for other in self._captured):
                self._captured.append(t)

    def addresses(self) -> list[int]:
        """Return the addresses of the blocks."""
        return [block.data_ptr() for block in self._blocks.values()]

    def stacks(self, work: Work, batch: int) -> Stacks:
        """Return views for a chunk of `batch` matrices. Repeated calls return the same tensors."""
        key = work.bucket, work.schedule, batch, work.device, work.stage_floats
        found = self._stacks.get(key)
        if found is None:
            with torch.inference_mode(False):  # what is kept must be of use outside inference mode too
                found = self._stacks[key] = self._carve(*key)
        return found

    def _carve(self, bucket: Bucket, schedule: Schedule, batch: int, device: torch.device, stage_floats: int) -> Stacks:
        m, n = bucket.shape
        ops = backends.get(bucket.backend)
        block = self._blocks[device]
        offset = 0

        def take(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
            nonlocal offset
            bytes_ = batch * rows * cols * dtype.itemsize
            offset, begin = offset + bytes_, offset
            return block[begin:offset].view(dtype).view(batch, rows, cols)

        def stack(cols: int) -> Tensor:
            return take(m, ops.leading_dimension(cols), bucket.workspace_dtype)[..., :cols]

        stage_scratch = take(1, stage_floats, torch.float32).flatten()
        memory = take(1, floats(m, n), torch.float32)[:, 0] if bucket.packed else None
        X, Y, *total = (stack(n) for _ in range(3 if schedule.weights else 2))
        highs = [stack(m) for _ in range(squares_of(bucket.algorithm, schedule))]
        # What needs alignment last, the doubles first: the leading dimensions of a backend that has them leave it.
        scratch = take(1, ops.scratch_bytes(m, n), torch.uint8).flatten()
        precise = ops.precise_squares
        squares = [Square(high, take(1, m, torch.float32)[:, 0] if precise else None) for high in highs]
        offset += -offset % 8  # stacks of a backend whose leading dimensions are odd
        numbers = (take(1, 1, dtype)[:, 0, 0] for dtype in (torch.float64, *[torch.float32] * 4))
        blend = Blend(*total, *numbers) if total else None
        partials = block[offset : bucket.workspace_bytes] if bucket.parts > 1 else None
        return Stacks(X, Y, squares, blend, scratch, stage_scratch, memory, partials, {})
