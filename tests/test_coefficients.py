"""The coefficient sets: their digits, their ranges, and what a user's choice resolves to."""

import inspect
import math

import pytest
import torch

from muon_kernels import Muon
from muon_kernels.checks.matrices import polynomial
from muon_kernels.coefficients import COEFFICIENTS, DEFAULT, resolve
from muon_kernels.distributed import ZeroMuon

KELLER = (3.4445, -4.7750, 2.0315)
ROUNDED_UP = 1 + 2**-8  # the largest singular value after normalising and rounding to bfloat16
SETS_OF_ANY_LENGTH = [name for name, chosen in COEFFICIENTS.items() if chosen.repeats]

# name -> (slope at 0, image of 0.3, ranges of sigma in [lo, ROUNDED_UP] / margin for three lo),
# calculated apart from the package, from the digits of the sources.
LOWS = (1e-3, 3e-3, 1e-2)
MAPS = {
    "keller": (484.87628710018, 1.079592292900, (0.471, 1.202), (0.682, 1.202), (0.682, 1.134)),
    "you5": (492.74962114283, 0.996224298488, (0.475, 1.145), (0.978, 1.145), (0.978, 1.032)),
    "you6": (1137.45139061071, 0.995600649217, (0.866, 0.999), (0.996, 0.999), (0.996, 0.999)),
    "polar_express": (976.26543000309, 0.910505274616, (0.840, 1.124), (0.870, 1.124), (0.870, 1.124)),
    "gram_newton_schulz": (803.94860244520, 1.093326473500, (0.729, 1.124), (0.846, 1.124), (0.846, 1.124)),
    "cans": (1008.00786072744, 1.019969595657, (0.857, 1.113), (0.867, 1.113), (0.867, 1.113)),
    "cubic5": (119.32446098872, 1.112287820189, (0.118, 1.300), (0.350, 1.300), (0.774, 1.300)),
    "deepseek_v4": (79262.8171711542, 1.000129924883, (1.0, 1.001), (1.0, 1.001), (1.0, 1.001)),
    "aol": (104.06455968666, 0.992516553333, (0.090, 1.084), (0.268, 1.084), (0.787, 1.084)),
}


def sweep(low: float, margin: float) -> torch.Tensor:
    ends = math.log10(low / margin), math.log10(ROUNDED_UP / margin)
    return torch.logspace(*ends, 100_001, dtype=torch.float64)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_digits(name):
    triples = resolve(name).triples
    slope, image, *_ = MAPS[name]
    assert math.prod(a for a, _, _ in triples) == pytest.approx(slope, rel=1e-13)
    sigma = torch.tensor(0.3, dtype=torch.float64)
    assert float(polynomial(sigma, triples)) == pytest.approx(image, abs=1e-12)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("position", range(len(LOWS)), ids=map(str, LOWS))
def test_range_with_the_margin(name, position):
    triples, margin, *_ = resolve(name)
    images = polynomial(sweep(LOWS[position], margin), triples)
    low, high = MAPS[name][2 + position]
    assert float(images.min()) == pytest.approx(low, abs=6e-4)
    assert float(images.max()) == pytest.approx(high, abs=6e-4)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_no_singular_value_changes_sign(name):
    triples, margin, *_ = resolve(name)
    assert (polynomial(sweep(1e-9, margin), triples) > 0).all()


@pytest.mark.parametrize("name", SETS_OF_ANY_LENGTH)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 8, 9, 20, 99])
def test_any_length_is_safe(name, steps):
    triples, margin, *_ = resolve(name, steps)
    images = polynomial(sweep(1e-9, margin), triples)
    assert (images > 0).all()
    assert images.max() < (1.21 if steps > 4 else 2.0)


