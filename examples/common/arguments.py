"""Kinds of numbers on a command line, argparse's `type`: what makes no sense is refused before anything is written."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

N = TypeVar("N", int, float)


def _kind(read: Callable[[str], N], what: str, fits: Callable[[N], bool]) -> Callable[[str], N]:
    def number(text: str) -> N:
        if not fits(value := read(text)):
            raise argparse.ArgumentTypeError(f"should be {what} but is: {text}")
        return value

    number.__name__ = read.__name__  # argparse says it where the text is no number at all
    return number


count = _kind(int, "1 or more", lambda n: n >= 1)
whole = _kind(int, "0 or more", lambda n: n >= 0)
seed = _kind(int, "from 0 to 2**32 - 1", lambda n: 0 <= n < 2**32)
rate = _kind(float, "0 or more, and finite", lambda x: 0 <= x < math.inf)
bound = _kind(float, "above 0 (inf bounds nothing)", lambda x: x > 0)
