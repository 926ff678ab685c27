"""Named Newton-Schulz coefficients with their sources, and the schedule that a user's choice means.

A step maps every singular value s of the normalised matrix to p(s) = a s + b s^3 + c s^5. The sets differ in how fast a
small s rises (the product of all a), in how flat the result is, and in whether they forgive an s above 1. That last is
what a margin is for: the Frobenius norm keeps s at 1 or below, but the entries are then rounded to bfloat16, which can
scale a matrix by up to 1 + 2^-8.

What 5 steps, or the set's own number, make of s in [0.01, 1 + 2^-8] / margin:

    keller          0.682 .. 1.134      gram_newton_schulz   0.846 .. 1.124
    you5            0.978 .. 1.032      cans                 0.867 .. 1.113
    you6            0.996 .. 0.999      cubic5               0.774 .. 1.300
    polar_express   0.870 .. 1.124      deepseek_v4          1.000 .. 1.001
                                        aol                  0.787 .. 1.084

Where squares are rounded to 16 bits as a whole, which backend "eager" does, "cans" and "cubic5" leave some per cent of
matrices with up to 8 rows a singular value below 0.6.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple

import torch

Triple = tuple[float, float, float]

DEFAULT = "keller"
DEFAULT_STEPS = 5


class _NotGiven(int):
    """The type of torch.optim.Muon's default number of steps, which gives way to a set that has its own number."""


NS_STEPS = _NotGiven(DEFAULT_STEPS)

_LARGEST = 1e38


class CoefficientSet(NamedTuple):
    """A published list of (a, b, c).

    Attributes:
        triples: one (a, b, c) for each step.
        margin: divisor of the normalised matrix, so that rounding cannot push a singular value past the point where the
            polynomials blow up or change sign.
        source: where the numbers are from.
        repeats: whether the list may be cut or its last triple repeated. If not, a schedule has exactly these steps.
    """

    triples: tuple[Triple, ...]
    margin: float
    source: str
    repeats: bool


class Schedule(NamedTuple):
    """The steps of an iteration.

    Attributes:
        triples: one (a, b, c) for each step.
        margin: see `CoefficientSet`.
        name: the set's name, or "custom".
        weights: of the iterates, from the normalised matrix to the last one; empty if the last one is the result.
        power: the power of the singular values that the weighted sum stands for.
    """

    triples: tuple[Triple, ...]
    margin: float
    name: str
    weights: tuple[float, ...] = ()
    power: float = 0.0


def _widen(triples: Sequence[Triple], factor: float) -> tuple[Triple, ...]:
    """Return p(x / factor) for each p: room for x above the end of the interval that p was made for."""
    return tuple((a / factor, b / factor**3, c / factor**5) for a, b, c in triples)


# Each step is made for exactly the interval that the one before yields, the first for s <= 1.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_CANS = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

COEFFICIENTS: dict[str, CoefficientSet] = {
    # Stays in (0, 1.5) for s up to 1.26, for any number of steps.
    "keller": CoefficientSet(
        ((3.4445, -4.7750, 2.0315),), 1.0, "https://kellerjordan.github.io/posts/muon/", repeats=True
    ),
    # Stays in (0, 1.5) for s up to 1.32.
    "you5": CoefficientSet(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        1.0,
        "https://x.com/YouJiacheng/status/1905861218138804534",
        repeats=False,
    ),
    # Stays in (0, 1.5) for s up to 1.08.
    "you6": CoefficientSet(
        (
            (3955 / 1024, -8306 / 1024, 5008 / 1024),
            (3735 / 1024, -6681 / 1024, 3463 / 1024),
            (3799 / 1024, -6499 / 1024, 3211 / 1024),
            (4019 / 1024, -6385 / 1024, 2906 / 1024),
            (2677 / 1024, -3029 / 1024, 1162 / 1024),
            (2172 / 1024, -1833 / 1024, 682 / 1024),
        ),
        1.0,
        "https://x.com/YouJiacheng/status/1893704552689303901",
        repeats=False,
    ),
    # The authors widen all but the last, whose fixed point is 1, and also divide by the margin.
    "polar_express": CoefficientSet(
        (*_widen(_POLAR_EXPRESS[:-1], 1.01), _POLAR_EXPRESS[-1]),
        1.01,
        "https://arxiv.org/abs/2505.16932, https://github.com/NoahAmsel/PolarExpress",
        repeats=True,
    ),
    # Widened by 1.05, it stays in (0, 1.5) for s up to 1.054 without a margin.
    "gram_newton_schulz": CoefficientSet(
        _widen(_POLAR_EXPRESS[:5], 1.05),
        1.0,
        "https://github.com/Dao-AILab/gram-newton-schulz",
        repeats=False,
    ),
    # As published, every step ends exactly where the next one's interval does, so one bfloat16
    # rounding of an iterate explodes (to 1e12 for two rows of equal entries) whatever the margin.
    # Hence widened here, the way the authors of Polar Express widen theirs.
    "cans": CoefficientSet(
        (*_widen(_CANS[:-1], 1.01), _CANS[-1]),
        1.01,
        "https://arxiv.org/abs/2506.10935, digits of https://github.com/NVIDIA-NeMo/Emerging-Optimizers",
        repeats=True,
    ),
    # Changes sign for s above 1.0035, less than the 1.0039 that rounding can give.
    "cubic5": CoefficientSet(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        1.01,
        "https://arxiv.org/abs/2606.00371, digits of https://github.com/NVIDIA-NeMo/Emerging-Optimizers",
        repeats=False,
    ),
    # Stays in (0, 1.5) for s up to 1.26.
    "deepseek_v4": CoefficientSet(
        ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
        1.0,
        "DeepSeek-V4 report, section 2.4, as in https://github.com/NVIDIA-NeMo/Emerging-Optimizers",
        repeats=False,
    ),
    # Made for a row-wise norm that keeps s lower: it changes sign above 0.8837. 1.137 is enough to
    # avoid that; 1.15 also keeps the image of the largest s, which falls to 0 there, near 1.
    "aol": CoefficientSet(
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        1.15,
        "https://arxiv.org/abs/2512.04632, digits of https://github.com/NVIDIA-NeMo/Emerging-Optimizers",
        repeats=False,
    ),
}


