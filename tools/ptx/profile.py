"""Profile of a launch: traffic, conflicts and instructions by PTX line, which decide speed before any clock does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .parser import Location, Statement

_FIELDS = ("threads", "requests", "bytes", "sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts", "shared_bytes")
_TENSOR = ("mma", "wgmma", "dmma")


@dataclass(frozen=True)
class Row:
    """Counts of one PTX instruction.

    Attributes:
        threads: how often a thread ran it.
        requests: how often a warp accessed memory by it.
        bytes: bytes of global memory that it accessed.
        sectors: sectors of 32 bytes that these lie in, a request at a time; `ideal_sectors` if they lay side by side.
        wavefronts: cycles of shared memory; `ideal_wavefronts` if no two lanes of a request met in a bank.
        shared_bytes: bytes of shared memory that it accessed.
    """

    line: int
    op: str
    location: Location | None
    threads: int
    requests: int
    bytes: int
    sectors: int
    ideal_sectors: int
    wavefronts: int
    ideal_wavefronts: int
    shared_bytes: int

    @property
    def conflicts(self) -> int:
        """Wavefronts beyond those of an access without bank conflicts."""
        return self.wavefronts - self.ideal_wavefronts

    @property
    def tensor(self) -> bool:
        return self.op.startswith(tuple(f"{t}." for t in _TENSOR)) and ("mma.sync" in self.op or "mma_async" in self.op)


class Profile:
    """Profile of a kernel: a row for every instruction that a thread ran."""

    def __init__(self, statements: Sequence[Statement], counters: Sequence[object]) -> None:
        self.rows = [
            Row(s.line, s.op, s.location, *(getattr(counters[s.line], f) for f in _FIELDS))
            for s in statements
            if s.op and counters[s.line].threads
        ]

    def total(self, field: str, where: Callable[[Row], bool] = lambda row: True) -> int:
        return sum(getattr(row, field) for row in self.rows if where(row))

    @property
    def sector_efficiency(self) -> float:
        """Ratio of ideal to real sectors of global memory; 1.0 is perfectly coalesced."""
        return self.total("ideal_sectors") / max(1, self.total("sectors"))

    @property
    def bank_conflicts(self) -> int:
        return self.total("wavefronts") - self.total("ideal_wavefronts")

    @property
    def instructions(self) -> float:
        """Number of instructions, a warp at a time."""
        return self.total("threads") / 32

    @property
    def tensor_instructions(self) -> float:
        """Number of tensor-core instructions, a warp at a time."""
        return self.total("threads", lambda row: row.tensor) / 32

    @property
    def other_per_tensor(self) -> float:
        """Number of other instructions for each tensor-core instruction; infinite if there is none."""
        others = self.instructions - self.tensor_instructions
        return others / self.tensor_instructions if self.tensor_instructions else float("inf")

    @property
    def barriers(self) -> int:
        """Number of barriers, a thread at a time."""
        return self.total("threads", lambda row: row.op.startswith(("bar.sync", "barrier.", "bar.red")))

    @property
    def global_bytes(self) -> int:
        return self.total("bytes")

    def by_source(self) -> dict[str, list[Row]]:
        """Group rows by the outermost source line that they come from."""
        grouped: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            place = row.location
            while place and place.inlined_at:
                place = place.inlined_at
            grouped[str(place) if place else f"PTX line {row.line}"].append(row)
        return dict(grouped)

    def table(self) -> str:
        """Format the totals, and a line for every instruction that accesses memory, for people to read."""
        tensor = "none of tensor cores"
        if self.tensor_instructions:
            tensor = f"{self.tensor_instructions:.0f} of tensor cores, {self.other_per_tensor:.1f} others for each"
        lines = [
            f"{self.instructions:.0f} instructions of warps, {tensor}",
            f"{self.barriers} barriers of threads",
            f"global memory: {self.global_bytes} bytes in {self.total('sectors')} sectors, "
            f"ideal are {self.total('ideal_sectors')}",
            f"shared memory: {self.total('shared_bytes')} bytes in {self.total('wavefronts')} wavefronts, "
            f"{self.bank_conflicts} by bank conflicts",
            "   PTX  requests       bytes   sectors     ideal     waves     ideal  instruction (<: more than ideal)",
        ]
        for r in self.rows:
            if r.requests:
                numbers = (r.sectors, r.ideal_sectors, r.wavefronts, r.ideal_wavefronts)
                counts = f"{r.requests:>9} {r.bytes + r.shared_bytes:>11} " + " ".join(f"{n:>9}" for n in numbers)
                mark = "" if r.sectors <= r.ideal_sectors and not r.conflicts else "  <"
                lines.append(f"{r.line:>6} {counts}  {r.op}  {r.location or ''}{mark}")
        return "\n".join(lines)
