"""Means, 95 % intervals and verdicts, of the few numbers that seeds give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

# Losses that differ by less count as alike, in nats per byte.
ALIKE = 0.02


@cache
def t_quantile(freedom: int) -> float:
    """Return the t that Student's distribution exceeds in absolute value with a chance of 5 %.

    Args:
        freedom: degrees of freedom, >= 1.

    Source: the finite series of its distribution function, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return low


def _within(t: float, freedom: int) -> float:
    """Return the chance of an absolute value below t."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for n in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= cosine**2 * n / (n + 1)
    if freedom % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Args:
        mean: of the numbers.
        half: half of the width of the interval; infinite for fewer than two numbers.
        sd: standard deviation of the numbers, NaN for fewer than two.
        diverged: the numbers, if one of them is not finite, so that there is no interval; else none.
    """

    mean: float
    half: float
    sd: float = math.nan
    diverged: tuple[float, ...] = ()

    @property
    def low(self) -> float:
        """Lower end of the interval; where trainings diverged, the least of the numbers."""
        return self._end(min, -math.inf) if self.diverged else self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval; where trainings diverged, the largest of the numbers."""
        return self._end(max, math.inf) if self.diverged else self.mean + self.half

    def _end(self, of: Callable[[Sequence[float]], float], unknown: float) -> float:
        # Two that have diverged have no order: their difference is NaN.
        return unknown if any(map(math.isnan, self.diverged)) else of(self.diverged)

    @property
    def lost(self) -> str:
        """How many of the numbers are not finite, in words."""
        return f"{sum(not math.isfinite(x) for x in self.diverged)} of {len(self.diverged)} diverged"


def estimate(numbers: Sequence[float]) -> Estimate:
    """Estimate the mean that numbers are around, by Student's t. One that is not finite leaves no interval.

    Raises:
        ValueError: there are no numbers.
    """
    if not numbers:
        raise ValueError("numbers should be one at least but are none")
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return Estimate(mean, math.inf)
    if not math.isfinite(mean):
        return Estimate(mean, math.inf, diverged=tuple(numbers))
    sd = math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))
    return Estimate(mean, t_quantile(len(numbers) - 1) * sd / math.sqrt(len(numbers)), sd)


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Estimate the mean of first less second, pair by pair: what the pairs have in common, as a seed, drops out.

    Raises:
        ValueError: the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"pairs should be of equally many numbers but are of: {len(first)} and {len(second)}")
    return estimate([a - b for a, b in zip(first, second, strict=True)])


@dataclass(frozen=True)
class Line:
    """A straight line by least squares, y = intercept + slope x."""

    intercept: float
    slope: Estimate


def fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line to points; the interval of its slope is by Student's t, with two degrees of freedom less than points.

    Raises:
        ValueError: there are fewer than two different x.
    """
    count = len(x)
    centre, level = sum(x) / count, sum(y) / count
    spread = sum((a - centre) ** 2 for a in x)
    if not spread:
        raise ValueError(f"x should be two different numbers at least but are: {list(x)}")
    slope = sum((a - centre) * (b - level) for a, b in zip(x, y, strict=True)) / spread
    intercept = level - slope * centre
    if count < 3:
        return Line(intercept, Estimate(slope, math.inf))
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(rest / (count - 2) / spread)
    return Line(intercept, Estimate(slope, t_quantile(count - 2) * error))


REPRODUCED, OPPOSITE, OPEN = "reproduced", "not reproduced", "cannot be told at this size"

RULE = f"""\
Each claim of a paper is put as a difference of which the paper says the sign. It is **{REPRODUCED}** where the whole
95 % interval of the difference measured here has that sign, **{OPPOSITE}** where the whole interval has the
other, and it **{OPEN}** where the interval has both. A claim that two are alike is
{REPRODUCED} where the whole interval is within ±{ALIKE:g} nats, {OPPOSITE} where all of it is outside, and cannot be
told otherwise; a section that has other units says its margin. A training that diverged has an infinite loss. It leaves
no interval, and then the differences of all seeds have to have the sign, or to be within the margin or outside; that of
two that diverged has no sign. Intervals are Student's t of the differences seed by seed: the same seed is the same
model and the same batches. One interval in twenty misses what it is for, and several claims stand on the same
trainings."""


def verdict(difference: Estimate, sign: int, alike: float = ALIKE) -> str:
    """Judge a claim by the RULE.

    Args:
        difference: as it was measured.
        sign: 1 or -1, that the paper says, or 0 if it says that there is next to no difference.
        alike: largest difference that counts as none.
    """
    if sign:
        low, high = sorted((sign * difference.low, sign * difference.high))
        return REPRODUCED if low > 0 else OPPOSITE if high < 0 else OPEN
    if -alike <= difference.low and difference.high <= alike:
        return REPRODUCED
    return OPPOSITE if difference.low > alike or difference.high < -alike else OPEN


@dataclass(frozen=True)
class Claim:
    """What a paper says of a difference, and the difference that was measured here.

    Args:
        words: what the paper says, a sentence without a full stop.
        difference: as it was measured.
        sign: see `verdict`.
        unit: of the difference, with a space before it.
    """

    words: str
    difference: Estimate
    sign: int
    unit: str = " nats"
    alike: float = ALIKE

    def __str__(self) -> str:
        """Say what the paper says, the verdict and the interval."""
        judged = verdict(self.difference, self.sign, self.alike)
        sign = {REPRODUCED: "", OPPOSITE: ", the opposite sign" if self.sign else "", OPEN: ""}[judged]
        if self.difference.diverged:
            return f"{self.words}: **{judged}**{sign} ({self.difference.lost})"
        if not math.isfinite(self.difference.half):
            return f"{self.words}: **{judged}** (no interval)"
        low, high = self.difference.low, self.difference.high
        return (
            f"{self.words}: **{judged}**{sign} ({self.difference.mean:+.3g}{self.unit}, 95 % from {low:+.3g} to "
            f"{high:+.3g})"
        )


def verdicts(claims: Sequence[Claim]) -> str:
    """Put claims into the sentence that stands under a table."""
    return "\n" + "; ".join(map(str, claims)) + ".\n"