def resolve(
    ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]],
    ns_steps: int | None = None,
) -> Schedule:
    """Return the schedule that a user's choice means. Cheap enough to be asked at every step.

    Args:
        ns_coefficients: a name in COEFFICIENTS; one (a, b, c), used in every step with margin 1; or one (a, b, c) for
            each step, with margin 1.
        ns_steps: the number of steps. None, or NS_STEPS for "not given", means the length of the list or of the named
            set, and 5 for one (a, b, c) or a set that may be of any length.

    Raises:
        ValueError: an unknown name, a list of another length than ns_steps, not three numbers, a number that is not
            finite, or ns_steps outside 1 .. 99.
        TypeError: coefficients that are not numbers, or ns_steps that is not an int.
    """
    if isinstance(ns_steps, _NotGiven):
        ns_steps = None
    if ns_steps is not None:
        if not isinstance(ns_steps, int) or isinstance(ns_steps, bool):
            raise TypeError(f"ns_steps should be an int or None but is: {ns_steps!r}")
        if ns_steps < 1:
            raise ValueError(f"ns_steps should be >= 1 but is: {ns_steps}")
        if ns_steps >= 100:
            raise ValueError(f"Number of steps must be less than 100 for computational efficiency but is: {ns_steps}")
    if torch.compiler.is_compiling():  # which traces through caches and warns of them
        return _resolve.__wrapped__(ns_coefficients, ns_steps)
    try:
        hash(ns_coefficients)
    except TypeError:  # a list
        return _resolve.__wrapped__(ns_coefficients, ns_steps)
    return _resolve(ns_coefficients, ns_steps)


@lru_cache
def _resolve(ns_coefficients: Any, ns_steps: int | None) -> Schedule:
    if isinstance(ns_coefficients, str):
        return _named(ns_coefficients, ns_steps)
    if _is_list(ns_coefficients) and ns_coefficients and all(map(_is_list, ns_coefficients)):
        triples = tuple(map(_triple, ns_coefficients))
        _check_steps("ns_coefficients", triples, ns_steps)
        return Schedule(triples, 1.0, "custom")
    triples = (_triple(ns_coefficients),)
    name = DEFAULT if triples == COEFFICIENTS[DEFAULT].triples else "custom"
    return Schedule(triples * (ns_steps or DEFAULT_STEPS), 1.0, name)


def _named(name: str, ns_steps: int | None) -> Schedule:
    if name not in COEFFICIENTS:
        raise ValueError(
            f"ns_coefficients should be one of {', '.join(map(repr, COEFFICIENTS))} "
            f"or numbers (a, b, c) but is: {name!r}"
        )
    chosen = COEFFICIENTS[name]
    triples = chosen.triples
    if chosen.repeats:
        steps = ns_steps or DEFAULT_STEPS
        triples = (triples + triples[-1:] * steps)[:steps]
    else:
        _check_steps(repr(name), triples, ns_steps)
    return Schedule(triples, chosen.margin, name)


def _check_steps(what: str, triples: tuple[Triple, ...], ns_steps: int | None) -> None:
    if ns_steps not in (None, len(triples)):
        raise ValueError(
            f"{what} has {len(triples)} steps but ns_steps is: {ns_steps}; set ns_steps to None or {len(triples)}"
        )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))  # torch 2.9 compiles no union


def _triple(values: Any) -> Triple:
    if not _is_list(values) or not all(isinstance(value, Real) for value in values):
        raise TypeError(
            f"ns_coefficients should be a name, three numbers (a, b, c), or a list of such threes, but has: {values!r}"
        )
    if len(values) != 3:
        raise ValueError(f"Coefficients must be a tuple of exactly 3 values (a, b, c) but are: {values!r}")
    a, b, c = map(float, values)
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        raise ValueError(f"Coefficients should be finite but are: {values!r}")
    if max(abs(a), abs(b), abs(c)) > _LARGEST:
        raise ValueError(f"Coefficients should be at most {_LARGEST:.0e} in size, to fit fp32, but are: {values!r}")
    return a, b, c
