"""Faults in the products of triton_kernels; see plant.py."""

from __future__ import annotations

from functools import partial

import plant

KERNEL = "muon_kernels/triton_kernels/products.py"
TESTS = ["tests/triton_kernels/test_products_triton.py", "tests/triton_kernels/test_backend_triton.py"]
Fault = partial(plant.Fault, file=KERNEL)

# Few tests: a kernel costs seconds to build, the interpreter nothing.
LOGIC = "test_interpreter"
SIZES, SQUARES = "test_any_size and sm80-65-7", "test_parts_of_squares and sm80"
TILES = "test_any_size and tma-65-7"
VENDOR = "test_what_is_left_to_the_vendor"

FAULTS = [
    # Tiles.
    Fault("triangle: another row's columns", "return row, index - row * (row + 1) // 2", "return row, index - row * (row - 1) // 2", SIZES),
    Fault("triangle: a program for every tile", "programs = batch * config.tiles(m, n, symmetric)", "programs = batch * config.tiles(m, n, False)", "test_many_tiles and sm80"),
    Fault("rows and columns swapped", "tile_m, tile_n = index % tiles_m, index // tiles_m", "tile_n, tile_m = index % tiles_m, index // tiles_m", LOGIC),
    Fault("mirror: dropped", "tl.store(mirrored_at, mirrored, mask=(cols[:, None] < n)", "tl.store(mirrored_at, mirrored, mask=(cols[:, None] < 0)", SIZES),
    Fault("mirror: not transposed", "mirrored = tl.trans(result)", "mirrored = result", SIZES),
    Fault("mirror: not within tiles on the diagonal", "tl.where(rows[:, None] >= cols[None, :], result, mirrored)", "result", "test_a_result_is_symmetric and sm80"),
    Fault("mirror: stored behind the last row", "mask=(cols[:, None] < n) & (rows[None, :] < m))", "mask=cols[:, None] < n)", SIZES),
    Fault("stored behind the last column", "inside = (rows[:, None] < m) & (cols[None, :] < n)", "inside = (rows[:, None] < m) & (cols[None, :] < n + 1)", SIZES),
    Fault("wide tile: both halves at the same columns", "first = col0 + part * WIDTH", "first = col0", "test_every_config and sm80-128x256"),
    Fault("wide tile: its diagonal in the first half", "if (row0 < first + WIDTH) & (first < row0", "if (row0 < first + WIDTH) & (first == col0) & (first < row0", "test_every_config and sm80-128x256"),
    # The sum.
    Fault("last columns of k skipped", "if left > 0:", "if left > 8:", LOGIC),
    Fault("tail of k not zero", "x = tl.load(a_at, mask=ks[None, :] < left, other=0.0)", "x = tl.load(a_at)", SIZES),
    Fault("tail of b not zero", "b_left = ks[:, None] < left if B_TRANSPOSED", "b_left = ks[:, None] < 64 if B_TRANSPOSED", SIZES),
    Fault("the last row is read whole", "(k if SIZE_UNIT == STRIDE_UNIT else tl.maximum(k - 1, 0)) // BLOCK_K", "k // BLOCK_K", "test_nothing_is_read_behind and sm80"),
    Fault("rows of neighbours read", "tl.minimum(rows, m - 1)", "rows", SIZES),
    Fault("offsets of 32 bits", "a + tl.minimum(rows, m - 1)[:, None].to(tl.int64) * a_row_stride", "a + tl.minimum(rows, m - 1)[:, None] * a_row_stride.to(tl.int32)", "test_offsets and sm80"),
    Fault("matrices in the grid's second dimension", "slot = tl.program_id(0) // tiles", "slot = tl.program_id(1)", "test_many_matrices", also=(("        how.programs,\n        a,", "        (how.programs // len(out), len(out)),\n        a,"),)),
    Fault("matrices of b as far apart as those of a", "b += matrix * (b_batch_stride * STRIDE_UNIT)", "b += matrix * (a_batch_stride * STRIDE_UNIT)", LOGIC),
    Fault("narrow matrices read wide", "| 2 * self.strides[0] |", "|", "test_distance_of_matrices and sm80"),
    Fault("ragged sizes taken for whole vectors", "(m | n | k) % _VECTOR == 0", "(m | k) % _VECTOR == 0", LOGIC),
    # Tiles by TMA.
    Fault("TMA: tiles of the first matrix", "a_tiles.load([slot, row0, k0])", "a_tiles.load([0, row0, k0])", TILES),
    Fault("TMA: rows of b from a's", "b_tiles.load([slot, col0, k0])", "b_tiles.load([slot, row0, k0])", TILES),
    Fault("TMA: b's coordinates swapped", "b_tiles.load([slot, k0, col0])", "b_tiles.load([slot, col0, k0])", TILES),
    Fault("TMA: a step of k twice", "k0 = step * BLOCK_K", "k0 = tl.maximum(step - 1, 0) * BLOCK_K", TILES),
    Fault("TMA: the last step of k missing", "range(tl.cdiv(k, BLOCK_K))", "range(k // BLOCK_K)", TILES),
    Fault("TMA: boxes of b for its transpose", "else (config.block_k, config.block_n)", "else (config.block_n, config.block_k)", "test_every_config and sm90-128x256"),
    Fault("TMA: matrices as far apart as rows", "[matrices or rows, rows, 1]", "[rows, rows, 1]", TILES),
    Fault("TMA: rows beyond the last one", "list(stack.shape), [matrices", "[*stack.shape[:1], stack.shape[1] + 1, stack.shape[2]], [matrices", TILES),
    Fault("TMA: b's alignment not asked for", "config.tma and _describable(a) and _describable(b)", "config.tma and _describable(a)", "test_one_operand and tma-b"),
    Fault("TMA: empty operands described", "stack.vectorized() and stack.shape.numel() > 0 and", "stack.vectorized() and", "test_without_columns and tma"),
    Fault("TMA: not used", "if config.tma and", "if not config.tma and", "test_profile and sm90-64x64"),
    # What is added.
    Fault("scale not squared", "            factor *= factor\n", "            factor *= 1.0\n", SQUARES),
    Fault("scale of the first matrix", "tl.load(scale + matrix)", "tl.load(scale)", SQUARES),
    Fault("gamma not scaled", "+ gamma * factor", "+ gamma", SQUARES),
    Fault("alpha and beta swapped", "        alpha,\n        beta,\n        gamma,\n        **", "        beta,\n        alpha,\n        gamma,\n        **", LOGIC),
    Fault("addend of another matrix", "c += matrix * (c_batch_stride * STRIDE_UNIT)", "c += 0", LOGIC),
    Fault("correction of a ignored", "            of_a += by_row\n", "            of_a += 0.0\n", LOGIC),
    Fault("correction of a on the wrong operand", "            of_b += by_row\n", "            of_b += 0.0\n", LOGIC),
    Fault("both corrections: their product ignored", "if a_diagonal is not None and b_diagonal is not None:", "if False:", LOGIC),
    Fault("correction of c ignored", "if c_diagonal is not None:", "if False:", LOGIC),
    Fault("what rounding took: nothing", "value - value.to(out.dtype.element_ty).to(tl.float32)", "value - value", "test_precise_squares and sm80"),
    # Left to cuBLAS.
    Fault("vendor: correction ignored", "sums.addcmul_(a_diagonal[i, :, None], b[i])", "pass", VENDOR),
    Fault("vendor: alpha multiplies the addend, too", "        if alpha != 1:\n            sums *= alpha\n        if c is not None:\n            sums.add_(c[i], alpha=beta)\n", "        if c is not None:\n            sums.add_(c[i], alpha=beta)\n        sums *= alpha\n", VENDOR),
    Fault("vendor: rounded twice", "torch.mm(a.float(), b.float())", "torch.mm(a, b).float()", VENDOR),
    Fault("vendor: scale ignored", "sums *= scale[i]", "sums *= 1.0", VENDOR),
    # The launch.
    Fault("places are not told apart by address", "return _Place(t.data_ptr(), t.shape,", "return _Place(t.data_ptr() // 4096 * 4096, t.shape,", "test_a_launch_is_remembered and tma"),
    Fault("a coefficient is compiled in", "alpha: tl.float32,", "alpha: tl.constexpr,", "test_numbers_do_not and sm80"),
    Fault("a batch stride is looked at", "m n k a_batch_stride", "m n k", "test_numbers_do_not and sm80"),
    Fault("shapes not checked", "a.shape == (batch, m, k)\n        and b.shape ==", "a.shape == (batch, m, k)\n        or b.shape ==", "test_what_does_not_fit and sm80"),
]  # fmt: skip
