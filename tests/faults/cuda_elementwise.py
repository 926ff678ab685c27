"""Faults in the elementwise CUDA kernels; see plant.py."""

from __future__ import annotations

from plant import Fault

MOMENTUM, APPLY, SHARED = (f"csrc/cuda/{name}" for name in ("momentum_update.cu", "apply_update.cu", "elementwise.cuh"))
UPDATE = "test_momentum_update and float32-torch.float32"
OFFSETS = "test_offsets"
DECAY = "test_apply_update and float32-torch.bfloat16"

TESTS = ["tests/cuda/test_elementwise_cuda.py"]

FAULTS = [
    # Momentum and direction.
    Fault(
        "nesterov ignored",
        "d = u.nesterov ? blended(u.direction, d, updated) : updated;",
        "d = updated;",
        UPDATE,
        MOMENTUM,
    ),
    Fault("lerp: one branch", "rest < 0.5f ? Blend", "true ? Blend", UPDATE, MOMENTUM),
    Fault(
        "grad_scale forgotten",
        "static_cast<float>(grad[l][v]), u.grad_scale",
        "static_cast<float>(grad[l][v]), 1.0f",
        UPDATE,
        MOMENTUM,
    ),
    Fault(
        "barrier before x is read back",
        "        __syncthreads();\n        staged.write_to",
        "        staged.write_to",
        "orders",
        MOMENTUM,
    ),
    Fault(
        "barrier of the block's sum",
        "    __syncthreads();\n    value = scratch[0];",
        "    value = scratch[0];",
        "orders",
        MOMENTUM,
    ),
    # Norms.
    Fault("squares in fp32", "static_cast<double>(d) * d", "d * d", "digits", MOMENTUM),
    Fault(
        "partial sums beyond a block's threads",
        "i < u.tiles; i += THREADS) {",
        "i < u.tiles && i < THREADS; i += THREADS) {",
        "norm_in_double",
        MOMENTUM,
    ),
    Fault(
        "no power of two",
        "const PowerOfTwo factor(tile_power(sum, u.half));",
        "const PowerOfTwo factor(0 * tile_power(sum, u.half));",
        "digits",
        MOMENTUM,
    ),
    Fault("bf16: no power of two", "sum_of_squares < 0x1p-200 ? 100 : 0", "0", "below_bf16", MOMENTUM),
    Fault(
        "tiles left as they were",
        "const int e = whole - tile_power(partial[t], u.half);",
        "const int e = 0;",
        "different_sizes",
        MOMENTUM,
    ),
    Fault(
        "smallest tile not looked at",
        "tile_power(smallest, u.half) == whole && ",
        "",
        "different_sizes",
        MOMENTUM,
    ),
    Fault(
        "largest tile not looked at",
        " && tile_power(largest, u.half) == whole",
        "",
        "different_sizes",
        MOMENTUM,
    ),
    Fault(
        "two blocks rescale the same tiles", "share = blockIdx.x % u.shares;", "share = 0;", "different_sizes", MOMENTUM
    ),
    Fault(
        "matrices in the grid's second dimension",
        "int matrix = blockIdx.x / u.shares, share = blockIdx.x % u.shares;",
        "int matrix = blockIdx.y, share = blockIdx.x;",
        "test_many_matrices",
        MOMENTUM,
        (
            (
                "norm_kernel<<<static_cast<unsigned>(count * n.shares), THREADS",
                "norm_kernel<<<dim3(n.shares, static_cast<unsigned>(count)), THREADS",
            ),
        ),
    ),
    Fault("infinity has a scale", "if (!isfinite(norm)) return __int_as_float(0x7fc00000);", "", "no_norm", MOMENTUM),
    # Walks, lists, shared memory.
    Fault("lines beyond the matrix", "return offset(l) < lines; }", "return lines > 0; }", UPDATE, SHARED),
    Fault("32 bits: rows", "row * place.row_stride +", "static_cast<int>(row * place.row_stride) +", OFFSETS, SHARED),
    Fault("32 bits: columns", "col * place.col_stride;", "static_cast<int>(col * place.col_stride);", OFFSETS, SHARED),
    Fault(
        "32 bits: lines of a thread",
        "first + Slice<V>::offset(l) * stride",
        "first + static_cast<int>(Slice<V>::offset(l) * stride)",
        OFFSETS,
        SHARED,
    ),
    Fault(
        "32 bits: matrices",
        "(tile.matrix - run.begin) * place.step",
        "static_cast<int>((tile.matrix - run.begin) * place.step)",
        OFFSETS,
        SHARED,
    ),
    Fault(
        "32 bits: rows of x",
        "(tile.row + row) * x.row_stride",
        "static_cast<int>((tile.row + row) * x.row_stride)",
        OFFSETS,
        SHARED,
    ),
    Fault(
        "32 bits: matrices of x",
        "tile.matrix * x.batch_stride",
        "static_cast<int>(tile.matrix * x.batch_stride)",
        OFFSETS,
        SHARED,
    ),
    Fault("vectors at any address", " && m.address % (operands.vector * operands.size[i]) == 0;", ";", UPDATE, SHARED),
    Fault("x taken for aligned", "reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && ", "", UPDATE, SHARED),
    Fault("chunk's tail written", "if (i < count) to[i] = element[i];", "to[i] = element[i];", UPDATE, SHARED),
    Fault("no swizzle", "return row / 4 * 2; }", "return 0; }", "traffic and float32", SHARED),
    Fault("halves of a chunk not exchanged", "swizzle(row) & 2 ?", "false ?", UPDATE, SHARED),
    Fault(
        "strides of a run's first matrix",
        "if (a.row_stride != b.row_stride || a.col_stride != b.col_stride) return false;",
        "",
        UPDATE,
        SHARED,
    ),
    Fault(
        "run of the matrix before",
        "if (runs.run[high].begin <= matrix)",
        "if (runs.run[high].begin < matrix)",
        "launches",
        SHARED,
    ),
    Fault("second launch starts over", "u.x.data += first * args.x.batch_stride;", "", "test_launches", MOMENTUM),
    # The parameters.
    Fault("barrier before x is used", "        __syncthreads();\n", "", "orders", APPLY),
    Fault("decays against the update's sign", "!cautious || update", "cautious || update", DECAY, APPLY),
    Fault("cautious by a product", "update * copysignf(1.0f, param) >= 0", "update * param >= 0", "underflows", APPLY),
    Fault(
        "weight decay of the host",
        "u.options.weight_decay ? *u.options.weight_decay : u.weight_decay",
        "u.weight_decay",
        DECAY,
        APPLY,
    ),
    Fault("step size without the ratio", "static_cast<float>(lr * ratio)", "static_cast<float>(lr)", DECAY, APPLY),
    # Stochastic rounding.
    Fault("seed ignored", "mixed(u.options.seed)", "mixed(0)", "seed", APPLY),
    Fault("half of the random bits", "& 0xffff;", "& 0x7fff;", "unbiased", APPLY),
    Fault("rows in pairs", "32 * (row % 2) + ", "", "seed or unbiased", APPLY),
    Fault("numbers of the launch", "(u.first + matrix)", "static_cast<uint64_t>(matrix)", "depend_on_launches", APPLY),
    Fault("NaN becomes a number", "if (isnan(value)) return __float2bfloat16_rn(value);", "", "special", APPLY),
]
