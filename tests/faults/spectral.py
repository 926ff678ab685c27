"""Faults in powers of the spectrum: weights, sums of iterates in both forms, sums of matrices; see plant.py."""

from __future__ import annotations

from plant import Fault

TESTS = ["tests/test_spectral.py", "tests/test_products.py", "tests/test_plan.py"]

WEIGHTS, FIT = "exact_arithmetic or any_power", "fit_finds"
SUMS = "(test_spectral and odd_sizes) or (accuracy and shape1 and spaced)"
ROUNDING = "rounding"
ADD = "sums_are_exact"
SCALE = "test_scale or its_own"
ITERATION, SPECTRAL, EAGER = (f"muon_kernels/{name}.py" for name in ("newton_schulz", "powers", "backends/eager"))

FAULTS = [
    Fault("weights: as if σ were the power", "sigma[:, None] ** power\n", "sigma[:, None]\n", WEIGHTS, SPECTRAL),
    Fault(
        "weights: once", "for _ in range(rounds):\n        root", "for _ in range(1):\n        root", WEIGHTS, SPECTRAL
    ),
    Fault("weights: reach", "LOWEST = 3e-4", "LOWEST = 2e-3", WEIGHTS, SPECTRAL),
    Fault(
        "iterates: cubic",
        "x * (a + b * x**2 + c * x**4))\n    return torch.stack",
        "x * (a + b * x**2))\n    return torch.stack",
        WEIGHTS,
        SPECTRAL,
    ),
    Fault(
        "iterates: last not summed",
        "(0, *range(2, len(TRIPLES) + 1))",
        "(0, *range(2, len(TRIPLES)))",
        WEIGHTS,
        SPECTRAL,
    ),
    Fault(
        "triples: one digit",
        "(3.50266, -7.62293, 4.64233)",
        "(3.50266, -7.12293, 4.64233)",
        f"{WEIGHTS} or explode",
        SPECTRAL,
    ),
    Fault(
        "fit: forgets the error",
        "off = _iterates(triples, sigma)[:, iterates] @ weights / wanted - 1",
        "off = _iterates(triples, sigma)[:, iterates] @ weights / wanted",
        FIT,
        SPECTRAL,
    ),
    Fault(
        "fit: excess unseen",
        "return torch.relu((x * (a + b * x**2 + c * x**4)).abs() - 1)",
        "return torch.relu((x * (a + b * x**2 + c * x**4)).abs() - 9)",
        FIT,
        SPECTRAL,
    ),
    Fault("svd: rank", ".where(there, 0.0)", "", "references", SPECTRAL),
    Fault("coupled: size", "* (size * norm).sqrt()", "* norm.sqrt()", "references", SPECTRAL),
    Fault("measure: bound", "out=bound).pow_(0.25)", "out=bound).pow_(0.125)", SUMS, ITERATION),
    Fault(
        "measure: zero unguarded",
        "        bound.masked_fill_(torch.eq(bound, 0, out=is_zero), 1.0)\n",
        "",
        SCALE,
        ITERATION,
    ),
    Fault("measure: prologue's scale", "            blend.scale.mul_(scale)\n", "            pass\n", SCALE, ITERATION),
    Fault(
        "measure: factor without the bound",
        "bound.copy_(norms.copy_(bound).mul_(blend.norms))",
        "bound.copy_(blend.norms)",
        SUMS,
        ITERATION,
    ),
    Fault(
        "measure: factor without the scale",
        "power, out=blend.factor).mul_(blend.scale)",
        "power, out=blend.factor)",
        SUMS,
        ITERATION,
    ),
    Fault(
        "measure: of_square",
        "torch.square(blend.of_gram, out=blend.of_square)",
        "blend.of_square.copy_(blend.of_gram)",
        SUMS,
        ITERATION,
    ),
    Fault(
        "measure: of_gram",
        "torch.square(blend.scale, out=blend.of_gram)",
        "blend.of_gram.copy_(blend.scale)",
        SUMS,
        ITERATION,
    ),
    Fault(
        "standard: first square unscaled",
        "ops.add(B, alpha=c, out=B, scale=blend.of_gram)",
        "ops.add(B, alpha=c, out=B)",
        SUMS,
        ITERATION,
    ),
    Fault(
        "standard: first term", "total, kept = Square(X), weights[0]", "total, kept = Square(X), 1.0", SUMS, ITERATION
    ),
    Fault("standard: first term again and again", "            kept = 1.0\n", "", SUMS, ITERATION),
    Fault("standard: last iterate's a", "alpha=w + v * a, beta=kept", "alpha=w, beta=kept", SUMS, ITERATION),
    Fault(
        "standard: sum in the last product",
        "C=total.high, alpha=v, beta=1.0",
        "C=total.high, alpha=v, beta=0.0",
        SUMS,
        ITERATION,
    ),
    Fault(
        "standard: weight of another",
        "zip(triples[1:-1], weights[1:-2], strict=True)",
        "zip(triples[1:-1], weights[2:-1], strict=True)",
        SUMS,
        ITERATION,
    ),
    Fault(
        "gram: first identity",
        "ops.add(R, C=W, alpha=b, beta=c, gamma=a, out=to)",
        "ops.add(R, C=W, alpha=b, beta=c, out=to)",
        SUMS,
        ITERATION,
    ),
    Fault("gram: first square unscaled", "    ops.add(W, out=W, scale=blend.of_square)\n", "", SUMS, ITERATION),
    Fault(
        "gram: second visit unscaled",
        "ops.syrk(X_2, out=R, scale=blend.scale)",
        "ops.syrk(X_2, out=R)",
        SUMS,
        ITERATION,
    ),
    Fault(
        "gram: third visit unscaled", "ops.syrk(X_4, out=R, scale=blend.scale)", "ops.syrk(X_4, out=R)", SUMS, ITERATION
    ),
    Fault("gram: last two in one", "(w + v * a, v * b, v * c)", "(v * a, v * b, v * c)", SUMS, ITERATION),
    Fault("gram: identities between", "gamma=weight, out=spare)", "out=spare)", SUMS, ITERATION),
    Fault("gram: weights in another order", "reversed(weights[4:-2])", "weights[4:-2]", SUMS, ITERATION),
    Fault("gram: third term", "beta=weights[3], gamma=weights[2]", "beta=weights[3]", SUMS, ITERATION),
    Fault("gram: fourth term", "C=S, beta=weights[3]", "C=S, beta=0.0", SUMS, ITERATION),
    Fault("gram: first term", "C=X, beta=weights[0], out=X_4", "out=X_4", SUMS, ITERATION),
    Fault(
        "gram: a sum that is not symmetric",
        "ops.gemm(T, Q, C=S, beta=weights[3], gamma=weights[2], out=spare)",
        "ops.syrkx(T, Q, gamma=weights[2], out=spare); ops.add(S, C=spare, alpha=weights[3], beta=1.0, out=spare)",
        ROUNDING,
        ITERATION,
    ),
    Fault(
        "gram: diagonal of the sum",
        "out=spare)\n    ops.gemm(spare, X_2",
        "out=spare.high)\n    ops.gemm(Square(spare.high), X_2",
        ROUNDING,
        ITERATION,
    ),
    Fault("gram: second weight unnoticed", "    if weights[1]:\n", "    if False:\n", "second_iterate", ITERATION),
    Fault(
        "gram without precise squares",
        "_gram_sum if ops.precise_squares else _standard_sum",
        "_gram_sum",
        ROUNDING,
        ITERATION,
    ),
    Fault("cost: R² again", "        if squared and step == 0:\n", "        if False:\n", "costs", ITERATION),
    Fault(
        "eager: identity of a sum",
        "(gamma if C is None else gamma + beta * _diagonal(C))",
        "(0.0 if C is None else beta * _diagonal(C))",
        ADD,
        EAGER,
    ),
    Fault("eager: diagonal of the addend", "gamma + beta * _diagonal(C)", "gamma", ADD, EAGER),
    Fault("eager: scale of the diagonal", "        on_diagonal *= scale[:, None]\n", "", ADD, EAGER),
    Fault(
        "eager: beta of a sum",
        "total.copy_(C.high[at]).mul_(beta)",
        "total.copy_(C.high[at])",
        ADD,
        EAGER,
    ),
    Fault(
        "eager: scale of a sum",
        "total if scale is None else total.mul_(scale[at, None, None]))",
        "total)",
        ADD,
        EAGER,
    ),
    Fault(
        "eager: alpha alone",
        "total.copy_(A.high[at]).mul_(alpha)",
        "total.copy_(A.high[at])",
        ADD,
        EAGER,
    ),
]
