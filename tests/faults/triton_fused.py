"""Faults in fused_step of triton_kernels; see plant.py."""

from __future__ import annotations

from functools import partial

import plant

KERNEL = "muon_kernels/triton_kernels/fused_step.py"
TESTS = ["tests/triton_kernels/test_fused_step_triton.py", "tests/triton_kernels/test_interpreter.py"]
Fault = partial(plant.Fault, file=KERNEL)

# Few tests: a kernel costs ten seconds to build, the interpreter nothing.
LOGIC = "interpreted and fused"
ACCURATE = "test_accuracy and keller and not largest"

FAULTS = [
    # Precision.
    Fault("one term", "    c = tl.dot(a1, b0, c)\n    return tl.dot(a0, b0, c)", "    return tl.dot(a0, b0)", ACCURATE),
    Fault("second term not of what is left", "v -= high.to(tl.float32)", "v -= 0.0", LOGIC),
    Fault("two terms where three are needed", "if TERMS == 3:", "if TERMS == 4:", LOGIC),
    # Iteration.
    Fault("one step less", "range(steps)", "range(steps - 1)", LOGIC),
    Fault("the first Q without the scale", "tl.where(step == 0, scale * S, Q)", "tl.where(step == 0, S, Q)", LOGIC),
    Fault("S once in R", "tl.where(step == steps - 1, 1, 3)", "tl.where(step == steps - 1, 1, 2)", LOGIC),
    Fault("products that nobody uses", "tl.where(step == steps - 1, 1, 3)", "3", "test_memory_traffic and sm_80 and 32x96-2-rows"),
    # Scales.
    Fault("R not scaled down", "R = R * shrink * shrink +", "R = R +", LOGIC),
    Fault("power of two forgotten in the update", " * power(-largest)", "", LOGIC),
    Fault("zero has no guard", "tl.where(trace == 0, 0.0, scale)", "scale", LOGIC),
    Fault("margin ignored", "* margin)\n    scale = tl.where(trace < ", "* 1.0)\n    scale = tl.where(trace < ", LOGIC),
    # Edges and layouts.
    Fault("lines beyond the matrix", "line[:, None] < tl.where(tall, N, M)", "line[:, None] < tl.where(tall, N, M) + 1", LOGIC),
    Fault("update of a tall tile not turned back", "turned(product(Q, turned(x, tall, WIDTH), TERMS), tall, WIDTH)", "product(Q, turned(x, tall, WIDTH), TERMS)", LOGIC),
    Fault("the first tile of the second pass only", "tile_at(zero * BLOCK, begin, M", "tile_at(zero * BLOCK, 0, M", LOGIC),
    Fault("32 bits: lines", "line[:, None] * line_stride +", "line[:, None] * line_stride.to(tl.int32) +", "test_offsets and sm_80", file="muon_kernels/triton_kernels/elementwise.py"),
    # Momentum and update.
    Fault("direction from the momentum before its rounding", "new = stored.to(tl.float32)\n", "new = blend(g, tl.load(at, inside, 0.0).to(tl.float32), mu, rest, DAMPENED)\n", LOGIC),
    Fault("everybody gets the ratio of the first", "tl.load(ratios + matrix)", "tl.load(ratios)", LOGIC),
    # What is compiled.
    Fault("alignment lost", "tile_at(zero * BLOCK, begin, M", "tile_at(zero, begin, M", "test_memory_traffic and sm_80 and 32x96-2-rows"),
    Fault("a compilation for a size", '"zero", "M", "N", "lr_at"', '"zero", "M", "lr_at"', "test_compilations"),
]  # fmt: skip
