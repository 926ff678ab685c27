"""Faults in the Python core, the iteration and what is around it; see plant.py."""

from __future__ import annotations

from plant import Fault

ELEMENTWISE = 'tests/test_elementwise.py -k "cpu-"'
BATCH = 'tests/test_newton_schulz.py -k "batch and cpu-"'
ITERATION = 'tests/test_newton_schulz.py -k "cpu- and (keller or aol or deepseek)"'
COEFFICIENTS = "tests/test_coefficients.py"
SPLIT = 'tests/test_split.py -k "cpu- or not cpu"'

NATIVE_PY, NEWTON_SCHULZ = "muon_kernels/backends/native.py", "muon_kernels/newton_schulz.py"
MOMENT, SUMS = "muon_kernels/stages/second_moment.py", "muon_kernels/stages/sums.py"
OPTIMIZER, CHECKPOINT = "muon_kernels/optimizers/muon.py", "muon_kernels/checkpoint.py"
SCALING, COEFFICIENTS_PY = "muon_kernels/scaling.py", "muon_kernels/coefficients.py"
LAYOUT, SPLIT_PY = "muon_kernels/layout.py", "muon_kernels/split.py"
PARAM_GROUPS = "muon_kernels/optimizers/param_groups.py"
OPERANDS, BUCKET, CACHE, WORK, RUN, ORTHOGONALIZE = (
    f"muon_kernels/step/{name}.py" for name in ("operands", "bucket", "cache", "work", "run", "orthogonalize")
)

