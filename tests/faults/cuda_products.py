"""Faults in the CUDA products; see plant.py."""

from __future__ import annotations

from functools import partial

import plant

KERNEL, PTX = "csrc/cuda/product_sm80.cu", "csrc/cuda/ptx.cuh"
Fault = partial(plant.Fault, file=KERNEL)

# Few tests, of few kernels: a kernel costs seconds to build.
SMALL_NT, SMALL_NN, LARGE_NT = "64x64-t-True", "64x64-n-True", "128x128-t-True"
EXACT = "test_every_kernel_is_exact_on_integers and bf16"
ORDER, RACES, PROFILE = "test_order_and_time", "test_no_races", "test_profile"
SQUARES = "test_parts_of_squares and 63-16-bf16"

TESTS = ["tests/cuda/test_products_sm80.py"]

FAULTS = [
    # The pipeline.
    Fault(
        "wait for one group less",
        "cp_async_wait<NUM_STAGES - 2>",
        "cp_async_wait<NUM_STAGES - 1>",
        f"{ORDER} and {SMALL_NT}",
    ),
    Fault(
        "no barrier before a stage is filled again",
        "        __syncthreads();\n        load(step",
        "        load(step",
        f"{RACES} and {SMALL_NT}",
    ),
    Fault(
        "no barrier before the result takes the stages' place",
        "    __syncthreads();  // the last stages are still read\n",
        "",
        f"{RACES} and {SMALL_NT}",
    ),
    Fault(
        "no barrier before the result is stored",
        "    __syncthreads();\n    constexpr int CHUNKS",
        "    constexpr int CHUNKS",
        f"{RACES} and {SMALL_NT}",
    ),
    Fault(
        "the diagonal's blocks stored while other lanes read them",
        "            __syncwarp();  // ldmatrix gathers lanes but does not order their memory\n",
        "",
        f"{RACES} and {SMALL_NT}",
    ),
    Fault("last columns of k skipped", "(p.k + BLOCK_K - 1) / BLOCK_K", "p.k / BLOCK_K", f"{EXACT} and {SMALL_NT}"),
    Fault("tail of k not zero", "in_row = clamp(cols - chunk * 8, 8)", "in_row = 8", f"{EXACT} and {SMALL_NT}"),
    Fault(
        "copies are whole",
        '16, %2;" ::"r"(to), "l"(from), "r"(bytes)',
        '16, %2;" ::"r"(to), "l"(from), "r"(16)',
        f"{EXACT} and {SMALL_NT}",
        file=PTX,
    ),
    Fault(
        "rows of neighbours read",
        "int row = S::row(i), valid = row < rows ? in_row : 0",
        "int row = S::row(i), valid = in_row",
        f"{EXACT} and {SMALL_NT}",
    ),
    Fault(
        "rows of 32 bits",
        "from + row * row_stride + chunk * 8, valid",
        "from + row * static_cast<int>(row_stride) + chunk * 8, valid",
        "test_offsets",
    ),
    Fault(
        "matrices of b as far apart as those of a",
        "matrix * p.b.batch_stride",
        "matrix * p.a.batch_stride",
        f"{EXACT} and {SMALL_NN}",
    ),
    Fault(
        "matrices in the grid's second dimension",
        "int64_t matrix = blockIdx.x / p.tiles;",
        "int64_t matrix = blockIdx.y;",
        "test_many_matrices",
        also=(
            (
                "static_cast<unsigned>(args.tiles * p.out.batch), k.threads",
                "dim3(args.tiles, static_cast<unsigned>(p.out.batch)), k.threads",
            ),
        ),
    ),
    Fault("narrow matrices copied wide", "(s.batch > 1 ? 2 * s.batch_stride : 0)", "0", "test_distance_of_matrices"),
    # Fragments.
    Fault(
        "rows of a fragment of a",
        "operand_offset<BLOCK_K>(warp_row + lane % 16, lane / 16)",
        "operand_offset<BLOCK_K>(warp_row + lane % 8, lane / 16)",
        f"{EXACT} and {SMALL_NT}",
    ),
    Fault(
        "rows of a fragment of b",
        "warp_col + lane / 16 * 8 + lane % 8, lane / 8 % 2",
        "warp_col + lane / 8 % 2 * 8 + lane % 8, lane / 16",
        f"{EXACT} and {SMALL_NT}",
    ),
    Fault(
        "b not transposed", "ldmatrix_x4_trans(fragments_b[j]", "ldmatrix_x4(fragments_b[j]", f"{EXACT} and {SMALL_NN}"
    ),
    Fault(
        "swizzle: rows share banks",
        "COLS == 32 ? row / 2 % 4 : row % 8",
        "COLS == 32 ? row / 2 % 4 : row / 2 % 4",
        f"{PROFILE} and 64x64-t",
    ),
    Fault(
        "swizzle: another when read", "stage + (lane_a ^ k * 2)", "stage + (lane_a + k * 2)", f"{EXACT} and {SMALL_NT}"
    ),
    # Tiles.
    Fault(
        "triangle: another row's columns",
        "col = index - r * (r + 1) / 2",
        "col = index - r * (r - 1) / 2",
        f"{ORDER} and {SMALL_NT}",
    ),
    Fault("triangle: too many blocks", "tiles_m * (tiles_m + 1) / 2", "tiles_m * (tiles_m + 1)", "test_many_tiles"),
    Fault("mirror: dropped", "if (!p.symmetric) return;", "return;", f"{ORDER} and {SMALL_NT}"),
    Fault(
        "mirror: not within blocks on the diagonal", "if (on_diagonal) {", "if (false) {", "test_a_result_is_symmetric"
    ),
    Fault(
        "mirror: rows in another order",
        "lane / 8 * 2 + lane % 2;",
        "lane / 8 * 2 + 1 - lane % 2;",
        f"{ORDER} and {SMALL_NT}",
    ),
    Fault("stored behind the last row", "row < rows && !(on_diagonal", "!(on_diagonal", f"{EXACT} and {SMALL_NT}"),
    # What is added.
    Fault(
        "alpha and beta swapped",
        "args.alpha = p.alpha, args.beta = p.beta",
        "args.alpha = p.beta, args.beta = p.alpha",
        f"{EXACT} and {SMALL_NT}",
    ),
    Fault("scale not squared", "B_TRANSPOSED ? once * once : once", "once", f"{EXACT} and {SMALL_NT}"),
    Fault("scale of the first matrix", "p.scale[matrix]", "p.scale[0]", f"{EXACT} and {SMALL_NT}"),
    Fault("gamma not scaled", "more = p.gamma * scale", "more = p.gamma", f"{EXACT} and {SMALL_NT}"),
    Fault(
        "addend: rows of other warps",
        "    if (static_cast<int>(warp_row / T::ADDEND_M * T::ADDEND_M) != first) continue;  // rows of other warps\n",
        "",
        f"{EXACT} and {LARGE_NT}",
    ),
    Fault("correction of a ignored", "if (row) c->row = row;", "", SQUARES),
    Fault("correction of b ignored", "if (col) c->col = col;", "", SQUARES),
    Fault(
        "both corrections: their product ignored", "if (p.a_diagonal && p.b_diagonal) more", "if (false) more", SQUARES
    ),
    Fault("correction of c ignored", "if (p.c_diagonal) more", "if (false) more", SQUARES),
    Fault(
        "what rounding took: of the sum before",
        "= value - widen<DTYPE>(round_pair<DTYPE>(value, 0.0f), 0)",
        "= value - more - widen<DTYPE>(round_pair<DTYPE>(value - more, 0.0f), 0)",
        "test_precise_squares and 17",
    ),
    # The launch.
    Fault("only the first product", "i < count && !error; ++i", "i < 1 && !error; ++i", "test_products_run_in_order"),
    Fault(
        "not all products checked", "std::all_of(list, list + count, valid)", "valid(*list)", "test_what_does_not_fit"
    ),
]

# Half of the instantiations, none of which these tests of bf16 need, is left out: it costs a third of the time.
LEAN = [("dtype == DType::bf16 ? launch<DType::bf16> : launch<DType::f16>", "launch<DType::bf16>", KERNEL)]
