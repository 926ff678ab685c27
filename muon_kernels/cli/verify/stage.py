"""A stage, what it is given, and what it says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .workloads import Sizes


class Graph(NamedTuple):
    """A graph to be: the context in which its launches are captured, and what replays them."""

    capture: Callable[[], AbstractContextManager[Any]]
    replay: Callable[[], object]


class Place(NamedTuple):
    """Place where stages run.

    Attributes:
        kind: "gpu", "cpu", or "executor", which runs a GPU's kernels on the CPU.
        device: of tensors, "cuda" or "cpu".
        backends: that are looked at, the one that "auto" takes first.
        graph: makes a `Graph`; None where nothing can be captured.
        architecture: that is executed, of the executor.
    """

    kind: str
    device: str
    backends: tuple[str, ...]
    graph: Callable[[], Graph] | None = None
    architecture: str = ""

    @property
    def multiprocessors(self) -> int:
        """Return the number of multiprocessors, or 1."""
        return int(torch.cuda.get_device_properties(0).multi_processor_count) if self.device == "cuda" else 1


@dataclass
class Context:
    """Everything that a stage is given.

    Attributes:
        place: where.
        sizes: how much.
        found: what stages before this one have found, by their names.
        end: when the stage should be over, by `time.monotonic`.
    """

    place: Place
    sizes: Sizes
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    end: float = math.inf

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()


class Result(NamedTuple):
    """Findings of a stage: in a line, as data for the JSON, and what is wrong."""

    summary: str
    data: dict[str, Any]
    wrong: tuple[str, ...] = ()


class Skipped(Exception):
    """A reason for which a stage cannot be run here; it is no failure."""


class Stage(NamedTuple):
    """A stage.

    Attributes:
        name: in JSON.
        seconds: of ten minutes.
        question: that it answers.
        run: the stage.
        timed: whether what it finds is times, which only a GPU has.
        decides: whether nothing is worth timing if it finds something wrong.
        apart: whether it runs in processes of its own, on a real GPU.
        explains: whether it looks for what is wrong, and so is run when something is, or when the GPU is lost.
    """

    name: str
    seconds: float
    question: str
    run: Callable[[Context], Result]
    timed: bool = True
    decides: bool = False
    apart: bool = False
    explains: bool = False
