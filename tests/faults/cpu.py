"""Plants faults in the kernels and in the Python core, one at a time, and sees whether the tests notice.

    python tests/mutants.py [--only NAME] [--log FILE] [--jobs COUNT]

It works on a copy of the repository's tracked files and takes half an hour: most faults cost a build. What only costs
time, or changes what nobody reads, is no fault and not in the list.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from plant import place_of

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """A fault: `old`, which occurs exactly once in `file`, becomes `new`; `tests` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: str


PRODUCTS = 'tests/test_products.py -k "cpu-"'
AVX2 = 'tests/test_products.py -k "cpu-avx2"'
AVX512 = 'tests/test_products.py -k "cpu-avx512 and not bf16"'
AMX = 'tests/test_products.py -k "cpu-amx"'
AVX512BF16 = 'tests/test_products.py -k "cpu-avx512bf16"'
FLOATS = 'tests/test_products.py -k "cpu-avx2 or (cpu-avx512 and not bf16)"'
ELEMENTWISE = 'tests/test_elementwise.py -k "cpu-"'
MEMORY = 'tests/test_elementwise.py -k "memory"'
BATCH = 'tests/test_newton_schulz.py -k "batch and cpu-"'
ITERATION = 'tests/test_newton_schulz.py -k "cpu- and (keller or aol or deepseek)"'
COEFFICIENTS = "tests/test_coefficients.py"
SPLIT = 'tests/test_split.py -k "cpu- or not cpu"'

PRODUCT_H, ELEMENTWISE_H = "csrc/cpu/product.h", "csrc/cpu/elementwise.h"
PAIRS_H, FLOATS_H, AVX512_H = "csrc/cpu/pairs.h", "csrc/cpu/floats.h", "csrc/cpu/avx512.h"
AVX512BF16_H, TILES_H, AMX_CPP = "csrc/cpu/avx512bf16.h", "csrc/cpu/tiles.h", "csrc/cpu/kernels_amx.cpp"
TRANSPOSE_H, DISPATCH, PARALLEL = "csrc/cpu/transpose.h", "csrc/cpu/dispatch.cpp", "csrc/cpu/parallel.cpp"
NATIVE_PY, NEWTON_SCHULZ = "muon_kernels/backends/native.py", "muon_kernels/newton_schulz.py"
MOMENT, SUMS = "muon_kernels/stages/second_moment.py", "muon_kernels/stages/sums.py"
OPTIMIZER, CHECKPOINT = "muon_kernels/optimizers/muon.py", "muon_kernels/checkpoint.py"
SCALING, COEFFICIENTS_PY = "muon_kernels/scaling.py", "muon_kernels/coefficients.py"
LAYOUT, SPLIT_PY = "muon_kernels/layout.py", "muon_kernels/split.py"
PARAM_GROUPS = "muon_kernels/optimizers/param_groups.py"
OPERANDS, BUCKET, CACHE, WORK, RUN, ORTHOGONALIZE = (
    f"muon_kernels/step/{name}.py" for name in ("operands", "bucket", "cache", "work", "run", "orthogonalize")
)


def _product(name: str, old: str, new: str, tests: str = PRODUCTS) -> Fault:
    return Fault(name, PRODUCT_H, old, new, tests)


def _pairs(name: str, old: str, new: str) -> Fault:
    return Fault(name, PAIRS_H, old, new, AVX512BF16)


def _floats(name: str, old: str, new: str) -> Fault:
    return Fault(name, FLOATS_H, old, new, FLOATS)


def _elementwise(name: str, old: str, new: str) -> Fault:
    return Fault(name, ELEMENTWISE_H, old, new, ELEMENTWISE)


def _variants(name: str, old: str, new: str) -> Fault:
    return Fault(name, ELEMENTWISE_H, old, new, 'tests/test_variants.py -k "cpu- and (everybodys or cautious)"')