FAULTS = [
    *[
        Fault(name, old, new, f'tests/test_variants.py -k "{tests}"', file)
        for name, file, old, new, tests in [
            ("random bits: buckets share them", WORK, "self.seed + group_index", "self.seed", "own_seed"),
            (
                "random bits: chunks share them",
                WORK,
                "self.seed + group_index, chunk_index)",
                "self.seed + group_index, 0)",
                "buckets",
            ),
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
    Fault(
        "queue: last product lost",
        "partial(self._run, self._waiting, self._operands)",
        "partial(self._run, self._waiting[:-1], self._operands)",
        ITERATION,
        NATIVE_PY,
    ),
    Fault(
        "matrices of a parameter not advanced",
        "first + i * batch_stride * size, row_stride",
        "first, row_stride",
        ELEMENTWISE,
        LAYOUT,
    ),
    # The iteration.
    Fault(
        "standard: b and c swapped",
        "    else:\n        ops.syrk(A, C=A, alpha=c, beta=b, out=B)",
        "    else:\n        ops.syrk(A, C=A, alpha=b, beta=c, out=B)",
        ITERATION,
        NEWTON_SCHULZ,
    ),
    Fault(
        "standard: a forgotten",
        "ops.gemm(B, X, C=X, out=out, beta=a, scale=scale)",
        "ops.gemm(B, X, C=X, out=out, beta=1.0, scale=scale)",
        ITERATION,
        NEWTON_SCHULZ,
    ),
    Fault(
        "standard: scale in every step",
        "scale, triple)\n        X, Y, scale = Y, X, None",
        "scale, triple)\n        X, Y = Y, X",
        ITERATION,
        NEWTON_SCHULZ,
    ),
    Fault(
        "standard: wrong buffer returned",
        "    return X\n\n\ndef _standard_sum(",
        "    return Y\n\n\ndef _standard_sum(",
        ITERATION,
        NEWTON_SCHULZ,
    ),
    Fault("gram: identity forgotten", "beta=b, gamma=a, out=factor", "beta=b, out=factor", ITERATION, NEWTON_SCHULZ),
    Fault(
        "gram: last step of a segment skipped",
        "for step in range(start, stop):",
        "for step in range(start, stop - 1):",
        ITERATION,
        NEWTON_SCHULZ,
    ),
    Fault("gram: factors not accumulated", "                Q, Q_next = Q_next, Q\n", "", ITERATION, NEWTON_SCHULZ),
    Fault("gram: never back to X", "{2: 0.22, 3: 0.26}", "{2: 1e9, 3: 1e9}", ITERATION, NEWTON_SCHULZ),
    # What is around it.
    Fault(
        "chunk skipped",
        "in into_chunks([count], bucket.chunks):",
        "in into_chunks([count], bucket.chunks[:-1]):",
        BATCH,
        ORTHOGONALIZE,
    ),
    Fault(
        "every chunk is the first",
        "        at = source.layout(span)\n        result",
        "        at = source.layout(span._replace(start=0, stop=span.stop - span.start))\n        result",
        BATCH,
        ORTHOGONALIZE,
    ),
    Fault(
        "every chunk of a step is the first",
        "piece, span.start, span.stop)",
        "piece, 0, span.stop - span.start)",
        SPLIT,
        OPERANDS,
    ),
    Fault(
        "learning rate of another piece",
        "operand.lr_ratio(self._options, rows, cols)",
        "operand.lr_ratio(self._options, *shapes[0][1][1:])",
        SPLIT,
        OPERANDS,
    ),
    Fault(
        "learning rate of another matrix of the bucket",
        "members[span.piece], options)",
        "members[span.piece]._replace(ratio=members[0].ratio), options)",
        'tests/test_optimizer.py -k "do_not_mix and cpu-"',
        BUCKET,
    ),
    Fault("copies not written back", "        target.copy_(copy)\n", "        pass\n", SPLIT, RUN),
    Fault("gradient of another copy", "self._gradients + len(self.grad_copies)", "self._gradients", SPLIT, OPERANDS),
    Fault("a negation forgotten", " and not t.is_neg():", ":", SPLIT, OPERANDS),
    Fault(
        "equal parts copied rather than apart",
        "return separate if described(separate) and not described(together) else together",
        "return together",
        SPLIT,
        OPERANDS,
    ),
    Fault("a piece from the start", "piece.start * step\n", "0\n", SPLIT, LAYOUT),
    Fault("parts in one another", "(piece.parts, piece.size * step)", "(piece.parts, step)", SPLIT, LAYOUT),
    Fault("only the first run", "        if piece.runs != 1:", "        if False:", SPLIT, LAYOUT),
    Fault("a piece's shape without its runs", "piece.size * piece.runs, *after", "piece.size, *after", SPLIT, LAYOUT),
    Fault("cut along the stack", "        dim += len(shape) - 2\n", "        pass\n", SPLIT, SPLIT_PY),
    Fault("rows for columns", "int(found[4] or 0)", "0", SPLIT, SPLIT_PY),
    Fault("groups in another order", "(q // kv, 1, 1)", "(1, 1, q // kv)", SPLIT, SPLIT_PY),
    Fault("sizes need not fill", "        if rest:", "        if rest < 0:", SPLIT, SPLIT_PY),
    Fault("two patterns of a parameter", "            if name in chosen:", "            if False:", SPLIT, SPLIT_PY),
    Fault(
        "splits of those without a gradient too",
        "in named if grad_of(p) is not None]",
        "in named]",
        SPLIT,
        OPTIMIZER,
    ),
    Fault("a changed split overlooked", "deepcopy(options[key])", "options[key]", SPLIT, CACHE),
    Fault(
        "torch's checkpoints take the split",
        "in own.items() if key in options}",
        'in own.items() if key in options - {"split"}}',
        SPLIT,
        OPTIMIZER,
    ),
    Fault(
        "the caller's dict kept",
        "return {key: plain(item) for key, item in value.items()}",
        "return value",
        SPLIT,
        "muon_kernels/options.py",
    ),
    Fault(
        "a checkpoint's split not tried",
        '                pieces(p.shape, loaded["flatten"], split)\n',
        "                pass\n",
        SPLIT,
        OPTIMIZER,
    ),
    Fault(
        "split by a tied name",
        'group.setdefault("split", {})[name] = cut',
        'group.setdefault("split", {})[at[-1].full_name] = cut',
        SPLIT,
        PARAM_GROUPS,
    ),
    Fault(
        "keller: a digit",
        "((3.4445, -4.7750, 2.0315),), 1.0",
        "((3.4435, -4.7750, 2.0315),), 1.0",
        COEFFICIENTS,
        COEFFICIENTS_PY,
    ),
    Fault(
        "first triple repeated",
        "triples + triples[-1:] * steps",
        "triples + triples[:1] * steps",
        COEFFICIENTS,
        COEFFICIENTS_PY,
    ),
    Fault(
        "margin of a named set dropped",
        "Schedule(triples, chosen.margin, name)",
        "Schedule(triples, 1.0, name)",
        COEFFICIENTS,
        COEFFICIENTS_PY,
    ),
    Fault(
        "a plan keeps momentum",
        "        self._tasks.clear()  # tasks",
        "        # it",
        "tests/test_plan.py -k keeps",
        OPTIMIZER,
    ),
    Fault(
        "memory of inference mode",
        "with torch.inference_mode(False):",
        "if True:",
        "tests/test_optimizer.py -k use_outside",
        "muon_kernels/memory.py",
    ),
    Fault("widened by the wrong power", "c / factor**5", "c / factor**3", COEFFICIENTS, COEFFICIENTS_PY),
]
