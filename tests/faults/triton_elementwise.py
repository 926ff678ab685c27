"""Faults in momentum_update and apply_update of triton_kernels; see plant.py."""

from __future__ import annotations

from functools import partial

import plant

KERNEL = "muon_kernels/triton_kernels/elementwise.py"
TABLES = "muon_kernels/triton_kernels/tables.py"
TESTS = ["tests/triton_kernels/test_elementwise_triton.py", "tests/triton_kernels/test_interpreter.py",
         "tests/triton_kernels/test_end_to_end_triton.py"]  # fmt: skip
Fault = partial(plant.Fault, file=KERNEL)

# Few tests: a kernel costs seconds to build, the interpreter nothing.
LOGIC = "interpreted and elementwise"
UPDATE = "test_momentum_update and sm_90"
DECAY = "test_apply_update and sm_90"
RAGGED = "test_ragged_sizes and sm_80-1"

FAULTS = [
    # Momentum and direction.
    Fault("nesterov ignored", "look_ahead(direction, new, mu, DAMPENED) if NESTEROV else new", "new", LOGIC),
    Fault("lerp: one branch", "near = weight < 0.5", "near = weight < 2.0", RAGGED),
    Fault("the compiler fuses", '"enable_fp_fusion": False', '"enable_fp_fusion": True', UPDATE),
    Fault("a tall tile not transposed", "tl.trans(direction.to(X))", "direction.to(X)", LOGIC),
    Fault("tall tiles in the order of wide ones", "tl.where(tall, pid // down, pid % across)", "tl.where(tall, pid // across, pid % across)", LOGIC),
    # Norms.
    Fault("squares in fp32", "precise = direction.to(tl.float64)", "precise = direction", LOGIC),
    Fault("no power of two", "direction = times_power(direction, tile_power(square, X == tl.float16))", "direction = direction", LOGIC),
    Fault("bf16: no power of two", "100, 0)", "0, 0)", "below_bf16 and sm_80"),
    Fault("largest tile not looked at", " | (tile_power(largest, HALF) != whole)", "", "different_sizes and sm_80"),
    Fault("tiles left as they were", "e = whole - tile_power(square, HALF)", "e = whole * 0", "different_sizes and sm_80"),
    Fault("infinity has a scale", 'sound = (total > 0) & (total < float("inf"))', "sound = total > 0", LOGIC),
    Fault("scales where the sums are", "scale = partial[partial.numel() - batch :]", "scale = partial[:batch]", "test_orders and sm_80"),
    Fault("matrices in the grid's second dimension", "matrix = tl.program_id(0)\n    share, shares = tl.program_id(1), tl.num_programs(1)", "matrix = tl.program_id(1)\n    share, shares = tl.program_id(0), tl.num_programs(0)", "test_many_matrices", also=(("norm_kernel, (batch, shares), x,", "norm_kernel, (shares, batch), x,"),)),
    Fault("a scale left from the step before", "tl.store(scale + matrix, result.to(tl.float32))", "tl.store(scale + matrix, result.to(tl.float32), (tl.load(scale + matrix) > 0) == 0)", "test_a_scratch_is_used_again and 80"),
    Fault("32 bits: lines", "line[:, None] * line_stride +", "line[:, None] * line_stride.to(tl.int32) +", "test_offsets and sm_80"),
    Fault("32 bits: matrices of x", "x += matrix * batch_stride", "x += matrix * batch_stride.to(tl.int32)", "test_offsets and sm_80"),
    # Tables.
    Fault("vectors at any address", " and address % 16 == 0", "", DECAY, file=TABLES),
    Fault("lines cut through vectors", " and cols % n == 0", "", "test_vectors", file=TABLES),
    Fault("a table of other matrices", "kept[stream] = made", "kept[stream] = made._replace(refs=made.refs.flip(0))", "one_table", file=TABLES),
    # The parameters.
    Fault("decays against the update's sign", "-update, update) >= 0", "-update, update) <= 0", LOGIC),
    Fault("weight decay of the host", "weight_decay = tl.load(weight_decay_at).to(tl.float64)", "weight_decay = weight_decay", LOGIC),
    Fault("matrices share their numbers", "matrix.to(tl.uint64) * ((M + 1)", "0 * ((M + 1)", LOGIC),
    Fault("a compilation for a size", '@triton.jit(do_not_specialize=["x", "partial", "M", "N",', '@triton.jit(do_not_specialize=["x", "partial", "M",', "launches_and_compilations"),
    Fault("a graph's table: the first words only", "*words[begin : begin + _WORDS]", "*words[:_WORDS]", "test_what_a_graph_reads", file=TABLES),
    Fault("a graph's table: copied", "    if stream is None or rehearsing():", "    if rehearsing():", "test_what_a_graph_reads", file=TABLES),
]  # fmt: skip
