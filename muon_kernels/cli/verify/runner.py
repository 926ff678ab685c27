"""Runs stages one after the other, each with its share of the time, and keeps what they say."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Timer
from typing import Any

from .correct import lost
from .stage import Context, Place, Result, Skipped, Stage
from .workloads import Sizes

OK, WRONG, FAILED, NOT_RUN, SKIPPED = "ok", "WRONG", "FAILED", "not run", "skipped"
NEEDS_GPU, REHEARSED, STOPPED = "needs a GPU", "rehearsed", "stopped"
BAD = (WRONG, FAILED)
_REHEARSAL = 0.1  # of the time that it has on a GPU
_PATIENCE = 120.0  # seconds beyond three times its share after which a stage hangs


@dataclass
class Record:
    """Outcome of a stage."""

    number: int
    name: str
    question: str
    status: str = NOT_RUN
    seconds: float = 0.0
    summary: str = ""
    wrong: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


class Runner:
    """Runner of stages.

    Args:
        stages: in their order.
        place: where they run.
        sizes: how much they do.
        seconds: for all of them.
        file: that is written after every stage; None for none.
        said: what is called before and after every stage.
        about: facts for the file.
        anyway: whether things are timed though results are wrong.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        place: Place,
        sizes: Sizes,
        seconds: float,
        file: Path | None = None,
        said: Callable[[Record], None] = lambda record: None,
        about: dict[str, Any] | None = None,
        anyway: bool = False,
    ) -> None:
        self._stages, self._said, self._file, self._about = stages, said, file, about or {}
        self._context, self._anyway = Context(place, sizes), anyway
        self._end = time.monotonic() + seconds
        self._stop = ""  # why nothing that is timed is run any more
        self.records = [Record(i, stage.name, stage.question) for i, stage in enumerate(stages)]

    @property
    def bad(self) -> bool:
        """Whether anything is wrong or failed."""
        return any(record.status in BAD for record in self.records)

    def run(self) -> bool:
        """Run all; return whether Ctrl-C stopped it."""
        for i, (stage, record) in enumerate(zip(self._stages, self.records, strict=True)):
            if why := self._refusal(stage):
                record.status, record.summary = why
            else:
                try:
                    self._run(stage, record, self._share(i))
                except KeyboardInterrupt:
                    record.status, record.summary = STOPPED, "by Ctrl-C"
                    for later in self.records[i + 1 :]:
                        later.summary = "stopped by Ctrl-C"
                    self.write()
                    return True
            self._said(record)
            self.write()
        return False

    def _refusal(self, stage: Stage) -> tuple[str, str] | None:
        """Return the status of a stage that cannot be run, and why; None if it can."""
        kind = self._context.place.kind
        if (stage.timed and kind == "cpu") or (stage.apart and kind != "gpu"):
            return NEEDS_GPU, ""
        return (NOT_RUN, self._stop) if self._stop and stage.timed and not stage.explains else None

    def _share(self, i: int) -> float:
        """Return the seconds of a stage: of what is left, as much as its own are of those that are still to run."""
        rest = sum(self._weight(stage) for stage in self._stages[i:] if self._refusal(stage) is None)
        return max(0.0, self._end - time.monotonic()) * self._weight(self._stages[i]) / max(rest, 1e-9)

    def _weight(self, stage: Stage) -> float:
        """Return the seconds of a stage, of ten minutes; a rehearsal needs fewer."""
        rehearsed = stage.timed and self._context.place.kind != "gpu"
        return stage.seconds * (_REHEARSAL if rehearsed else 1.0)

    def _run(self, stage: Stage, record: Record, share: float) -> None:
        self._said(record)
        place = self._context.place
        start = time.monotonic()
        self._context.end = start + share
        hangs = Timer(3 * share + _PATIENCE, self._hang, (record,))
        hangs.daemon = True
        if place.kind == "gpu":
            hangs.start()
        try:
            result = stage.run(self._context)
            record.status = WRONG if result.wrong else REHEARSED if stage.timed and place.kind != "gpu" else OK
        except Skipped as reason:
            record.status, result = SKIPPED, Result(str(reason), {})
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            record.status, result = FAILED, Result(what.partition("\n")[0], {"error": what})
        finally:
            hangs.cancel()
            record.seconds = time.monotonic() - start
        record.summary, record.data, record.wrong = result.summary, result.data, list(result.wrong)
        if record.status == REHEARSED:
            record.summary = ""  # times of a processor are of no use
        self._context.found[stage.name] = result.data
        if place.kind == "gpu":
            gc.collect()  # graphs hold memory
        if record.status in BAD:
            if lost(place):
                self._stop = f"{stage.name} lost the GPU"
            elif stage.decides and not self._anyway:
                self._stop = f"{stage.name} are wrong"

    def _hang(self, record: Record) -> None:
        """End the process: what hangs in a GPU's driver cannot be interrupted."""
        record.status, record.summary = FAILED, "it hangs; the process was ended"
        self._said(record)
        self.write()
        os._exit(1)

    def write(self) -> None:
        """Replace the file by what there is now; nobody ever reads half of it."""
        if self._file is None:
            return
        content = {**self._about, "wrong": self.bad, "stages": [asdict(record) for record in self.records]}
        text = json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n"
        with NamedTemporaryFile("w", dir=self._file.parent, prefix=f".{self._file.name}.", delete=False) as part:
            part.write(text)
        try:
            os.replace(part.name, self._file)
        except OSError:
            os.unlink(part.name)
            raise


def _finite(value: Any) -> Any:
    """Return it with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
