"""What the processes of a pool do. It is a module of its own so that they can import it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from configs import Config, Result

_device = "cpu"
ENOUGH = 5.0  # seconds of a measurement


def begin(device: str, threads: int) -> None:
    """Set a process up."""
    import torch

    global _device
    _device = device
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")


def work(task: Any) -> Result:
    """Run a task."""
    result: Result = task.run(_device)
    return result


def digests(names: Sequence[str]) -> dict[str, str]:
    """Return the digest of each text as it is here."""
    from training import digest

    return {name: digest(name) for name in names}


@dataclass(frozen=True)
class Speed:
    """Measurement of the seconds that a step of a training takes; on a CPU of a core's time, whoever else has some."""

    of: Config
    steps: int = 8  # at most

    def run(self, device: str) -> Result:
        """Train a little; return the median seconds of a step, without the first ones."""
        from training import Training

        now = time.perf_counter if device == "cuda" else time.process_time
        marks = [now()]
        for step in Training(self.of, device).steps():
            marks.append(now())
            if step == self.steps or (step > 1 and now() - marks[0] > ENOUGH):
                break
        taken = [after - before for before, after in pairwise(marks)]
        return {"config": asdict(self), "seconds": median(taken[2:] or taken[1:] or taken)}