def images_in_bfloat16(triples, margin: float) -> torch.Tensor:
    """What becomes of a block of equal entries, where rounding errors do not average out.

    The block is one row of n entries sigma / sqrt(n), so each matrix of the iteration has one value
    there; it is rounded to bfloat16 when stored, as every kernel does.
    """

    def stored(value: torch.Tensor) -> torch.Tensor:
        return value.bfloat16().double()

    n = torch.arange(16, 4096, 24, dtype=torch.float64)
    sigma = torch.logspace(-2, 0, 1001, dtype=torch.float64)[:, None] / margin
    x = stored(sigma / n.sqrt())
    for a, b, c in triples:
        A = stored(n * x**2)
        B = stored(b * A + c * A**2)
        x = stored(a * x + B * x)
    return x * n.sqrt()


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_rounding_to_bfloat16_neither_explodes_nor_changes_sign(name):
    triples, margin, *_ = resolve(name)
    images = images_in_bfloat16(triples, margin)
    assert images.min() > 0.2
    assert images.max() < 1.35


def test_cans_as_published_explodes_in_bfloat16():
    *widened, last = COEFFICIENTS["cans"].triples
    published = [(a * 1.01, b * 1.01**3, c * 1.01**5) for a, b, c in widened]
    assert images_in_bfloat16([*published, last], margin=1.01).max() > 1e3


def test_polar_express_is_its_own_definition():
    """Every triple is the best odd quintic on what the one before leaves of [1e-3, 1].

    Best on [l, u] means an error that takes its maximum at l, u and both extrema between, signs
    alternating; then scaled so that the images of l and u lie evenly around 1. The authors keep l
    above 0.024 u in the first of the two (arXiv 2505.16932, algorithm 1). Three equations for three
    numbers, so this pins every digit.
    """
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    *widened, last = resolve("polar_express", 8).triples
    for a, b, c in widened:
        a, b, c = a * 1.01, b * 1.01**3, c * 1.01**5

        def p(x, a=a, b=b, c=c):
            return x * (a + b * x**2 + c * x**4)

        root = math.sqrt(9 * b * b - 20 * a * c)
        maximum, minimum = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        assert p(maximum) == pytest.approx(p(high), abs=1e-13)
        assert p(minimum) == pytest.approx(p(max(low, cushion * high)), abs=1e-13)
        assert p(low) + p(high) == pytest.approx(2, abs=1e-13)
        low, high = p(low), 2 - p(low)
    # Where the intervals shrink to the point 1, that is the polynomial flattest there.
    assert last == (15 / 8, -10 / 8, 3 / 8)


def test_gram_newton_schulz_has_its_repository_digits():
    expected = [
        (7.892582874424408, -20.38301394587957, 13.555306149406924),
        (3.911484868135431, -2.5464635929060884, 0.4268988319673074),
        (3.760657955697423, -2.512819018216563, 0.4323647349070073),
        (3.160399673686287, -2.149649518898498, 0.3996366907664389),
        (2.1910971618617303, -1.441662010214663, 0.328146487623155),
    ]
    for triple, digits in zip(resolve("gram_newton_schulz").triples, expected, strict=True):
        assert triple == pytest.approx(digits, rel=1e-14)


def test_deepseek_v4_ends_in_two_steps_flat_at_one():
    *first, last_but_one, last = resolve("deepseek_v4").triples
    assert first == [KELLER] * 8
    assert last_but_one == last == (2.0, -1.5, 0.5)


@pytest.mark.parametrize(
    ("ns_coefficients", "ns_steps", "name", "steps"),
    [
        (DEFAULT, None, "keller", 5),
        ("keller", 7, "keller", 7),
        (KELLER, None, "keller", 5),
        (list(KELLER), 3, "keller", 3),
        ((2, -1.5, 0.5), None, "custom", 5),
        ((2, -1.5, 0.5), 12, "custom", 12),
        ([KELLER, (2, -1.5, 0.5)], None, "custom", 2),
        (([2, -1.5, 0.5],), 1, "custom", 1),
        ("you6", None, "you6", 6),
        ("you6", 6, "you6", 6),
        ("aol", None, "aol", 4),
        ("deepseek_v4", None, "deepseek_v4", 10),
        ("polar_express", None, "polar_express", 5),
        ("polar_express", 11, "polar_express", 11),
        ("cans", 3, "cans", 3),
    ],
)
def test_resolve(ns_coefficients, ns_steps, name, steps):
    schedule = resolve(ns_coefficients, ns_steps)
    assert schedule.name == name
    assert len(schedule.triples) == steps
    assert schedule.margin == (1.0 if name == "custom" else COEFFICIENTS[name].margin)
    assert all(type(number) is float for triple in schedule.triples for number in triple)


