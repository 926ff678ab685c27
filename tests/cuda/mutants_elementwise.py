"""Faults in the elementwise CUDA kernels; see planting.py."""

from __future__ import annotations

import planting


def Mutant(name: str, file: str, old: str, new: str, tests: str, *also: tuple[str, str]) -> planting.Mutant:
    return planting.Mutant(name, old, new, tests, file, also)


MOMENTUM, APPLY, SHARED = (f"csrc/cuda/{name}" for name in ("momentum_update.cu", "apply_update.cu", "elementwise.cuh"))
UPDATE = "test_momentum_update and float32-torch.float32"
OFFSETS = "test_offsets"
DECAY = "test_apply_update and float32-torch.bfloat16"

TESTS = ["tests/cuda/test_elementwise_cuda.py"]

MUTANTS = [
    # Momentum and direction.
    Mutant(
        "nesterov ignored",
        MOMENTUM,
        "d = u.nesterov ? blended(u.direction, d, updated) : updated;",
        "d = updated;",
        UPDATE,
    ),
    Mutant("lerp: one branch", MOMENTUM, "rest < 0.5f ? Blend", "true ? Blend", UPDATE),
    Mutant(
        "grad_scale forgotten",
        MOMENTUM,
        "static_cast<float>(grad[l][v]), u.grad_scale",
        "static_cast<float>(grad[l][v]), 1.0f",
        UPDATE,
    ),
    Mutant(
        "barrier before x is read back",
        MOMENTUM,
        "        __syncthreads();\n        staged.write_to",
        "        staged.write_to",
        "orders",
    ),
    Mutant(
        "barrier of the block's sum",
        MOMENTUM,
        "    __syncthreads();\n    value = scratch[0];",
        "    value = scratch[0];",
        "orders",
    ),
    # Norms.
    Mutant("squares in fp32", MOMENTUM, "static_cast<double>(d) * d", "d * d", "digits"),
    Mutant(
        "partial sums beyond a block's threads",
        MOMENTUM,
        "i < u.tiles; i += THREADS) {",
        "i < u.tiles && i < THREADS; i += THREADS) {",
        "norm_in_double",
    ),
    Mutant(
        "no power of two",
        MOMENTUM,
        "if (const int e = tile_power(sum, u.half)) {",
        "if (const int e = 0 * tile_power(sum, u.half)) {",
        "digits",
    ),
    Mutant("bf16: no power of two", MOMENTUM, "sum_of_squares < 0x1p-200 ? 100 : 0", "0", "below_bf16"),
    Mutant(
        "tiles left as they were",
        MOMENTUM,
        "const int e = whole - tile_power(partial[t], u.half);",
        "const int e = 0;",
        "different_sizes",
    ),
    Mutant(
        "smallest tile not looked at",
        MOMENTUM,
        "tile_power(smallest, u.half) == whole && ",
        "",
        "different_sizes",
    ),
    Mutant(
        "largest tile not looked at",
        MOMENTUM,
        " && tile_power(largest, u.half) == whole",
        "",
        "different_sizes",
    ),
    Mutant(
        "two blocks rescale the same tiles", MOMENTUM, "share = blockIdx.x % u.shares;", "share = 0;", "different_sizes"
    ),
    Mutant(
        "matrices in the grid's second dimension",
        MOMENTUM,
        "int matrix = blockIdx.x / u.shares, share = blockIdx.x % u.shares;",
        "int matrix = blockIdx.y, share = blockIdx.x;",
        "test_many_matrices",
        (
            "norm_kernel<<<static_cast<unsigned>(count * n.shares), THREADS",
            "norm_kernel<<<dim3(n.shares, static_cast<unsigned>(count)), THREADS",
        ),
    ),
    Mutant("infinity has a scale", MOMENTUM, "if (!isfinite(norm)) return __int_as_float(0x7fc00000);", "", "no_norm"),
    # Walks, lists, shared memory.
    Mutant("lines beyond the matrix", SHARED, "return offset(l) < lines; }", "return lines > 0; }", UPDATE),
    Mutant("32 bits: rows", SHARED, "row * place.row_stride +", "static_cast<int>(row * place.row_stride) +", OFFSETS),
    Mutant("32 bits: columns", SHARED, "col * place.col_stride;", "static_cast<int>(col * place.col_stride);", OFFSETS),
    Mutant(
        "32 bits: lines of a thread",
        SHARED,
        "first + Slice<V>::offset(l) * stride",
        "first + static_cast<int>(Slice<V>::offset(l) * stride)",
        OFFSETS,
    ),
    Mutant(
        "32 bits: matrices",
        SHARED,
        "(tile.matrix - run.begin) * place.step",
        "static_cast<int>((tile.matrix - run.begin) * place.step)",
        OFFSETS,
    ),
    Mutant(
        "32 bits: rows of x",
        SHARED,
        "(tile.row + row) * x.row_stride",
        "static_cast<int>((tile.row + row) * x.row_stride)",
        OFFSETS,
    ),
    Mutant(
        "32 bits: matrices of x",
        SHARED,
        "tile.matrix * x.batch_stride",
        "static_cast<int>(tile.matrix * x.batch_stride)",
        OFFSETS,
    ),
    Mutant("vectors at any address", SHARED, " && m.address % (operands.vector * operands.size[i]) == 0;", ";", UPDATE),
    Mutant("x taken for aligned", SHARED, "reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && ", "", UPDATE),
    Mutant("chunk's tail written", SHARED, "if (i < count) to[i] = element[i];", "to[i] = element[i];", UPDATE),
    Mutant("no swizzle", SHARED, "return row / 4 * 2; }", "return 0; }", "traffic and float32"),
    Mutant("halves of a chunk not exchanged", SHARED, "swizzle(row) & 2 ?", "false ?", UPDATE),
    Mutant(
        "strides of a run's first matrix",
        SHARED,
        "if (a.row_stride != b.row_stride || a.col_stride != b.col_stride) return false;",
        "",
        UPDATE,
    ),
    Mutant(
        "run of the matrix before",
        SHARED,
        "if (runs.run[high].begin <= matrix)",
        "if (runs.run[high].begin < matrix)",
        "launches",
    ),
    Mutant("second launch starts over", MOMENTUM, "u.x.data += first * args.x.batch_stride;", "", "test_launches"),
    # The parameters.
    Mutant("barrier before x is used", APPLY, "        __syncthreads();\n", "", "orders"),
    Mutant("decays against the update's sign", APPLY, "!cautious || update", "cautious || update", DECAY),
    Mutant("cautious by a product", APPLY, "update * copysignf(1.0f, param) >= 0", "update * param >= 0", "underflows"),
    Mutant(
        "weight decay of the host",
        APPLY,
        "u.options.weight_decay ? *u.options.weight_decay : u.weight_decay",
        "u.weight_decay",
        DECAY,
    ),
    Mutant("step size without the ratio", APPLY, "static_cast<float>(lr * ratio)", "static_cast<float>(lr)", DECAY),
    # Stochastic rounding.
    Mutant("seed ignored", APPLY, "mixed(u.options.seed)", "mixed(0)", "seed"),
    Mutant("half of the random bits", APPLY, "& 0xffff;", "& 0x7fff;", "unbiased"),
    Mutant("rows in pairs", APPLY, "32 * (row % 2) + ", "", "seed or unbiased"),
    Mutant("numbers of the launch", APPLY, "(u.first + matrix)", "static_cast<uint64_t>(matrix)", "depend_on_launches"),
    Mutant("NaN becomes a number", APPLY, "if (isnan(value)) return __float2bfloat16_rn(value);", "", "special"),
]
