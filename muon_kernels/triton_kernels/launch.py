"""Launches of kernels. Triton looks at every argument of every call, which takes longer than the rest of a step.

Here it does so once for each kind of arguments: kernels declare the types of their numbers, and have Triton look
not at values, so that nothing asks for another compilation but a constant, a dtype or an address less aligned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import triton
from torch import Tensor
from triton.runtime import driver

T = TypeVar("T")

_compiled: dict[tuple[Any, ...], Any] = {}


class _State(threading.local):
    recording: list[Callable[[], None]] | None = None
    rehearsing = False


_state = _State()


class Launch:
    """`kernel[(programs,)](*arguments, **constants)`, to be called once or many times.

    Args:
        kernel: a Triton function whose constants come after its arguments.
        programs: how many; none is no launch.
        arguments: tensors, None, tensor descriptors and numbers.
        constants: the kernel's, and Triton's options.
    """

    def __init__(self, kernel: Any, programs: int | tuple[int, int], *arguments: Any, **constants: Any) -> None:
        self._kernel, self._arguments, self._constants = kernel, arguments, constants
        self._grid = (programs, 1, 1) if isinstance(programs, int) else (*programs, 1)
        self._call: Callable[..., None] | None = None

    def __call__(self) -> None:
        """Launch it on the current device and stream; in a rehearsal, only make it ready.

        Raises:
            RuntimeError: it cannot be compiled or loaded.
        """
        if 0 in self._grid:
            return
        if self._call is None:
            self._call = self._ready()
        if not _state.rehearsing:
            self._call()

    def _ready(self) -> Callable[[], None]:
        kernel, grid, arguments, constants = self._kernel, self._grid, self._arguments, self._constants
        if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter
            return lambda: kernel[grid](*arguments, **constants)
        looked_at = [arguments[i] for i in _looked_at(kernel)]
        assert not any(isinstance(a, int) for a in looked_at), "a number for which much would be compiled"
        aligned = [a.data_ptr() % 16 == 0 for a in looked_at if isinstance(a, Tensor)]
        key = kernel, driver.active.get_current_device(), *constants.values(), *map(_type, arguments), *aligned
        if (compiled := _compiled.get(key)) is None:
            try:
                compiled = kernel.warmup(*arguments, grid=grid, **constants)
                compiled._init_handles()
            except Exception as error:  # whatever goes wrong inside a compiler
                raise RuntimeError(_reason(kernel.__name__, error)) from None
            _compiled[key] = compiled
        own = (constants[name] for name in kernel.arg_names[len(arguments) :])
        everything = (*arguments, *own)
        return lambda: compiled[grid](*everything)


def _type(argument: Any) -> object:
    """Return what decides how Triton passes an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype
    return argument.bit_length() > 31 if isinstance(argument, int) else type(argument)


@cache
def _looked_at(kernel: Any) -> list[int]:
    """The arguments of which Triton looks at more than the type."""
    of_declared_type = lambda p: p.annotation_type and p.annotation_type.startswith("fp")
    careless = (p.do_not_specialize or p.do_not_specialize_on_alignment or of_declared_type(p) for p in kernel.params)
    return [p.num for p, c in zip(kernel.params, careless, strict=True) if not (c or p.is_constexpr)]


def launch(kernel: Any, programs: int | tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """Do a `Launch`, or put it on the list that is being recorded."""
    _put(Launch(kernel, programs, *arguments, **constants))


def do(call: Callable[[], None], rehearse: Callable[[], object]) -> None:
    """Do what is no launch of ours, or in a rehearsal `rehearse`; or put it on the list that is being recorded."""

    def one() -> None:
        if _state.rehearsing:
            rehearse()
        else:
            call()

    _put(one)


def _put(one: Callable[[], None]) -> None:
    if _state.recording is None:
        one()
    else:
        _state.recording.append(one)


def recorded(run: Callable[[], T]) -> tuple[list[Callable[[], None]], T]:
    """The launches that `run` asks for, none of them done, and what it returns."""
    launches: list[Callable[[], None]] = []
    _state.recording = launches
    try:
        return launches, run()
    finally:
        _state.recording = None


@contextmanager
def rehearsal() -> Iterator[None]:
    """Kernels that are launched inside are compiled and loaded, and do not run."""
    _state.rehearsing = True
    try:
        yield
    finally:
        _state.rehearsing = False


def rehearsing() -> bool:
    """Whether inside a `rehearsal`."""
    return _state.rehearsing


def _reason(name: str, error: Exception) -> str:
    """Say in a sentence what went wrong, and how to fix it."""
    what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, OSError):
        mend = "set TRITON_CACHE_DIR to a directory that can be written, with room in it"
    elif "C compiler" in str(error):
        mend = "install gcc or clang, or set CC: Triton builds its launcher with it"
    else:
        mend = "use backend='cuda' or backend='eager', and please report it"
    target = driver.active.get_current_target()
    return f"triton {triton.__version__} could not make {name} for {target.backend} {target.arch} ({what}); {mend}"
