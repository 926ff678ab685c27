"""Deferral of Ctrl-C until everything that a step has begun to write is written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_holding = False  # whether the main thread is in this context


@contextmanager
def held() -> Iterator[None]:
    """Defer an interrupt from the keyboard to the end of this context.

    Threads other than the main one get no interrupts, and a handler that is written in C is left alone. Within this
    context another one is nothing: signal's functions take longer than all else in a step of one small matrix.
    """
    global _holding
    handler = None
    if threading.current_thread() is threading.main_thread() and not _holding:
        handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    come: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: come.append((number, frame)))
    _holding = True
    try:
        yield
    finally:
        _holding = False
        signal.signal(signal.SIGINT, handler)
        if come:
            handler(*come[-1])
