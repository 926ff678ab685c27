"""Faults in the CPU kernels and their bindings; see plant.py."""

from __future__ import annotations

from plant import Fault

PRODUCTS = 'tests/test_products.py -k "cpu-"'
AVX2 = 'tests/test_products.py -k "cpu-avx2"'
AVX512 = 'tests/test_products.py -k "cpu-avx512 and not bf16"'
AMX = 'tests/test_products.py -k "cpu-amx"'
AVX512BF16 = 'tests/test_products.py -k "cpu-avx512bf16"'
FLOATS = 'tests/test_products.py -k "cpu-avx2 or (cpu-avx512 and not bf16)"'
ELEMENTWISE = 'tests/test_elementwise.py -k "cpu-"'
MEMORY = 'tests/test_elementwise.py -k "memory"'
BATCH = 'tests/test_newton_schulz.py -k "batch and cpu-"'

PRODUCT_H, ELEMENTWISE_H = "csrc/cpu/product.h", "csrc/cpu/elementwise.h"
PAIRS_H, FLOATS_H, AVX512_H = "csrc/cpu/pairs.h", "csrc/cpu/floats.h", "csrc/cpu/avx512.h"
AVX512BF16_H, TILES_H, AMX_CPP = "csrc/cpu/avx512bf16.h", "csrc/cpu/tiles.h", "csrc/cpu/kernels_amx.cpp"
TRANSPOSE_H, DISPATCH, PARALLEL = "csrc/cpu/transpose.h", "csrc/cpu/dispatch.cpp", "csrc/cpu/parallel.cpp"


def _product(name: str, old: str, new: str, tests: str = PRODUCTS) -> Fault:
    return Fault(name, old, new, tests, PRODUCT_H)


def _pairs(name: str, old: str, new: str) -> Fault:
    return Fault(name, old, new, AVX512BF16, PAIRS_H)


def _floats(name: str, old: str, new: str) -> Fault:
    return Fault(name, old, new, FLOATS, FLOATS_H)


def _elementwise(name: str, old: str, new: str) -> Fault:
    return Fault(name, old, new, ELEMENTWISE, ELEMENTWISE_H)


