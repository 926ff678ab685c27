"""Plants faults in fused_step of Triton, one at a time, and sees whether the tests notice.

    python tests/triton/mutants_fused.py [--only NAME] [--log FILE]

A fault costs a compilation or two.
"""

from mutate import Mutant, main

FILE = "fused_step.py"
SMALL = "test_step and sm_80 and (17 or 160)"
ACCURATE = "test_accuracy and (keller or you6) and not largest and sm_80"
SCALES = "(scale_does or quiet or zero_nan) and sm_80"

MUTANTS = [
    # Precision.
    Mutant("two terms", FILE, "    c = tl.dot(a0, b2)\n    c = tl.dot(a1, b1, c)\n    c = tl.dot(a0, b1, c)\n    c = tl.dot(a2, b0, c)\n", "    c = tl.dot(a0, b1)\n", "test_accuracy_of_the_largest and you6 and sm_80"),
    Mutant("one term", FILE, "    c = tl.dot(a0, b2)\n    c = tl.dot(a1, b1, c)\n    c = tl.dot(a0, b1, c)\n    c = tl.dot(a2, b0, c)\n    c = tl.dot(a1, b0, c)\n    return tl.dot(a0, b0, c)", "    return tl.dot(a0, b0)", ACCURATE),
    Mutant("second term not of what is left", FILE, "v -= high.to(tl.float32)", "v -= 0.0", ACCURATE),
    Mutant("everything allowed", FILE, "_LIMIT = 4.0", "_LIMIT = 1e300", "refused"),
    # Iteration.
    Mutant("b and c exchanged", FILE, "tl.fma(product(R, R), c, tl.fma(R, b,", "tl.fma(product(R, R), b, tl.fma(R, c,", ACCURATE),
    Mutant("one step less", FILE, "range(steps)", "range(steps - 1)", ACCURATE),
    Mutant("coefficients of the first step", FILE, "of_step = coefficients + 3 * step", "of_step = coefficients + 0 * step", ACCURATE),
    Mutant("R by one factor", FILE, "for turn in range(3)", "for turn in range(2)", ACCURATE),
    Mutant("margin ignored", FILE, "tl.where(norm > least, norm, least) * margin)", "tl.where(norm > least, norm, least))", "test_accuracy and cubic5"),
    # Scales.
    Mutant("R not scaled down", FILE, "R = R * shrink * shrink +", "R = R +", SCALES),
    Mutant("a tile not scaled down", FILE, "* of_tile * of_tile", "", SCALES),
    Mutant("no power of two", FILE, "x = turned(x * power(-own), tall)", "x = turned(x, tall)", SCALES),
    Mutant("power of two forgotten in the update", FILE, " * power(-largest)", "", SCALES),
    Mutant("zero has no guard", FILE, "tl.where(trace == 0, 0.0, scale)", "scale", SCALES),
    # Edges and layouts.
    Mutant("lines beyond the matrix", FILE, "line[:, None] < tl.where(tall, N, M)", "line[:, None] < tl.where(tall, N, M) + 1", SMALL),
    Mutant("places beyond the matrix", FILE, "along[None, :] < vectors_of(tl.where(tall, M, N), WIDTH)", "along[None, :] < BLOCK + begin", SMALL),
    Mutant("last tile skipped", FILE, "    for begin in range(0, N, BLOCK):\n        line, along, inside = tile_at(begin, M, N, tall, WIDTH, BLOCK)\n        from_grad", "    for begin in range(0, N - BLOCK, BLOCK):\n        line, along, inside = tile_at(begin, M, N, tall, WIDTH, BLOCK)\n        from_grad", SMALL),
    Mutant("update of a tall tile not turned back", FILE, "turned(product(Q, turned(x, tall)) * scale, tall)", "product(Q, turned(x, tall)) * scale", SMALL),
    Mutant("a tall tile not turned", FILE, "x = turned(x * power(-own), tall)", "x = x * power(-own)", SMALL),
    Mutant("alignment not asked for", FILE, "WIDTH=tables.width(m, n, itemsize, None, p, g, *((b,) if b else ())),", "WIDTH=4,", SMALL),
    # Momentum and update.
    Mutant("direction from the momentum before its rounding", FILE, "new = stored.to(tl.float32)\n", "new = blend(g, tl.load(at, inside, 0.0).to(tl.float32), mu, rest, DAMPENED)\n", "test_dtypes and sm_80"),
    Mutant("nesterov ignored", FILE, "look_ahead(grad, momentum, mu, DAMPENED) if NESTEROV else momentum", "momentum", SMALL),
    Mutant("a compilation for a size", FILE, 'do_not_specialize=["M", "N", "steps"]', 'do_not_specialize=["M", "steps"]', "compilations and sm_80"),
]  # fmt: skip

if __name__ == "__main__":
    main(MUTANTS, "test_fused_step_triton.py", __doc__)
