"""Backends: which can do the verbs here, and which one should.

A backend is a module with the functions of `Backend`. It is imported when somebody asks for it, so that
`import muon_kernels` needs neither the compiled module nor triton nor a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..coefficients import Schedule
from ..newton_schulz import Products
from ..verbs import ApplyOptions, ApplyUpdate, MomentumUpdate, Step

# In the order in which "auto" prefers them, but see `Backend.prefers_instead`.
BACKENDS = {"cuda": ".cuda", "triton": ".triton", "cpu": ".cpu", "eager": ".eager"}


class Fused(NamedTuple):
    """Cost of stepping a bucket by `fused_step`.

    Attributes:
        slots: how many matrices the workspace holds.
        launches: calls of a kernel.
        flops: executed for a matrix; None if they are those of its products.
        reads: of gradients and momenta.
        parts: of the columns of a matrix, each stepped by a block of its own.
        partial_bytes: what the parts of all matrices leave for one another, in the workspace.
    """

    slots: int
    launches: int = 1
    flops: int | None = None
    reads: int = 1
    parts: int = 1
    partial_bytes: int = 0


class Backend(Products, Protocol):
    """The verbs, under the same names in every layer, and the facts that a plan needs of them.

    Attributes:
        device_types: types of the devices that it is made for; none if it takes any.
        symmetric_products: whether syrk and syrkx compute one triangle only.
        normalizes: whether `momentum_update` writes x normalised, and returns no scale.
        default_workspace_bytes: cap on a step's workspace unless the user sets one.
    """

    device_types: tuple[str, ...]
    symmetric_products: bool
    normalizes: bool
    default_workspace_bytes: int

    def unavailable(self) -> str | None:
        """Return why nothing can run here, and how to fix it; None if ready. Raise what only the user can mend."""

    def refuses(self, device: torch.device, dtypes: Sequence[torch.dtype], workspace_dtype: torch.dtype) -> str | None:
        """Return why tensors of this kind, or stacks of that dtype, cannot be taken, and what can; None if they can."""

    def prefers_instead(self, device: torch.device, rows: int, cols: int) -> tuple[str, str] | None:
        """Return a backend that is expected to step such matrices faster there, and why; None if there is none."""

    def describe(self) -> str:
        """Describe in a few words what will run."""

    def leading_dimension(self, cols: int) -> int:
        """Return the row stride, in elements, at which stacks of `cols` columns are multiplied fastest."""

    def program(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that does what `run` does, sooner: its products are the same every time, so they are kept.

        Args:
            run: asks for products, which need not be done when it returns; the operands stay where they are.
        """

    def remarks(self, device: torch.device, shape: tuple[int, int], workspace_dtype: torch.dtype) -> tuple[str, ...]:
        """Return sentences for a plan on how such matrices, in stacks of that dtype, are stepped there."""

    def rehearsal(self) -> AbstractContextManager[None] | None:
        """Return a context in which verbs get ready what they need, and do nothing else; None if nothing needs that.

        So that what can go wrong with it goes wrong before a step begins.
        """

    def momentum_update(self, args: MomentumUpdate) -> Tensor | None:
        """Update momenta, write the directions to x; see csrc/muon_kernels.h for the formulas.

        A matrix may be written to x times a factor that brings its norm nearer to 1/margin.

        Returns:
            (batch,) fp32 on x's device: what brings the Frobenius norms of x to 1/margin; 0 for a zero matrix, NaN for
            one that is not finite. None if that is where they are.
        """

    def apply_update(self, args: ApplyUpdate, options: ApplyOptions = ApplyOptions()) -> None:
        """Write (1 - lr·weight_decay)·param - lr·ratio[i]·x[i] to every matrix i of param."""

    def scratch_bytes(self, rows: int, cols: int) -> int:
        """Return the bytes of scratch that `momentum_update` needs for a matrix, a multiple of 8."""

    def update_launches(self, count: int) -> int:
        """Return the launches, at most, of `momentum_update` and `apply_update` together for `count` matrices."""

    def product_tiles(self) -> tuple[int, int] | None:
        """Return the smallest and largest side of the tiles in which operands are read; None if that is not known."""

    def fused_plan(
        self,
        rows: int,
        cols: int,
        count: int,
        schedule: Schedule,
        stochastic_rounding: bool = False,
        room: int | None = None,
    ) -> Fused | None:
        """Return the cost of stepping a bucket by `fused_step`; None if it is not stepped that way.

        `room`: bytes that partials may take; None for any.
        """

    def fused_step(self, args: Step) -> None:
        """Do `momentum_update`, the iteration and `apply_update` in one call. Optional: see `fused_plan`."""


def get(name: str) -> Backend:
    """Return the backend of that name; raise ValueError if there is none."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend should be 'auto' or one of {', '.join(map(repr, BACKENDS))} but is: {name!r}")
    return cast(Backend, importlib.import_module(BACKENDS[name], __name__))


def unavailable(name: str) -> str | None:
    """Return why the backend of that name cannot run on this machine, and how to fix it; None if it is ready.

    Raises:
        ValueError: the environment sets the backend up in a way that there is not.
    """
    return get(name).unavailable()


def choose(
    name: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    workspace_dtype: torch.dtype,
    shape: tuple[int, int],
) -> tuple[str, tuple[str, ...]]:
    """Choose a backend. Return its name, and notes: why "auto" did not take others, what the backend remarks.

    "auto" takes the first that can, unless it prefers another that can instead.

    Args:
        name: in BACKENDS, or "auto".
        device: of the tensors.
        dtypes: of the tensors.
        workspace_dtype: of the stacks.
        shape: (m, n) of the matrices, m ≤ n.

    Raises:
        ValueError: unknown name, a named backend that cannot take such tensors, or see `unavailable`.
        RuntimeError: a named backend that cannot run on this machine.
    """
    if name != "auto":
        backend = get(name)
        if reason := backend.unavailable():
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
        if reason := backend.refuses(device, dtypes, workspace_dtype):
            raise ValueError(f"backend {name!r} cannot take these tensors: {reason}")
        return name, backend.remarks(device, shape, workspace_dtype)
    reasons: dict[str, str] = {}
    notes: list[str] = []
    able = []
    for candidate in BACKENDS:
        backend = get(candidate)
        reason = backend.unavailable()
        if reason is None and (reason := backend.refuses(device, dtypes, workspace_dtype)) is not None:
            reason = reason.partition(";")[0]  # the fix there is backend="auto"
        if reason is None:
            able.append(candidate)
        else:
            reasons[candidate] = reason
            if not able and device.type in backend.device_types:
                notes.append(f"{candidate} was not chosen: {reason}")
    if not able:
        raise ValueError("no backend can take these tensors: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
    first = able[0]
    better = get(first).prefers_instead(device, *shape)
    if better is not None and better[0] in able:
        notes.append(f"{first} was not chosen for {shape[0]}x{shape[1]}: {better[1]}")
        first = better[0]
    return first, (*notes, *get(first).remarks(device, shape, workspace_dtype))
