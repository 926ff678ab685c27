"""Faults in fused_step; see plant.py."""

from __future__ import annotations

from functools import partial

import plant

KERNEL = "csrc/cuda/fused_step_sm80.cu"
Fault = partial(plant.Fault, file=KERNEL)

SMALL = "test_step and (1x1 or 3x17 or 29x32 or 16x160)"
ACCURATE = "test_accuracy and (keller or you5) and 16x160"
RACES = "test_no_races"
SCALES = "scale or quiet or zero"
OPTIONS = "test_options"
TRAFFIC = "test_memory_traffic"

TESTS = ["tests/cuda/test_fused_step.py"]

FAULTS = [
    # Barriers.
    Fault("no barrier before S is stored", "        __syncthreads();\n        store(x, terms);", "        store(x, terms);",
           RACES),
    Fault("no barrier after S is stored", "        store(x, terms);\n        __syncthreads();", "        store(x, terms);",
           RACES),
    Fault("no barrier after R is stored", "    square.store(R, s.terms);\n    __syncthreads();",
           "    square.store(R, s.terms);", RACES),
    Fault("no barrier after a tile is stored",
           "        __syncthreads();\n"
           "        tile.add_gram",
           "        tile.add_gram",
           RACES),
    Fault("no barrier before the update is read",
           "        __syncthreads();\n"
           "#pragma unroll\n"
           "        for (int u = 0; u < kUnits; ++u) {\n"
           "            const int count",
           "#pragma unroll\n        for (int u = 0; u < kUnits; ++u) {\n            const int count", RACES),
    # Precision.
    Fault("one term", "if (of_a + t >= terms) continue;", "if (of_a + t >= 1) continue;", ACCURATE),
    Fault("two terms always", "s.terms = f.terms;", "s.terms = 2;", "test_accuracy and you6 and 8x8"),
    Fault("second term not of what is left", "low -= term.x;", "low -= 0;", ACCURATE),
    Fault("any number of terms", "f.terms >= 2 && f.terms <= (f.rows > 64 ? kTerms<128> : kTerms<64>)", "true",
           "test_what_there_is_no_kernel_for"),
    Fault("the first Q is I", "phase == 1 || p == 0 ?", "phase == 1 ?", ACCURATE),
    Fault("always of R", "square.right_multiply(product, R, Q, phase != 1, s.terms);",
           "square.right_multiply(product, R, Q, true, s.terms);", ACCURATE),
    Fault("transpose of S", "base + t * kTermBytes, lane, 16 * k, 8 * j, false)",
           "base + t * kTermBytes, lane, 16 * k, 8 * j, true)", ACCURATE),
    # Iteration.
    Fault("b and c exchanged", "fmaf(triple[2], product[j][i], fmaf(triple[1],",
           "fmaf(triple[1], product[j][i], fmaf(triple[2],", ACCURATE),
    Fault("one step less", "4 * s.steps - 3", "4 * s.steps - 7", ACCURATE),
    Fault("margin ignored", "* s.margin);", "* 1.0f);", "test_accuracy and aol and 16x160"),
    Fault("coefficients of the first step", "s.coefficients[p / 4]", "s.coefficients[0]", ACCURATE),
    # Scales.
    Fault("R not scaled down", "R[j][i] * shrink * shrink", "R[j][i]", SCALES),
    Fault("R scaled down by half", "R[j][i] * shrink * shrink", "R[j][i] * shrink", SCALES),
    Fault("no power of two", "if (larger > exponent) {", "if (false) {", SCALES),
    Fault("zero has no guard", "norm == 0 ? 0 : 1 /", "1 /", SCALES),
    # Edges and layouts.
    Fault("tail of a unit read whole",
           "x[i] = i < count ? p[i * from.stride] : 0.0f",
           "x[i] = p[i * from.stride]", SMALL),
    Fault("tail of a unit written whole",
           "if (i < count) p[i * to.stride] = x[i];",
           "p[i * to.stride] = x[i];", SMALL),
    Fault("32 bits: what is read", "int64_t offset = line * from.line_stride + place * from.stride;",
           "int offset = line * from.line_stride + place * from.stride;", "test_offsets"),
    Fault("32 bits: what is written", "int64_t offset = line * to.line_stride + place * to.stride;",
           "int offset = line * to.line_stride + place * to.stride;", "test_offsets"),
    Fault("alignment not asked for", "line_stride % kUnit == 0 && address", "address", SMALL),
    Fault("last tile skipped", "for (int col = 0; col < s.cols; col += BLOCK_K) {\n        __syncthreads();",
           "for (int col = 0; col + BLOCK_K <= s.cols; col += BLOCK_K) {\n        __syncthreads();", SMALL),
    Fault("rows 8 to 15 in the place of 0 to 7",
           "const int row = first_row + 8 * half, column",
           "const int row = first_row, column", SMALL),
    # Momentum and update.
    Fault("gradient's scale forgotten in the second pass",
           "const float g = grad[u][i] * s.grad_scale;\n"
           "        if (!s.has",
           "const float g = grad[u][i];\n        if (!s.has", OPTIONS),
    Fault("lerp of one branch", "return weight < 0.5f ?", "return true ?", "to_the_bit"),
    Fault("gradient not read without momentum", "!s.has_momentum || s.nesterov;", "s.nesterov;", OPTIONS),
    Fault("cautious where the signs differ", "change * p[i] >= 0", "change * p[i] <= 0", OPTIONS),
    Fault("bf16 of the wrong bits", "p[to.stride] = static_cast<uint16_t>(bits.x >> 16);", "p[to.stride] = static_cast<uint16_t>(bits.x);", "test_dtypes"),
    Fault("16-bit tail of one read as two", "if (count > 1) bits.x |= p[from.stride] << 16;",
           "if (count > 0) bits.x |= p[from.stride] << 16;", "test_dtypes"),
    Fault("16-bit tail of two read as three", "if (count > 2) bits.y = p[2 * from.stride];",
           "if (count > 1) bits.y = p[2 * from.stride];", "test_dtypes"),
    Fault("16-bit tail of three written as four", "if (count > 3) p[3 * to.stride] =", "if (count > 2) p[3 * to.stride] =",
           "test_dtypes"),
    Fault("16-bit tail of one written as two", "if (count > 1) p[to.stride] =", "if (count > 0) p[to.stride] =",
           "test_dtypes"),
    Fault("f16 taken for bf16", "half(dtype == DType::f16)", "half(false)", "test_dtypes"),
    Fault("second launch: the first one's ratios", "f.apply.ratio[from]", "f.apply.ratio[i]", "test_counts"),
    Fault("exponents up to 127", "(largest >> 23) - 127, 126)", "(largest >> 23) - 127, 127)", SCALES),
    Fault("second launch begins anew", "const int64_t from = first + i;", "const int64_t from = i;", "test_counts"),
    # Speed.
    Fault("no swizzle", "(chunk ^ (line / kLinesOfBanks & kMask))", "chunk", TRAFFIC),
    Fault("no vectors", "vectors = stride == 1 &&", "vectors = false &&", TRAFFIC),
]  # fmt: skip

# Only the two smallest kernels, which have all the code.
LEAN = [
    ("    if (rows <= 64) return launch<64>(args, count, stream);\n    return launch<128>(args, count, stream);\n",
     "    return {Status::invalid_argument, 0};\n", KERNEL),
    ("    if (rows <= 32) return launch<32>", "    return launch<32>", KERNEL),
]  # fmt: skip
