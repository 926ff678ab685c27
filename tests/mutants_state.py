"""Faults in state that is kept in fewer bits: 8-bit momentum, fp32 masters of bf16 parameters; see planting.py."""

from __future__ import annotations

from planting import Mutant

TESTS = ["tests/test_packed.py"]

PACKED, FUNCTIONAL, OPTIMIZER = "muon_kernels/packed.py", "muon_kernels/functional.py", "muon_kernels/optimizer.py"
PLAN, OPTIONS = "muon_kernels/plan.py", "muon_kernels/options.py"
EIGHT, MASTERS = "eager and (eight or nan)", "halves or (eager and (masters or parameters_written))"
CHECKPOINT, PLANNED = "another_precision or (eager and (resumes or fit or changing))", "eager and (plan_and or a_piece)"

MUTANTS = [
    Mutant("blocks rounded down", "return -(-elements // BLOCK)", "return max(elements // BLOCK, 1)", EIGHT, PACKED),
    Mutant("the last block forgotten", "    if x.shape[1] % BLOCK:\n", "    if False:\n", EIGHT, PACKED),
    Mutant(
        "the first block's absmax for every piece",
        "whole, first = x.shape[1] // BLOCK, begin // BLOCK",
        "whole, first = x.shape[1] // BLOCK, 0",
        EIGHT,
        PACKED,
    ),
    Mutant("codes truncated", "out.mul_(127).round_()", "out.mul_(127).trunc_()", EIGHT, PACKED),
    Mutant("NaN is zero", ".nan_to_num_(_NAN, _NAN, _NAN)", ".nan_to_num_(0, 0, 0)", EIGHT, PACKED),
    Mutant(
        "the code of NaN is a number",
        "(_NAN + 0.5) / 127, math.nan",
        "(_NAN - 0.5) / 127, math.nan",
        EIGHT,
        PACKED,
    ),
    Mutant("-127 is NaN", "(_NAN + 0.5) / 127, math.nan", "(_NAN + 1) / 127, math.nan", EIGHT, PACKED),
    Mutant("scale not kept", "    absmax.copy_(divisor)\n", "", EIGHT, PACKED),
    Mutant(
        "rectangles begin in the first column",
        "col : cols if whole else col + stop - begin",
        "0 : cols if whole else stop - begin",
        EIGHT,
        PACKED,
    ),
    Mutant(
        "matrices of a stack share scales",
        "yield slice(i, i + at_once), begin",
        "yield slice(0, at_once), begin",
        EIGHT,
        PACKED,
    ),
    Mutant(
        "equal parts together where they are apart",
        "found += own.view(count // piece.parts, piece.parts, blocks).unbind(1)",
        "found += own.view(piece.parts, count // piece.parts, blocks).unbind(0)",
        EIGHT,
        PACKED,
    ),
    Mutant(
        "scales of a piece from the beginning",
        "        start = stop\n    return found",
        "    return found",
        EIGHT,
        PACKED,
    ),
    Mutant(
        "numbers of a part over those of the first",
        "            start += count\n",
        "            start += 0\n",
        f"({EIGHT}) or ({MASTERS})",
        PACKED,
    ),
    Mutant(
        "tall ones not turned",
        "(cols, rows, 0, stride, 1, cols) if part.transposed else",
        "(cols, rows, 0, stride, rows, 1) if part.transposed else",
        f"({EIGHT}) or ({MASTERS})",
        PACKED,
    ),
    Mutant(
        "nothing packed again",
        "    yield seen\n    if not rehearsing:\n",
        "    yield seen\n    if False:\n",
        f"({EIGHT}) or ({MASTERS})",
        PACKED,
    ),
    Mutant(
        "packed in a rehearsal",
        "    yield seen\n    if not rehearsing:\n",
        "    yield seen\n    if True:\n",
        "rehearsal",
        PACKED,
    ),
    Mutant("upper half not rounded", "torch.add(bits, 1 << 15,", "torch.add(bits, 0,", MASTERS, PACKED),
    Mutant("halfway towards zero", "torch.add(bits, 1 << 15,", "torch.add(bits, (1 << 15) - 1,", MASTERS, PACKED),
    Mutant(
        "NaN with something in its lower half",
        "x = values[i, begin:end].nan_to_num_(math.nan, math.inf, -math.inf)",
        "x = values[i, begin:end]",
        MASTERS,
        PACKED,
    ),
    Mutant(
        "infinity is the largest number",
        "nan_to_num_(math.nan, math.inf, -math.inf)",
        "nan_to_num_(math.nan)",
        MASTERS,
        PACKED,
    ),
    Mutant(
        "lower half forgotten",
        "bits.bitwise_left_shift_(16).add_(lower)",
        "bits.bitwise_left_shift_(16)",
        MASTERS,
        PACKED,
    ),
    Mutant("lower half has no sign", ".add_(lower)", ".bitwise_or_(lower & 0xFFFF)", MASTERS, PACKED),
    Mutant("a piece is everything", "else _PIECE\n", "else 1 << 40\n", PLANNED, PACKED),
    Mutant(
        "columns as memory runs",
        "            if order:  # blocks",
        "            if False:  # blocks",
        EIGHT,
        FUNCTIONAL,
    ),
    Mutant(
        "chunks begin with the first scale",
        "cast(Tensor, scaled[part.piece])[part.start : part.stop]",
        "cast(Tensor, scaled[part.piece])[: part.stop - part.start]",
        EIGHT,
        FUNCTIONAL,
    ),
    Mutant(
        "backend chosen for bf16 parameters",
        "torch.float32 if quantized else kind.momentum_dtype",
        "kind.momentum_dtype",
        EIGHT,
        FUNCTIONAL,
    ),
    Mutant(
        "missing scale", "    if scale is None:\n        raise", "    if False:\n        raise", CHECKPOINT, FUNCTIONAL
    ),
    Mutant(
        "size of the scale",
        "if scale.shape != expected or scale.dtype != torch.float32:",
        "if scale.dtype != torch.float32:",
        CHECKPOINT,
        FUNCTIONAL,
    ),
    Mutant("power of one", "            if power == 1:\n", "            if False:\n", "eager and power", FUNCTIONAL),
    Mutant(
        "state replaced and not seen",
        "(momentum_bufs, moments, scales, mantissas)",
        "(momentum_bufs,)",
        CHECKPOINT,
        FUNCTIONAL,
    ),
    Mutant("fused all the same", " and not packed and not schedule", " and not schedule", "fused", PLAN),
    Mutant("fp32 memory not in the workspace", "4 * floats(m, n) if packed else 0", "0", PLANNED, PLAN),
    Mutant("launches not counted", "launches += packed * VISITS * len(chunks)", "launches += 0", PLANNED, PLAN),
    Mutant("bytes of the fp32 memory", "(VISITS + 2) * 4", "VISITS * 4", PLANNED, PLAN),
    Mutant("bytes of the mantissa", " + 4 * master_weights,", ",", PLANNED, FUNCTIONAL),
    Mutant(
        "loaded in the parameter's dtype",
        '("momentum_buffer", "momentum_scale", "mantissa", "second_momentum_buffer")',
        '("momentum_buffer", "second_momentum_buffer")',
        CHECKPOINT,
        OPTIMIZER,
    ),
    Mutant(
        "another precision of the momentum",
        'for key, packed, without in (("momentum_dtype", "int8", None), ("master_weights", True, False)):',
        'for key, packed, without in (("master_weights", True, False),):',
        CHECKPOINT,
        OPTIMIZER,
    ),
    Mutant("any precision", "                _check_precision(own, group)\n", "", CHECKPOINT, OPTIMIZER),
    Mutant(
        "mantissa of a checkpoint not looked at",
        '                    if "mantissa" in state:\n',
        "                    if False:\n",
        CHECKPOINT,
        OPTIMIZER,
    ),
    Mutant(
        "scale of a checkpoint not looked at",
        "                    if is_packed:\n",
        "                    if False:\n",
        CHECKPOINT,
        OPTIMIZER,
    ),
    Mutant(
        "rounded twice",
        'if group["master_weights"] and group["stochastic_rounding"]:',
        "if False:",
        "together",
        OPTIONS,
    ),
    Mutant(
        "masters of fp32 parameters",
        '                if group["master_weights"]:\n                    check_master(p)\n',
        "",
        "not_bf16",
        OPTIMIZER,
    ),
    Mutant(
        "master checked when made only",
        "        check_master(p)\n        check_mantissa",
        "        check_mantissa",
        "not_bf16",
        FUNCTIONAL,
    ),
]
