"""Nouns of a step: what `prepare` decides and tasks do."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import memory
from ..coefficients import Schedule
from ..layout import Bundle, Layout, Matrices, View, Window
from ..stages import Stage
from ..stages.packed import Packed
from ..verbs import ApplyOptions, ApplyUpdate, MomentumUpdate
from .options import as_scalar
from .plan import Bucket, Shared

if TYPE_CHECKING:
    from .workspace import Workspace


class Span(NamedTuple):
    """Matrices start..stop of one parameter, or of one piece of it."""

    piece: int
    start: int
    stop: int


class Chunk(NamedTuple):
    """Operands of one pass through the workspace."""

    params: Bundle | Packed
    momenta: Bundle | Packed | None
    grads: list[tuple[int, Layout]]
    ratios: array[float]  # one a matrix
    second_moments: list[Tensor]  # none, or as `normalize` takes them
    numbers: array[int]  # one a matrix; none without stochastic rounding


class Plain(NamedTuple):
    """A parameter, or a piece of one, whose direction is its update."""

    gradient: int
    at: View | None  # of the gradient, if it is a piece
    param: Tensor
    momentum: Tensor
    ratio: float


class Work(NamedTuple):
    """A bucket with all that is settled before a step; `notes` is `Plan`'s.

    Attributes:
        stages: what stands around the iteration.
        window: where its matrices are in whole ones; for the random bits of stochastic rounding.
        stage_floats: fp32 scratch that a matrix needs for the stages.
    """

    bucket: Bucket
    notes: tuple[str, ...]
    schedule: Schedule
    device: torch.device
    chunks: list[Chunk]
    stages: tuple[Stage, ...] = ()
    window: Window = Window()
    stage_floats: int = 0


class Prepared(NamedTuple):
    """Decisions of `prepare` for a group, good for every step in which `signature` and options are the same.

    `plain` has what goes through no iteration. Tensors, or pieces of them, that no strides describe as matrices are
    stepped in copies: `copies` has (that of a parameter or momentum, its copy), and `grad_copies` (index of a gradient,
    the piece of it, its copy); the copies count as further gradients. `rehearsed` has the kinds of steps for which
    backends and memory are ready.
    """

    works: list[Work]
    plain: list[Plain]
    copies: list[tuple[Tensor, Tensor]]
    grad_copies: list[tuple[int, View, Tensor]]
    rehearsed: WeakKeyDictionary[memory.Mark, set[tuple[object, ...]]]


class Scalars(NamedTuple):
    """Numbers that may change from step to step; see `Muon`. A negative grad_scale ascends.

    `seed` is that of the step's random bits, None without stochastic rounding.
    """

    lr: float | Tensor
    weight_decay: float | Tensor
    momentum: float
    nesterov: bool
    dampened: bool
    eps: float
    grad_scale: float
    cautious: bool = False
    beta2: float = 0.0
    seed: int | None = None

    def momentum_update(
        self,
        grad: Sequence[Matrices],
        momentum: Sequence[Matrices] | None,
        x: Tensor,
        margin: float,
        scratch: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> MomentumUpdate:
        """Return the arguments of `Backend.momentum_update` in this step."""
        rule = self.momentum, self.nesterov, self.dampened, self.grad_scale, self.eps
        return MomentumUpdate(grad, momentum, x, *rule, margin, scratch, norm)

    def apply_update(self, param: Sequence[Matrices], x: Tensor, ratio: Sequence[float]) -> ApplyUpdate:
        """Return the arguments of `Backend.apply_update` in this step."""
        return ApplyUpdate(param, x, as_scalar(self.lr), as_scalar(self.weight_decay), ratio)

    def apply_options(self, numbers: Sequence[int], window: Window) -> ApplyOptions:
        """Return the options of `Backend.apply_update` in this step.

        Args:
            numbers: of the matrices, see numbers.py; needed with stochastic rounding alone, as is the other.
            window: where they are in whole ones.
        """
        if self.seed is None:
            return ApplyOptions(self.cautious)
        assert numbers, "nobody has numbered the matrices"
        return ApplyOptions(self.cautious, True, self.seed, numbers, window)


class Task(Protocol):
    """A share of a step: what this rank steps alone, or what several ranks step together.

    A step has all of its tasks `reserve`, then `warm_up`, then `run`; only the last writes to parameters and state.

    Attributes:
        together: whether ranks may wait for each other in it.
    """

    together: bool

    @property
    def works(self) -> list[Work]:
        """Work that this rank does itself."""
        ...

    @property
    def buckets(self) -> list[Bucket]:
        """Buckets of it that a plan lists."""
        ...

    @property
    def exchanged(self) -> Shared | None:
        """Messages between ranks that a plan lists; None if there are none."""
        ...

    def facts(self, team: object) -> list[tuple[str, str]]:
        """Return what is exchanged with a team of ranks, as (name, value), the same on all of them."""
        ...

    def reserve(self, workspace: Workspace) -> None:
        """Have the memory that it writes to."""
        ...

    def warm_up(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
        """Have backends get ready what will run, and memory that it takes; the last thing that may raise."""
        ...

    def run(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
        """Do it: parameters and state are written, gradients are not.

        Args:
            grads: of all parameters of the step, of which a task knows its own.
            scalars: of this step.
            workspace: in which there is room.
        """
        ...