FAULTS = [
    # The multiplication of a tile.
    _pairs("odd k: last element lost", "if (k & 1) {", "if (false) {"),
    _pairs(
        "odd k: neighbour read", "(r % 3) * a_stride], 0};", "(r % 3) * a_stride], row[r / 3][(r % 3) * a_stride + 1]};"
    ),
    _product("chunks of k: not accumulated", "sums_stride, k0 + q > 0);", "sums_stride, q > 0);"),
    _product("chunks of k: every second one skipped", "k0 < k; k0 += M::kBlockK)", "k0 < k; k0 += 2 * M::kBlockK)"),
    _floats("floats: every row is the first", "I::broadcast(a[r])", "I::broadcast(a[0])"),
    _floats(
        "floats: last element lost",
        "q < k; ++q) {\n            typename I::Acc b[V]",
        "q < k - 1; ++q) {\n            typename I::Acc b[V]",
    ),
    *[
        Fault(f"tiles: {name}", file, old, new, AMX)
        for file, name, old, new in [
            (TILES_H, "second sixteen rows a row early", "a + kTile * a_stride;", "a + (kTile - 1) * a_stride;"),
            (TILES_H, "second sixteen columns again the first", "load_tile<7>(panel + kTile,", "load_tile<7>(panel,"),
            (TILES_H, "a product added to another's sums", "multiply_tiles<2, 5, 6>", "multiply_tiles<1, 5, 6>"),
            (TILES_H, "ragged rows read in place", "if (rows % kTile == 0 && k % kDeep == 0)", "if (k % kDeep == 0)"),
            (TILES_H, "ragged k read in place", "if (rows % kTile == 0 && k % kDeep == 0)", "if (rows % kTile == 0)"),
            (TILES_H, "copy without its zeros", "std::fill(room + count, room + deep, 0);", ""),
            (TILES_H, "sums not loaded", "if (accumulate) {", "if (false) {"),
            (TILES_H, "one line of tiles where there are two", "if (rows > kTile)", "if (rows > kTile + 15)"),
            (AMX_CPP, "a row too few", "rows[16] = {16,", "rows[16] = {15,"),
            (AMX_CPP, "not configured", 'asm volatile("ldtilecfg %0" ::"m"(config));', ""),
            (PRODUCT_H, "a step of k met with the first's panel", "+ full * M::column(q);", ";"),
            (
                PRODUCT_H,
                "every second step of k skipped",
                "q < depth; q += M::kStepK)",
                "q < depth; q += 2 * M::kStepK)",
            ),
            (
                AVX512BF16_H,
                "no zeros below the last pair",
                "q < std::min<int64_t>(16, pairs)",
                "q < std::min<int64_t>(16, (k + 1) / 2)",
            ),
        ]
    ],
    # Packing.
    _pairs("pack: beyond the last row read", "2 * q + 1 < b.k ? even + b.stride : nullptr", "even + b.stride"),
    _pairs("pack: ragged columns lose one", "std::max<int64_t>(count, 0)", "std::max<int64_t>(count - 1, 0)"),
    _pairs("pack: second vector of a panel is the first", "packed + j * pairs + c, width", "packed + j * pairs, width"),
    *[
        Fault(name, AVX512BF16_H, old, new, AVX512BF16)
        for name, old, new in [
            ("pack: beyond the last line read", "i < lines ?", "true ?"),
            ("pack: beyond the last of k read", "deep = k < 32 ? (1u << k) - 1 : 0xffffffff", "deep = 0xffffffff"),
            ("pack: last pair of k lost", "(16, pairs)", "(16, k / 2)"),
            ("pack: ragged rows are whole", "first(count), odd)", "0xffff, odd)"),
            ("few rows: beyond the last of k read", "deep = k - q < 32 ? (1u << (k - q)) - 1 :", "deep = false ? 0 :"),
            ("few rows: half of the lanes", "add(_mm512_unpacklo_ps(a, b),", "add(_mm512_setzero_ps(),"),
            ("few rows: a quarter twice", "_mm512_shuffle_f32x4(a, b, 0xdd)", "_mm512_shuffle_f32x4(a, b, 0x88)"),
            ("few rows: two rows one", "(sums, 3)", "(sums, 2)"),
        ]
    ],
    Fault(
        "pack: a quarter of a transposition twice",
        AVX512_H,
        "_mm512_unpackhi_epi64(t[",
        "_mm512_unpacklo_epi64(t[",
        AVX512BF16,
    ),
    _product("few rows: blocks on the diagonal left out", "j <= i; j += kStep", "j < i; j += kStep"),
    _product("few rows: beyond the last one read", "std::min(j + r, m - 1)", "j + r"),
    _product("few rows: not mirrored", "    mirror(p.out, matrix, 0, m);\n", ""),
    _product("packed as it lies: not symmetric", "p.b_transposed && !p.a_diagonal;", "false;"),
    _floats("floats: second vector of a panel is the first", "packed + j * b.k + c, width", "packed + j * b.k, width"),
    _floats("floats: lines of a second vector are the first's", "b.data + (j + c) * b.stride", "b.data + j * b.stride"),
    _floats("floats: beyond the last column read", "std::max<int64_t>(b.cols - j - c, 0)", "I::kLanes"),
    _floats("floats: ragged columns lose one", "std::max<int64_t>(b.cols - j - c, 0)", "b.cols - j - c - 1"),
    _floats("floats: tail of k loses one", "i < deep; ++i)", "i < (deep | 1); ++i)"),
    _floats("floats: beyond the last of k read", "std::min<int64_t>(16, k - q)", "16"),
    Fault("floats: beyond the last line read", TRANSPOSE_H, "if (i >= lines) {", "if (false) {", FLOATS),
    Fault(
        "transpose: a quarter twice, of eight lines",
        TRANSPOSE_H,
        "_mm256_unpackhi_epi32(s[",
        "_mm256_unpacklo_epi32(s[",
        AVX2,
    ),
    Fault("few words: four of them lost", TRANSPOSE_H, "if (count & 4)", "if (count & 0)", FLOATS),
    _product("tiles of a in one place", "a_room + (t - t0) *", "a_room + 0 * (t - t0) *"),
    _product("tiles of a between two lots skipped", "t0 += M::kTiles)", "t0 += M::kTiles + 1)"),
    _product(
        "a panel of another matrix taken for a", "return p.b_transposed && same(p.a, p.b);", "return p.b_transposed;"
    ),
    _product("every panel is the first", "panel = packed + j * M::column", "panel = packed + 0 * j * M::column"),
    # Cutting into tasks and tiles.
    _product(
        "ragged block of columns skipped",
        "ceil_div(p.out.cols, std::max<int64_t>(column_block(p), 1))",
        "std::max<int64_t>(1, p.out.cols / std::max<int64_t>(column_block(p), 1))",
    ),
    _product(
        "last row of a tile not finished",
        "finish(p, matrix, i0, i1 - i0,",
        "finish(p, matrix, i0, std::max<int64_t>(i1 - i0 - 1, 1),",
    ),
    _product(
        "symmetric: one tile too many skipped",
        "if (p.symmetric && i1 <= j0 + j) continue;",
        "if (p.symmetric && i1 <= j0 + j + 1) continue;",
    ),
    # Mirroring.
    _product("mirror: dropped", "    if (p.symmetric) mirror(p.out, matrix, j0, cols);\n", ""),
    _product("mirror: every second block", "j < j0 + cols; j += 16) {", "j < j0 + cols; j += 32) {"),
    _product("mirror: not within diagonal blocks", "mirror_16x16_u16(base + j * stride + j, stride, end - j);", ""),
    # Finishing.
    _product("scale forgotten", "p.scale ? p.scale[matrix] : 1.0f, scale", "1.0f, scale"),
    _product(
        "scale of the first matrix", "p.scale ? p.scale[matrix] : 1.0f, scale", "p.scale ? p.scale[0] : 1.0f, scale"
    ),
    _product("alpha not scaled", "const float alpha = p.alpha * scale,", "const float alpha = p.alpha,"),
    _product(
        "beta not scaled",
        "scale, beta = p.beta * scale;\n    const Acc alphas",
        "scale, beta = p.beta;\n    const Acc alphas",
    ),
    _product("gamma forgotten", ": value) + p.gamma * scale;", ": value);"),
    _product("gamma not scaled", ": value) + p.gamma * scale;", ": value) + p.gamma;"),
    _product(
        "alpha where beta belongs",
        "multiply_add(betas, I::widen(c_row",
        "multiply_add(alphas, I::widen(c_row",
    ),
    _product("diagonal of a ignored", "(p.a_diagonal ? kADiagonal : 0)", "0"),
    _product("diagonal of b ignored", "(p.b_diagonal ? kBDiagonal : 0)", "0"),
    _product("diagonal of b counts on the diagonal only", "if (kB) value = I::", "if (false) value = I::"),
    _product("product of the diagonals forgotten", "value + a_diagonal[i] * b_diagonal[i] : value", "value : value"),
    _product("square: one diagonal for both", "I::add(I::broadcast(a_ii), b_jj)", "I::add(b_jj, b_jj)"),
    _product("square: chosen for any c", "p.b_diagonal && p.c.data == p.a.data", "p.b_diagonal && p.c.data"),
    _product("update: chosen for any c", "!p.b_diagonal && p.c.data == p.b.data", "!p.b_diagonal && p.c.data"),
    _product("update: chosen with a diagonal of b", "!p.b_diagonal && p.c.data == p.b", "p.c.data == p.b"),
    _product("update: diagonal forgotten", "I::broadcast(alpha * a_ii + beta)", "I::broadcast(beta)"),
    _product("addends of the first row", "            b_row += b.row_stride;\n", ""),
    _product("ragged columns lose one", "finish(j, end - j);", "finish(j, end - j - 1);"),
    _product("scale of X Xᵀ not squared", "p.b_transposed ? once * once : once", "once"),
    _product("diagonal of c ignored", "if (p.c_diagonal) value", "if (false) value"),
    _product(
        "diagonal of out is that of another matrix",
        "p.out_diagonal[matrix * m + i] = value",
        "p.out_diagonal[i] = value",
    ),
    # Instruction sets.
    Fault("avx2: ties upwards", "csrc/cpu/kernels_avx2.cpp", "(0x7fff)", "(0x8000)", AVX2),
    Fault("avx2: NaN becomes infinity", "csrc/cpu/kernels_avx2.cpp", "0x7fc0", "0x7f80", AVX2),
    Fault("avx512: ties upwards", AVX512_H, "(0x7fff)", "(0x8000)", AVX512),
    Fault("avx512: NaN becomes infinity", AVX512_H, "0x7fc0", "0x7f80", AVX512),
    Fault("avx512: one lane too few", AVX512_H, "(1u << count) - 1", "(1u << count) / 2 - 1", AVX512),
    Fault("avx512: one lane too many", AVX512_H, "(1u << count) - 1", "(2u << count) - 1", AVX512),
    Fault("avx512: multiply_add subtracts", AVX512_H, "_mm512_fmadd_ps", "_mm512_fmsub_ps", AVX512),
    Fault(
        "bf16: truncated", "csrc/cpu/bf16.h", "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16", ELEMENTWISE
    ),
    Fault("bf16: ties downwards", "csrc/cpu/bf16.h", " + ((bits >> 16) & 1u)", "", ELEMENTWISE),
    Fault("bf16: NaN becomes zero", "csrc/cpu/bf16.h", "? 0x7fc0u : rounded", "? rounded : rounded", ELEMENTWISE),
    Fault("mirror: one column late in a block", TRANSPOSE_H, "kStep + 15 - i", "kStep + 14 - i", PRODUCTS),
    Fault("mirror: ragged block", TRANSPOSE_H, "a[i * stride + j] = a[j * stride + i];", ";", PRODUCTS),
    Fault(
        "avx512: pairs swapped",
        AVX512BF16_H,
        "0x100000, 0x110001,",
        "0x000010, 0x110001,",
        AVX512BF16,
    ),
    Fault(
        "transpose: a quarter twice",
        TRANSPOSE_H,
        "= _mm256_unpackhi_epi64(r[8 * i + h], r[8 * i + 4 + h])",
        "= _mm256_unpacklo_epi64(r[8 * i + h], r[8 * i + 4 + h])",
        PRODUCTS,
    ),
    Fault(
        "transpose: ragged columns taken as whole",
        TRANSPOSE_H,
        "i + 16 <= rows && j + 16 <= cols",
        "i + 16 <= rows",
        ELEMENTWISE,
    ),
    Fault(
        "transpose: ragged rows taken as whole",
        TRANSPOSE_H,
        "i + 16 <= rows && j + 16 <= cols",
        "j + 16 <= cols",
        ELEMENTWISE,
    ),
    # The prologue and the epilogue.
    _elementwise(
        "sum of squares: tail of a run lost",
        "for (int l = 0; i + l < n; ++l) lane[l] +=",
        "for (int l = 0; i + 15 + l < n; ++l) lane[l] +=",
    ),
    _elementwise("sum of squares: a lane lost", "l < 16; ++l) sum += lane[l]", "l < 15; ++l) sum += lane[l]"),
    _elementwise(
        "gradient walked the other way",
        "along_rows ? g.col_stride : g.row_stride",
        "along_rows ? g.row_stride : g.col_stride",
    ),
    _elementwise(
        "strides of the gradient swapped",
        "row * g.row_stride + col * g.col_stride",
        "row * g.col_stride + col * g.row_stride",
    ),
    _elementwise(
        "parameter walked the other way",
        "along_rows ? p.col_stride : p.row_stride",
        "along_rows ? p.row_stride : p.col_stride",
    ),
    _elementwise("scale of the gradient ignored", "if (grad_scale != 1.0f || !u.momentum) {", "if (!u.momentum) {"),
    _elementwise(
        "momentum not stored",
        "    if (buffer == buffer_room) store_run(pointer(b), u.momentum_dtype, offset, stride, n, buffer);\n",
        "",
    ),
    _elementwise(
        "dampened: the other branch of lerp",
        "__builtin_fmaf(rest - 1.0f, grad[i] - buffer[i], grad[i])",
        "__builtin_fmaf(rest - 1.0f, grad[i] - buffer[i], buffer[i])",
    ),
    _elementwise(
        "un-dampened: mu on the gradient",
        "buffer[i] = __builtin_fmaf(mu, buffer[i], grad[i])",
        "buffer[i] = __builtin_fmaf(mu, grad[i], buffer[i])",
    ),
    _elementwise(
        "nesterov, un-dampened: gradient forgotten",
        "direction[i] = __builtin_fmaf(mu, buffer[i], grad[i])",
        "direction[i] = mu * buffer[i]",
    ),
    _elementwise(
        "nesterov: large mu",
        "__builtin_fmaf(mu - 1.0f, buffer[i] - grad[i], buffer[i])",
        "__builtin_fmaf(mu - 1.0f, buffer[i] - grad[i], grad[i])",
    ),
    _elementwise(
        "nesterov: small mu",
        "__builtin_fmaf(mu, buffer[i] - grad[i], grad[i])",
        "__builtin_fmaf(mu, buffer[i] - grad[i], buffer[i])",
    ),
    _elementwise(
        "tail of a line lost",
        "const int64_t n = std::min(kRun, length - col);\n                momentum_run(",
        "const int64_t n = std::min(kRun, (length - col) & ~int64_t{1});\n                momentum_run(",
    ),
    _elementwise(
        "x written at the first run",
        "row * u.x.row_stride + col, 1, n, direction)",
        "row * u.x.row_stride, 1, n, direction)",
    ),
    _elementwise(
        "rescale: odd exponents",
        "__builtin_ldexpf(1.0f, exponent - exponent / 2)",
        "__builtin_ldexpf(1.0f, exponent / 2)",
    ),
    _elementwise("decay applied twice", "value[i] * factor)", "value[i] * factor * factor)"),
    # Cautious decay and stochastic rounding.
    _variants("cautious: not where the update is zero", "change > 0x80000000u", "change >= 0x80000000u"),
    _variants("cautious: without the parameter's sign", "^ (bits & 0x80000000u);", "^ (bits & 0u);"),
    _variants("random bits: a column has its neighbour's", "32 * (row % 2) : 16 * (col % 2)", "32 * (row % 2) : 0"),
    _variants("random bits: rows walk on by columns", "along_rows ? 1 : blocks) * kStep", "true ? 1 : blocks) * kStep"),
    _variants("random bits: of the first matrix", "(options.first + matrix) *", "options.first *"),
    Fault("random bits: of the first matrix, in a fused step", DISPATCH, "options.first += matrix;", "", ELEMENTWISE),
    *[
        Fault(name, file, old, new, f'tests/test_variants.py -k "{tests}"')
        for name, file, old, new, tests in [
            ("random bits: buckets share them", WORK, "self.seed + group_index", "self.seed", "own_seed"),
            ("random bits: chunks share them", WORK, '"first": chunk_index}', '"first": 0}', "buckets"),
            ("random bits: steps share them", OPTIMIZER, 'group.get("step", 0) + 1', "0", "own_bits"),
            ("random bits: groups share them", OPTIMIZER, " + (index << 24)", "", "buckets"),
            (
                "second moment: not scaled by it",
                MOMENT,
                "multiply(X, factor.mul_(norm_kept(before, after)), block)",
                "multiply(X, norm_kept(before, after), block)",
                "test_second",
            ),
            (
                "second moment: norm not kept",
                MOMENT,
                "return kept.flatten().tolist()",
                "return [1.0] * len(X)",
                "test_second",
            ),
            ("second moment: of zeros", SUMS, "after.clamp_(min=TINY)", "after", "what_has_no"),
            ("second moment: not stored", MOMENT, "moment.copy_(new)", "pass", "test_second"),
            (
                "second moment: rows of another matrix",
                BUCKET,
                "moment.layout(span)).view()",
                "moment.layout(span._replace(start=0, stop=span.stop - span.start))).view()",
                "test_second",
            ),
            (
                "second moment: rounded on loading",
                CHECKPOINT,
                '"mantissa", "second_momentum_buffer")',
                '"mantissa")',
                "resumes",
            ),
            (
                "second moment: in a stale plan",
                OPTIMIZER,
                "own = momenta, moments, scales, mantissas",
                "own = momenta, scales, mantissas",
                "does_not_fit",
            ),
            ("scheduled decay: without peak_lr", SCALING, "weight_decay * lr / peak_lr", "weight_decay * lr", "forms"),
            (
                "independent decay: times lr",
                SCALING,
                "return lr, weight_decay / lr if lr else 0.0",
                "return lr, weight_decay if lr else 0.0",
                "forms",
            ),
            ("independent decay: at lr 0", SCALING, "max(lr, 1e-30) if lr else 0.0", "max(lr, 1e-30)", "forms"),
        ]
    ],
    _elementwise("step size of another matrix", "u.ratio[matrix]", "u.ratio[0]"),
    _elementwise("update with the wrong sign", "__builtin_fmaf(-step_size,", "__builtin_fmaf(step_size,"),
    _elementwise("weight decay not times lr", "1 - u.lr * u.weight_decay", "1 - u.weight_decay"),
    _elementwise("step size not times lr", "u.lr * u.ratio[matrix]", "u.ratio[matrix]"),
    # Dispatch, threads and the queue of products.
    Fault("margin ignored", DISPATCH, "std::max(mantissa, eps) * margin", "std::max(mantissa, eps)", ELEMENTWISE),
    Fault("scale of another power of two", DISPATCH, "* margin), 1 - exponent)", "* margin), -exponent)", ELEMENTWISE),
    Fault("scale of a zero matrix", DISPATCH, "if (norm == 0) return 0;", "", ELEMENTWISE),
    Fault(
        "scale of an infinite matrix", DISPATCH, "if (!std::isfinite(norm)) return", "if (false) return", ELEMENTWISE
    ),
    Fault(
        "fused: last matrix skipped",
        DISPATCH,
        "args.count, [&](int64_t matrix, int slot) {",
        "args.count - 1, [&](int64_t matrix, int slot) {",
        ELEMENTWISE,
    ),
    Fault("fused: gradient of the first matrix", DISPATCH, "momentum.grad += matrix;", "", ELEMENTWISE),
    Fault("fused: momentum of the first matrix", DISPATCH, "momentum.momentum += matrix;", ";", ELEMENTWISE),
    Fault("fused: parameter of the first matrix", DISPATCH, "apply.param += matrix;", "", ELEMENTWISE),
    Fault("fused: ratio of the first matrix", DISPATCH, "apply.ratio += matrix;", "", ELEMENTWISE),
    Fault(
        "fused: all threads in the first slot",
        DISPATCH,
        "        momentum.x.data += slot * momentum.x.batch_stride;\n",
        "",
        ELEMENTWISE,
    ),
    Fault("fused: scale of the first slot", DISPATCH, "momentum.scale += slot;", "", ELEMENTWISE),
    Fault("fused: norm of the last block only", DISPATCH, "sum += partial;", "sum = partial;", ELEMENTWISE),
    Fault(
        "fused: products of the first slot",
        DISPATCH,
        "args.product_count, slot, scratch",
        "args.product_count, 0, scratch",
        ELEMENTWISE,
    ),
    Fault(
        "whole matrices: last one skipped",
        DISPATCH,
        "parallel_for(threads, batch, [&](int64_t matrix, int thread) {",
        "parallel_for(threads, batch - 1, [&](int64_t matrix, int thread) {",
        PRODUCTS,
    ),
    Fault(
        "whole matrices: last block skipped",
        DISPATCH,
        "t < tasks; ++t)",
        "t < std::max<int64_t>(tasks - 1, 1); ++t)",
        PRODUCTS,
    ),
    Fault("whole matrices: always the first", DISPATCH, "matrix * tasks + t", "t", PRODUCTS),
    Fault(
        "whole matrices: always the first product",
        DISPATCH,
        "kernels.product_task(list[i], matrix",
        "kernels.product_task(list[0], matrix",
        BATCH,
    ),
    Fault(
        "shared columns: last product skipped",
        DISPATCH,
        "batch && i < count; ++i)",
        "batch && i + 1 < count; ++i)",
        PRODUCTS,
    ),
    Fault(
        "shared columns: always the first product",
        DISPATCH,
        "kernels->product_task(list[i], task,",
        "kernels->product_task(list[0], task,",
        BATCH,
    ),
    Fault("scratch: threads share it", DISPATCH, "data + thread * stride", "data + 0 * thread", PRODUCTS),
    Fault(
        "scratch: of a product not looked at",
        DISPATCH,
        "    if (!scratch.data) return Status::out_of_memory;\n    if (batch",
        "    if (batch",
        MEMORY,
    ),
    Fault(
        "scratch: of a fused step not looked at",
        DISPATCH,
        "    if (!scratch.data) return Status::out_of_memory;\n    parallel_for(threads, args.count",
        "    parallel_for(threads, args.count",
        MEMORY,
    ),
    Fault(
        "norm of what was not rounded yet",
        DISPATCH,
        "sum < 0x1p-236 ? rescaled : ",
        "",
        "tests/test_newton_schulz.py -k numbers_below",
    ),
    Fault("operands not checked", DISPATCH, "if (!valid(list[i]) || list[i]", "if (list[i]", PRODUCTS),
    Fault(
        "sums of squares: blocks of other matrices",
        DISPATCH,
        "[i * blocks + block]",
        "[block * batch + i]",
        ELEMENTWISE,
    ),
    Fault(
        "sums of squares: first block lost",
        DISPATCH,
        "int64_t block = 0; block < blocks",
        "int64_t block = blocks > 1; block < blocks",
        ELEMENTWISE,
    ),
    Fault(
        "rescale: one power of two short",
        DISPATCH,
        "kernels.rescale(u.x, i, 1 - exponent)",
        "kernels.rescale(u.x, i, -exponent)",
        ELEMENTWISE,
    ),
    Fault("rescale: large norms left", DISPATCH, "(sum < 0x1p-60 || sum > 0x1p60)", "sum < 0x1p-60", ELEMENTWISE),
    Fault(
        "update: last block skipped",
        DISPATCH,
        "parallel_for(threads, args.x.batch * blocks,",
        "parallel_for(threads, args.x.batch * blocks - 1,",
        ELEMENTWISE,
    ),
    Fault(
        "threads: last task skipped",
        PARALLEL,
        "next.fetch_add(1)) < tasks;",
        "next.fetch_add(1)) < tasks - 1;",
        PRODUCTS,
    ),
    Fault(
        "queue: last product lost",
        NATIVE_PY,
        "partial(self._run, self._waiting, self._operands)",
        "partial(self._run, self._waiting[:-1], self._operands)",
        ITERATION,
    ),
    Fault(
        "matrices of a parameter not advanced",
        LAYOUT,
        "first + i * batch_stride * size, row_stride",
        "first, row_stride",
        ELEMENTWISE,
    ),
    # The iteration.
    Fault(
        "standard: b and c swapped",
        NEWTON_SCHULZ,
        "    else:\n        ops.syrk(A, C=A, alpha=c, beta=b, out=B)",
        "    else:\n        ops.syrk(A, C=A, alpha=b, beta=c, out=B)",
        ITERATION,
    ),
    Fault(
        "standard: a forgotten",
        NEWTON_SCHULZ,
        "ops.gemm(B, X, C=X, out=out, beta=a, scale=scale)",
        "ops.gemm(B, X, C=X, out=out, beta=1.0, scale=scale)",
        ITERATION,
    ),
    Fault(
        "standard: scale in every step",
        NEWTON_SCHULZ,
        "scale, triple)\n        X, Y, scale = Y, X, None",
        "scale, triple)\n        X, Y = Y, X",
        ITERATION,
    ),
    Fault(
        "standard: wrong buffer returned",
        NEWTON_SCHULZ,
        "    return X\n\n\ndef _standard_sum(",
        "    return Y\n\n\ndef _standard_sum(",
        ITERATION,
    ),
    Fault("gram: identity forgotten", NEWTON_SCHULZ, "beta=b, gamma=a, out=factor", "beta=b, out=factor", ITERATION),
    Fault(
        "gram: last step of a segment skipped",
        NEWTON_SCHULZ,
        "for step in range(start, stop):",
        "for step in range(start, stop - 1):",
        ITERATION,
    ),
    Fault("gram: factors not accumulated", NEWTON_SCHULZ, "                Q, Q_next = Q_next, Q\n", "", ITERATION),
    Fault("gram: never back to X", NEWTON_SCHULZ, "{2: 0.22, 3: 0.26}", "{2: 1e9, 3: 1e9}", ITERATION),
    # What is around it.
    Fault(
        "chunk skipped",
        ORTHOGONALIZE,
        "in into_chunks([count], bucket.chunks):",
        "in into_chunks([count], bucket.chunks[:-1]):",
        BATCH,
    ),
    Fault(
        "every chunk is the first",
        ORTHOGONALIZE,
        "        at = source.layout(span)\n        result",
        "        at = source.layout(span._replace(start=0, stop=span.stop - span.start))\n        result",
        BATCH,
    ),
    Fault(
        "every chunk of a step is the first",
        OPERANDS,
        "piece, span.start, span.stop)",
        "piece, 0, span.stop - span.start)",
        SPLIT,
    ),
    Fault(
        "learning rate of another piece",
        OPERANDS,
        "operand.lr_ratio(self._options, rows, cols)",
        "operand.lr_ratio(self._options, *shapes[0][1][1:])",
        SPLIT,
    ),
    Fault(
        "learning rate of another matrix of the bucket",
        BUCKET,
        "members[span.piece], options)",
        "members[span.piece]._replace(ratio=members[0].ratio), options)",
        'tests/test_optimizer.py -k "do_not_mix and cpu-"',
    ),
    Fault("copies not written back", RUN, "        target.copy_(copy)\n", "        pass\n", SPLIT),
    Fault("gradient of another copy", OPERANDS, "self._gradients + len(self.grad_copies)", "self._gradients", SPLIT),
    Fault("a negation forgotten", OPERANDS, " and not t.is_neg():", ":", SPLIT),
    Fault(
        "equal parts copied rather than apart",
        OPERANDS,
        "return separate if described(separate) and not described(together) else together",
        "return together",
        SPLIT,
    ),
    Fault("a piece from the start", LAYOUT, "piece.start * step\n", "0\n", SPLIT),
    Fault("parts in one another", LAYOUT, "(piece.parts, piece.size * step)", "(piece.parts, step)", SPLIT),
    Fault("only the first run", LAYOUT, "        if piece.runs != 1:", "        if False:", SPLIT),
    Fault("a piece's shape without its runs", LAYOUT, "piece.size * piece.runs, *after", "piece.size, *after", SPLIT),
    Fault("cut along the stack", SPLIT_PY, "        dim += len(shape) - 2\n", "        pass\n", SPLIT),
    Fault("rows for columns", SPLIT_PY, "int(found[4] or 0)", "0", SPLIT),
    Fault("groups in another order", SPLIT_PY, "(q // kv, 1, 1)", "(1, 1, q // kv)", SPLIT),
    Fault("sizes need not fill", SPLIT_PY, "        if rest:", "        if rest < 0:", SPLIT),
    Fault("two patterns of a parameter", SPLIT_PY, "            if name in chosen:", "            if False:", SPLIT),
    Fault(
        "splits of those without a gradient too",
        OPTIMIZER,
        "in named if grad_of(p) is not None]",
        "in named]",
        SPLIT,
    ),
    Fault("a changed split overlooked", CACHE, "deepcopy(options[key])", "options[key]", SPLIT),
    Fault(
        "torch's checkpoints take the split",
        OPTIMIZER,
        "in own.items() if key in options}",
        'in own.items() if key in options - {"split"}}',
        SPLIT,
    ),
    Fault(
        "the caller's dict kept",
        "muon_kernels/options.py",
        "return {key: plain(item) for key, item in value.items()}",
        "return value",
        SPLIT,
    ),
    Fault(
        "a checkpoint's split not tried",
        OPTIMIZER,
        '                pieces(p.shape, loaded["flatten"], split)\n',
        "                pass\n",
        SPLIT,
    ),
    Fault(
        "split by a tied name",
        PARAM_GROUPS,
        'group.setdefault("split", {})[name] = cut_to',
        'group.setdefault("split", {})[at[-1].full_name] = cut_to',
        SPLIT,
    ),
    Fault(
        "keller: a digit",
        COEFFICIENTS_PY,
        "((3.4445, -4.7750, 2.0315),), 1.0",
        "((3.4435, -4.7750, 2.0315),), 1.0",
        COEFFICIENTS,
    ),
    Fault(
        "first triple repeated",
        COEFFICIENTS_PY,
        "triples + triples[-1:] * steps",
        "triples + triples[:1] * steps",
        COEFFICIENTS,
    ),
    Fault(
        "margin of a named set dropped",
        COEFFICIENTS_PY,
        "Schedule(triples, chosen.margin, name)",
        "Schedule(triples, 1.0, name)",
        COEFFICIENTS,
    ),
    Fault(
        "verbs hold the interpreter",
        "python/bindings.cpp",
        "    py::gil_scoped_release release;\n",
        "",
        'tests/test_threads.py -k "others_run"',
    ),
    Fault(
        "a plan keeps momentum",
        OPTIMIZER,
        "        self._tasks.clear()  # tasks",
        "        # it",
        "tests/test_plan.py -k keeps",
    ),
    Fault(
        "memory of inference mode",
        "muon_kernels/memory.py",
        "with torch.inference_mode(False):",
        "if True:",
        "tests/test_optimizer.py -k use_outside",
    ),
    Fault("widened by the wrong power", COEFFICIENTS_PY, "c / factor**5", "c / factor**3", COEFFICIENTS),
]

