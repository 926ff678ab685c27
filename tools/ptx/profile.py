"""Counters of a launch by PTX line, kernel or source line: facts that decide a kernel's speed before any clock does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .parser import Location, Statement

_FIELDS = ("threads", "requests", "bytes", "sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts", "shared_bytes")
_TENSOR = ("mma", "wgmma", "dmma")


@dataclass(frozen=True)
class Row:
    """One PTX instruction. `threads`: how often threads ran it. `requests`: of whole warps. `bytes` and `sectors` (of
    32 bytes) of global memory and `wavefronts` of shared memory: their cost. Ideal: what the bytes need."""

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
        """Wavefronts that a conflict-free access would not have."""
        return self.wavefronts - self.ideal_wavefronts

    @property
    def tensor(self) -> bool:
        return self.op.startswith(tuple(f"{t}." for t in _TENSOR)) and ("mma.sync" in self.op or "mma_async" in self.op)


class Profile:
    """What a kernel did, instruction by instruction."""

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
        """Ideal over real sectors of global memory; 1.0 is perfectly coalesced."""
        return self.total("ideal_sectors") / max(1, self.total("sectors"))

    @property
    def bank_conflicts(self) -> int:
        return self.total("wavefronts") - self.total("ideal_wavefronts")

    @property
    def tensor_instructions(self) -> float:
        """Warp instructions: every lane runs one."""
        return self.total("threads", lambda row: row.tensor) / 32

    @property
    def other_per_tensor(self) -> float:
        """Other instructions for each tensor instruction."""
        others = self.total("threads", lambda row: not row.tensor) / 32
        return others / self.tensor_instructions if self.tensor_instructions else float("inf")

    @property
    def barriers(self) -> int:
        """Barriers that threads came to."""
        return self.total("threads", lambda row: row.op.startswith(("bar.sync", "barrier.", "bar.red")))

    @property
    def global_bytes(self) -> int:
        return self.total("bytes")

    def by_source(self) -> dict[str, list[Row]]:
        """Rows that touch memory, by the outermost source line that they come from."""
        grouped: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            place = row.location
            while place and place.inlined_at:
                place = place.inlined_at
            grouped[str(place) if place else f"PTX line {row.line}"].append(row)
        return dict(grouped)

    def table(self) -> str:
        """For people: the totals, then every access of memory."""
        lines = [
            f"tensor instructions {self.tensor_instructions:.0f}, others for each {self.other_per_tensor:.1f}; "
            f"barriers (threads) {self.barriers}; global bytes {self.global_bytes}, "
            f"sectors {self.total('sectors')} of {self.total('ideal_sectors')} ideal; "
            f"bank conflicts {self.bank_conflicts} in {self.total('wavefronts')} wavefronts",
            "   PTX  requests       bytes   sectors     ideal     waves     ideal  instruction",
        ]
        for r in self.rows:
            if r.requests:
                numbers = (r.sectors, r.ideal_sectors, r.wavefronts, r.ideal_wavefronts)
                counts = f"{r.requests:>9} {r.bytes + r.shared_bytes:>11} " + " ".join(f"{n:>9}" for n in numbers)
                mark = "" if r.sectors <= r.ideal_sectors and not r.conflicts else "  <"
                lines.append(f"{r.line:>6} {counts}  {r.op}  {r.location or ''}{mark}")
        return "\n".join(lines)