def _variants(name: str, old: str, new: str) -> Fault:
    return Fault(name, old, new, 'tests/test_variants.py -k "cpu- and (everybodys or cautious)"', ELEMENTWISE_H)


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
        Fault(f"tiles: {name}", old, new, AMX, file)
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
        Fault(name, old, new, AVX512BF16, AVX512BF16_H)
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
        "_mm512_unpackhi_epi64(t[",
        "_mm512_unpacklo_epi64(t[",
        AVX512BF16,
        AVX512_H,
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
    Fault("floats: beyond the last line read", "if (i >= lines) {", "if (false) {", FLOATS, TRANSPOSE_H),
    Fault(
        "transpose: a quarter twice, of eight lines",
        "_mm256_unpackhi_epi32(s[",
        "_mm256_unpacklo_epi32(s[",
        AVX2,
        TRANSPOSE_H,
    ),
    Fault("few words: four of them lost", "if (count & 4)", "if (count & 0)", FLOATS, TRANSPOSE_H),
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
    Fault("avx2: ties upwards", "(0x7fff)", "(0x8000)", AVX2, "csrc/cpu/kernels_avx2.cpp"),
    Fault("avx2: NaN becomes infinity", "0x7fc0", "0x7f80", AVX2, "csrc/cpu/kernels_avx2.cpp"),
    Fault("avx512: ties upwards", "(0x7fff)", "(0x8000)", AVX512, AVX512_H),
    Fault("avx512: NaN becomes infinity", "0x7fc0", "0x7f80", AVX512, AVX512_H),
    Fault("avx512: one lane too few", "(1u << count) - 1", "(1u << count) / 2 - 1", AVX512, AVX512_H),
    Fault("avx512: one lane too many", "(1u << count) - 1", "(2u << count) - 1", AVX512, AVX512_H),
    Fault("avx512: multiply_add subtracts", "_mm512_fmadd_ps", "_mm512_fmsub_ps", AVX512, AVX512_H),
    Fault(
        "bf16: truncated", "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16", ELEMENTWISE, "csrc/cpu/bf16.h"
    ),
    Fault("bf16: ties downwards", " + ((bits >> 16) & 1u)", "", ELEMENTWISE, "csrc/cpu/bf16.h"),
    Fault("bf16: NaN becomes zero", "? 0x7fc0u : rounded", "? rounded : rounded", ELEMENTWISE, "csrc/cpu/bf16.h"),
    Fault("mirror: one column late in a block", "kStep + 15 - i", "kStep + 14 - i", PRODUCTS, TRANSPOSE_H),
    Fault("mirror: ragged block", "a[i * stride + j] = a[j * stride + i];", ";", PRODUCTS, TRANSPOSE_H),
    Fault(
        "avx512: pairs swapped",
        "0x100000, 0x110001,",
        "0x000010, 0x110001,",
        AVX512BF16,
        AVX512BF16_H,
    ),
    Fault(
        "transpose: a quarter twice",
        "= _mm256_unpackhi_epi64(r[8 * i + h], r[8 * i + 4 + h])",
        "= _mm256_unpacklo_epi64(r[8 * i + h], r[8 * i + 4 + h])",
        PRODUCTS,
        TRANSPOSE_H,
    ),
    Fault(
        "transpose: ragged columns taken as whole",
        "i + 16 <= rows && j + 16 <= cols",
        "i + 16 <= rows",
        ELEMENTWISE,
        TRANSPOSE_H,
    ),
    Fault(
        "transpose: ragged rows taken as whole",
        "i + 16 <= rows && j + 16 <= cols",
        "j + 16 <= cols",
        ELEMENTWISE,
        TRANSPOSE_H,
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
    Fault("random bits: of the first matrix, in a fused step", "options.first += matrix;", "", ELEMENTWISE, DISPATCH),
    _elementwise("step size of another matrix", "u.ratio[matrix]", "u.ratio[0]"),
    _elementwise("update with the wrong sign", "__builtin_fmaf(-step_size,", "__builtin_fmaf(step_size,"),
    _elementwise("weight decay not times lr", "1 - u.lr * u.weight_decay", "1 - u.weight_decay"),
    _elementwise("step size not times lr", "u.lr * u.ratio[matrix]", "u.ratio[matrix]"),
    # Dispatch, threads and the queue of products.
    Fault("margin ignored", "std::max(mantissa, eps) * margin", "std::max(mantissa, eps)", ELEMENTWISE, DISPATCH),
    Fault("scale of another power of two", "* margin), 1 - exponent)", "* margin), -exponent)", ELEMENTWISE, DISPATCH),
    Fault("scale of a zero matrix", "if (norm == 0) return 0;", "", ELEMENTWISE, DISPATCH),
    Fault(
        "scale of an infinite matrix", "if (!std::isfinite(norm)) return", "if (false) return", ELEMENTWISE, DISPATCH
    ),
    Fault(
        "fused: last matrix skipped",
        "args.count, [&](int64_t matrix, int slot) {",
        "args.count - 1, [&](int64_t matrix, int slot) {",
        ELEMENTWISE,
        DISPATCH,
    ),
    Fault("fused: gradient of the first matrix", "momentum.grad += matrix;", "", ELEMENTWISE, DISPATCH),
    Fault("fused: momentum of the first matrix", "momentum.momentum += matrix;", ";", ELEMENTWISE, DISPATCH),
    Fault("fused: parameter of the first matrix", "apply.param += matrix;", "", ELEMENTWISE, DISPATCH),
    Fault("fused: ratio of the first matrix", "apply.ratio += matrix;", "", ELEMENTWISE, DISPATCH),
    Fault(
        "fused: all threads in the first slot",
        "        momentum.x.data += slot * momentum.x.batch_stride;\n",
        "",
        ELEMENTWISE,
        DISPATCH,
    ),
    Fault("fused: scale of the first slot", "momentum.scale += slot;", "", ELEMENTWISE, DISPATCH),
    Fault("fused: norm of the last block only", "sum += partial;", "sum = partial;", ELEMENTWISE, DISPATCH),
    Fault(
        "fused: products of the first slot",
        "args.product_count, slot, scratch",
        "args.product_count, 0, scratch",
        ELEMENTWISE,
        DISPATCH,
    ),
    Fault(
        "whole matrices: last one skipped",
        "parallel_for(threads, batch, [&](int64_t matrix, int thread) {",
        "parallel_for(threads, batch - 1, [&](int64_t matrix, int thread) {",
        PRODUCTS,
        DISPATCH,
    ),
    Fault(
        "whole matrices: last block skipped",
        "t < tasks; ++t)",
        "t < std::max<int64_t>(tasks - 1, 1); ++t)",
        PRODUCTS,
        DISPATCH,
    ),
    Fault("whole matrices: always the first", "matrix * tasks + t", "t", PRODUCTS, DISPATCH),
    Fault(
        "whole matrices: always the first product",
        "kernels.product_task(list[i], matrix",
        "kernels.product_task(list[0], matrix",
        BATCH,
        DISPATCH,
    ),
    Fault(
        "shared columns: last product skipped",
        "batch && i < count; ++i)",
        "batch && i + 1 < count; ++i)",
        PRODUCTS,
        DISPATCH,
    ),
    Fault(
        "shared columns: always the first product",
        "kernels->product_task(list[i], task,",
        "kernels->product_task(list[0], task,",
        BATCH,
        DISPATCH,
    ),
    Fault("scratch: threads share it", "data + thread * stride", "data + 0 * thread", PRODUCTS, DISPATCH),
    Fault(
        "scratch: of a product not looked at",
        "    if (!scratch.data) return Status::out_of_memory;\n    if (batch",
        "    if (batch",
        MEMORY,
        DISPATCH,
    ),
    Fault(
        "scratch: of a fused step not looked at",
        "    if (!scratch.data) return Status::out_of_memory;\n    parallel_for(threads, args.count",
        "    parallel_for(threads, args.count",
        MEMORY,
        DISPATCH,
    ),
    Fault(
        "norm of what was not rounded yet",
        "sum < 0x1p-236 ? rescaled : ",
        "",
        "tests/test_newton_schulz.py -k numbers_below",
        DISPATCH,
    ),
    Fault("operands not checked", "if (!valid(list[i]) || list[i]", "if (list[i]", PRODUCTS, DISPATCH),
    Fault(
        "sums of squares: blocks of other matrices",
        "[i * blocks + block]",
        "[block * batch + i]",
        ELEMENTWISE,
        DISPATCH,
    ),
    Fault(
        "sums of squares: first block lost",
        "int64_t block = 0; block < blocks",
        "int64_t block = blocks > 1; block < blocks",
        ELEMENTWISE,
        DISPATCH,
    ),
    Fault(
        "rescale: one power of two short",
        "kernels.rescale(u.x, i, 1 - exponent)",
        "kernels.rescale(u.x, i, -exponent)",
        ELEMENTWISE,
        DISPATCH,
    ),
    Fault("rescale: large norms left", "(sum < 0x1p-60 || sum > 0x1p60)", "sum < 0x1p-60", ELEMENTWISE, DISPATCH),
    Fault(
        "update: last block skipped",
        "parallel_for(threads, args.x.batch * blocks,",
        "parallel_for(threads, args.x.batch * blocks - 1,",
        ELEMENTWISE,
        DISPATCH,
    ),
    Fault(
        "threads: last task skipped",
        "next.fetch_add(1)) < tasks;",
        "next.fetch_add(1)) < tasks - 1;",
        PRODUCTS,
        PARALLEL,
    ),
    Fault(
        "verbs hold the interpreter",
        "    py::gil_scoped_release release;\n",
        "",
        'tests/test_threads.py -k "others_run"',
        "python/bindings.cpp",
    ),
]
