"""Faults in the elementwise CUDA kernels; see plant.py."""

from __future__ import annotations

import plant


def Fault(name: str, file: str, old: str, new: str, tests: str, *also: tuple[str, str]) -> plant.Fault:
    return plant.Fault(name, old, new, tests, file, also)


MOMENTUM, APPLY, SHARED = (f"csrc/cuda/{name}" for name in ("momentum_update.cu", "apply_update.cu", "elementwise.cuh"))
UPDATE = "test_momentum_update and float32-torch.float32"
OFFSETS = "test_offsets"
DECAY = "test_apply_update and float32-torch.bfloat16"

TESTS = ["tests/cuda/test_elementwise_cuda.py"]

FAULTS = [
    # Momentum and direction.
    Fault(
        "nesterov ignored",
        MOMENTUM,
        "d = u.nesterov ? blended(u.direction, d, updated) : updated;",
        "d = updated;",
        UPDATE,
    ),
    Fault("lerp: one branch", MOMENTUM, "rest < 0.5f ? Blend", "true ? Blend", UPDATE),
    Fault(
        "grad_scale forgotten",
        MOMENTUM,
        "static_cast<float>(grad[l][v]), u.grad_scale",
        "static_cast<float>(grad[l][v]), 1.0f",
        UPDATE,
    ),
    Fault(
        "barrier before x is read back",
        MOMENTUM,
        "        __syncthreads();\n        staged.write_to",
        "        staged.write_to",
        "orders",
    ),
    Fault(
        "barrier of the block's sum",
        MOMENTUM,
        "    __syncthreads();\n    value = scratch[0];",
        "    value = scratch[0];",
        "orders",
    ),
    # Norms.
    Fault("squares in fp32", MOMENTUM, "static_cast<double>(d) * d", "d * d", "digits"),
    Fault(
        "partial sums beyond a block's threads",
        MOMENTUM,
        "i < u.tiles; i += THREADS) {",
        "i < u.tiles && i < THREADS; i += THREADS) {",
        "norm_in_double",
    ),
    Fault(
        "no power of two",
        MOMENTUM,
        "if (const int e = tile_power(sum, u.half)) {",
        "if (const int e = 0 * tile_power(sum, u.half)) {",
        "digits",
    ),
    Fault("bf16: no power of two", MOMENTUM, "sum_of_squares < 0x1p-200 ? 100 : 0", "0", "below_bf16"),
    Fault(
        "tiles left as they were",
        MOMENTUM,
        "const int e = whole - tile_power(partial[t], u.half);",
        "const int e = 0;",
        "different_sizes",
    ),
    Fault(
        "smallest tile not looked at",
        MOMENTUM,
        "tile_power(smallest, u.half) == whole && ",
        "",
        "different_sizes",
    ),
    Fault(
        "largest tile not looked at",
        MOMENTUM,
        " && tile_power(largest, u.half) == whole",
        "",
        "different_sizes",
    ),
    Fault(
        "two blocks rescale the same tiles", MOMENTUM, "share = blockIdx.x % u.shares;", "share = 0;", "different_sizes"
    ),
    Fault(
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
    Fault("infinity has a scale", MOMENTUM, "if (!isfinite(norm)) return __int_as_float(0x7fc00000);", "", "no_norm"),
    # Walks, lists, shared memory.
    Fault("lines beyond the matrix", SHARED, "return offset(l) < lines; }", "return lines > 0; }", UPDATE),
    Fault("32 bits: rows", SHARED, "row * place.row_stride +", "static_cast<int>(row * place.row_stride) +", OFFSETS),
    Fault("32 bits: columns", SHARED, "col * place.col_stride;", "static_cast<int>(col * place.col_stride);", OFFSETS),
    Fault(
        "32 bits: lines of a thread",
        SHARED,
        "first + Slice<V>::offset(l) * stride",
        "first + static_cast<int>(Slice<V>::offset(l) * stride)",
        OFFSETS,
    ),
    Fault(
        "32 bits: matrices",
        SHARED,
        "(tile.matrix - run.begin) * place.step",
        "static_cast<int>((tile.matrix - run.begin) * place.step)",
        OFFSETS,
    ),
    Fault(
        "32 bits: rows of x",
        SHARED,
        "(tile.row + row) * x.row_stride",
        "static_cast<int>((tile.row + row) * x.row_stride)",
        OFFSETS,
    ),
    Fault(
        "32 bits: matrices of x",
        SHARED,
        "tile.matrix * x.batch_stride",
        "static_cast<int>(tile.matrix * x.batch_stride)",
        OFFSETS,
    ),
    Fault("vectors at any address", SHARED, " && m.address % (operands.vector * operands.size[i]) == 0;", ";", UPDATE),
    Fault("x taken for aligned", SHARED, "reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && ", "", UPDATE),
    Fault("chunk's tail written", SHARED, "if (i < count) to[i] = element[i];", "to[i] = element[i];", UPDATE),
    Fault("no swizzle", SHARED, "return row / 4 * 2; }", "return 0; }", "traffic and float32"),
    Fault("halves of a chunk not exchanged", SHARED, "swizzle(row) & 2 ?", "false ?", UPDATE),
    Fault(
        "strides of a run's first matrix",
        SHARED,
        "if (a.row_stride != b.row_stride || a.col_stride != b.col_stride) return false;",
        "",
        UPDATE,
    ),
    Fault(
        "run of the matrix before",
        SHARED,
        "if (runs.run[high].begin <= matrix)",
        "if (runs.run[high].begin < matrix)",
        "launches",
    ),
    Fault("second launch starts over", MOMENTUM, "u.x.data += first * args.x.batch_stride;", "", "test_launches"),
    # The parameters.
    Fault("barrier before x is used", APPLY, "        __syncthreads();\n", "", "orders"),
    Fault("decays against the update's sign", APPLY, "!cautious || update", "cautious || update", DECAY),
    Fault("cautious by a product", APPLY, "update * copysignf(1.0f, param) >= 0", "update * param >= 0", "underflows"),
    Fault(
        "weight decay of the host",
        APPLY,
        "u.options.weight_decay ? *u.options.weight_decay : u.weight_decay",
        "u.weight_decay",
        DECAY,
    ),
    Fault("step size without the ratio", APPLY, "static_cast<float>(lr * ratio)", "static_cast<float>(lr)", DECAY),
    # Stochastic rounding.
    Fault("seed ignored", APPLY, "mixed(u.options.seed)", "mixed(0)", "seed"),
    Fault("half of the random bits", APPLY, "& 0xffff;", "& 0x7fff;", "unbiased"),
    Fault("rows in pairs", APPLY, "32 * (row % 2) + ", "", "seed or unbiased"),
    Fault("numbers of the launch", APPLY, "(u.first + matrix)", "static_cast<uint64_t>(matrix)", "depend_on_launches"),
    Fault("NaN becomes a number", APPLY, "if (isnan(value)) return __float2bfloat16_rn(value);", "", "special"),
]