# In the process of the tests, so that what was planted is what they import.
_RUN = """
import sys, pathlib, pytest, muon_kernels._C
copy = pathlib.Path(sys.argv[1])
if not all(copy in pathlib.Path(m.__file__).parents for m in (muon_kernels, muon_kernels._C)):
    sys.exit("another muon_kernels was imported")
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


class Copy:
    """A copy of the repository that can be built and tested."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, files.split("\0")):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, root / name)
        import pybind11

        scripts = sysconfig.get_path("scripts")
        self._cmake, ninja = (shutil.which(n, path=scripts) or shutil.which(n) or n for n in ("cmake", "ninja"))
        options = [  # setup.py's
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={root / 'muon_kernels'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
        ]
        self._call([self._cmake, "-G", "Ninja", "-S", str(root), "-B", str(root / "build"), *options])
        self.build()

    def _call(self, command: list[str]) -> None:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)

    def build(self) -> str:
        """Compile what changed; the digest of the module."""
        self._call([self._cmake, "--build", str(self.root / "build")])
        (module,) = (self.root / "muon_kernels").glob("_C*.so")
        return hashlib.sha256(module.read_bytes()).hexdigest()

    def test(self, tests: str) -> str | None:
        """What failed, or None."""
        path, _, expression = tests.partition(" -k ")
        arguments = [path, "-k", expression.strip('"')] if expression else [path]
        # A stale .pyc would hide a change of the same second and size; spinning threads would take turns on busy cores.
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        command = [sys.executable, "-c", _RUN, str(self.root), *arguments]
        try:
            done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=900)
        except subprocess.TimeoutExpired:
            return "nothing: it hangs"
        if done.returncode == 0:
            return None
        if done.returncode < 0:
            return f"{Path(path).name}: killed by signal {-done.returncode}"
        failed = re.search(r"^FAILED \S*?(\w+\.py)::(.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
        if done.returncode != 1 or not failed:  # no tests, a usage error, a test that cannot be imported
            sys.exit(f"the tests did not run:\n{done.stdout}{done.stderr}")
        return f"{failed[1]}::{failed[2]}"


def run(mutants: list[Fault], root: Path) -> list[tuple[Fault, str | None]]:
    """Each mutant with what caught it."""
    copy = Copy(root)
    for mutant in mutants:
        place_of(root, mutant.file, mutant.old, mutant.name)
    sound = built = copy.build()
    for tests in dict.fromkeys(m.tests for m in mutants):
        if failed := copy.test(tests):
            sys.exit(f"fails without a mutant: {failed}")
    results: list[tuple[Fault, str | None]] = []
    for mutant in mutants:
        native = mutant.file.startswith(("csrc/", "python/"))
        path = place_of(root, mutant.file, mutant.old, mutant.name)
        text = path.read_text()
        if not native and built != sound:
            built = copy.build()
        path.write_text(text.replace(mutant.old, mutant.new))
        if native and (built := copy.build()) == sound:
            sys.exit(f"{mutant.name}: compiles to the same code")
        results.append((mutant, copy.test(mutant.tests)))
        path.write_text(text)
        print(f"{mutant.name}: {results[-1][1] or 'SURVIVED'}", flush=True)
    return results


def table(results: list[tuple[Fault, str | None]]) -> str:
    """What `--log` writes."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = " with local changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    survived = sum(caught is None for _, caught in results)
    head = f"{datetime.date.today()}, commit {git('rev-parse', '--short', 'HEAD')}{changed}: "
    rows = [("mutant", "file", "caught by"), *((m.name, m.file, caught or "SURVIVED") for m, caught in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{row[0].ljust(widths[0])}  {row[1].ljust(widths[1])}  {row[2]}" for row in rows]
    return "\n".join([f"{head}{len(results)} mutants, {survived} survived", "", *lines, ""])


def main() -> int:
    """1 if a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name or file contains this")
    parser.add_argument("--log", type=Path, help="where to write the table")
    parser.add_argument("--jobs", type=int, default=1, help="copies that are built and tested at a time")
    arguments = parser.parse_args()
    mutants = [m for m in FAULTS if arguments.only in m.name or arguments.only in m.file]
    jobs = range(min(arguments.jobs, len(mutants)))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(len(jobs)) as pool:
        done = pool.map(lambda job: run(mutants[job :: len(jobs)], Path(temporary).resolve() / str(job)), jobs)
        results = sorted((result for part in done for result in part), key=lambda result: mutants.index(result[0]))
    if arguments.log:
        arguments.log.write_text(table(results))
    return int(any(caught is None for _, caught in results))


if __name__ == "__main__":
    sys.exit(main())