def test_resolve_keeps_order_and_repeats_the_last():
    assert resolve([(1, 2, 3), [4, 5, 6]]).triples == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    whole = COEFFICIENTS["polar_express"].triples
    assert resolve("polar_express", 3).triples == whole[:3]
    assert resolve("polar_express", 10).triples == (*whole, whole[-1], whole[-1])


@pytest.mark.parametrize(
    ("ns_coefficients", "ns_steps", "error", "message"),
    [
        ("jordan", None, ValueError, r"one of 'keller', 'you5', .* but is: 'jordan'"),
        (
            "you6",
            5,
            ValueError,
            r"'you6' has 6 steps but ns_steps is: 5; set ns_steps to None or 6",
        ),
        ([KELLER] * 3, 5, ValueError, r"has 3 steps but ns_steps is: 5; set ns_steps to None or 3"),
        ([KELLER] * 3, 2, ValueError, r"has 3 steps but ns_steps is: 2"),
        ((1.0, 2.0), None, ValueError, r"exactly 3 values \(a, b, c\) but are: \(1.0, 2.0\)"),
        ([(1.0, 2.0, 3.0, 4.0)], None, ValueError, r"exactly 3 values .* but are: \(1.0, .* 4.0\)"),
        ((), None, ValueError, r"exactly 3 values .* but are: \(\)"),
        ([[]], None, ValueError, r"exactly 3 values .* but are: \[\]"),
        ((1.0, math.nan, 3.0), None, ValueError, r"finite but are: \(1.0, nan, 3.0\)"),
        ([KELLER, (1.0, math.inf, 3.0)], None, ValueError, r"finite but are: \(1.0, inf, 3.0\)"),
        ((1.0, "2.0", 3.0), None, TypeError, r"three numbers .* but has: \(1.0, '2.0', 3.0\)"),
        (["keller", "you5", "aol"], None, TypeError, r"three numbers .* but has: \['keller'"),
        ([KELLER, 1.0], None, TypeError, r"three numbers .* but has: \[\(3.4445"),
        (3.4445, None, TypeError, r"three numbers .* but has: 3.4445"),
        (None, None, TypeError, r"three numbers .* but has: None"),
        (torch.ones(3), None, TypeError, r"three numbers .* but has: tensor"),
        ({"a": 1.0}, None, TypeError, r"three numbers .* but has: \{'a': 1.0\}"),
        ("keller", 0, ValueError, r"ns_steps should be >= 1 but is: 0"),
        (KELLER, -1, ValueError, r"ns_steps should be >= 1 but is: -1"),
        (
            *("keller", 100, ValueError),
            r"Number of steps must be less than 100 for computational efficiency but is: 100",
        ),
        ("keller", 5.0, TypeError, r"ns_steps should be an int or None but is: 5.0"),
        ("keller", True, TypeError, r"ns_steps should be an int or None but is: True"),
        ("keller", "5", TypeError, r"ns_steps should be an int or None but is: '5'"),
        ("keller", [5], TypeError, r"ns_steps should be an int or None but is: \[5\]"),
    ],
)
def test_resolve_refuses(ns_coefficients, ns_steps, error, message):
    with pytest.raises(error, match=message):
        resolve(ns_coefficients, ns_steps)


def test_resolve_refuses_what_equals_an_answer_it_remembers():
    resolve("keller", 1)
    with pytest.raises(TypeError):
        resolve("keller", True)


@pytest.mark.parametrize("ns_coefficients", ["polar_express", KELLER, (KELLER,) * 10])
def test_resolve_remembers(ns_coefficients):
    assert resolve(ns_coefficients, None) is resolve(ns_coefficients, None)


def test_numbers_beyond_fp32_are_refused() -> None:
    with pytest.raises(ValueError, match="fit fp32"):
        resolve((1e300, 1.0, 1.0))


def test_signatures_show_the_default() -> None:
    """As numbers, which a reader of `help(Muon)` knows from torch.optim.Muon."""
    for optimizer in (Muon, ZeroMuon):
        assert inspect.signature(optimizer).parameters["ns_coefficients"].default == COEFFICIENTS[DEFAULT].triples[0]
