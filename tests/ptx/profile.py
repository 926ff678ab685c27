"""Counters of a launch by PTX line, kernel or source line: facts that decide a kernel's speed before any clock does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .parser import Location, Statement

_FIELDS = ("threads", "requests", "bytes", "sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts")
_TENSOR = ("mma", "wgmma", "dmma")


@dataclass(frozen=True)
class Row:
    """One PTX instruction. `threads`: how often threads ran it. `requests`: of whole warps; `sectors` of 32 bytes of
    global memory and `wavefronts` of shared memory are what they cost, the ideal ones what their bytes would need."""

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

    @property
    def space(self) -> str:
        return "global" if self.sectors else "shared" if self.wavefronts else ""

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
            if s.op and getattr(counters[s.line], "threads")
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
        return self.total("bytes", lambda row: row.space == "global")

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
            f"{'PTX':>6} {'requests':>9} {'bytes':>11} {'sectors':>9} {'ideal':>9} {'waves':>9} {'ideal':>9}  instruction",
        ]
        for r in self.rows:
            if r.requests:
                counts = f"{r.requests:>9} {r.bytes:>11} {r.sectors:>9} {r.ideal_sectors:>9} {r.wavefronts:>9} {r.ideal_wavefronts:>9}"
                mark = "" if r.sectors <= r.ideal_sectors and not r.conflicts else "  <"
                lines.append(f"{r.line:>6} {counts}  {r.op}  {r.location or ''}{mark}")
        return "\n".join(lines)
