"""Faults in Muon's relatives: signs, second moments, forms of decay, cuts, and what is refused; see plant.py."""

from __future__ import annotations

from plant import Fault

TESTS = ["tests/test_variants.py", "tests/test_split.py", "tests/test_qk_clip.py", "tests/test_spectra.py"]


def _moment(name: str, old: str, new: str, tests: str = "test_second_moment") -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/stages/second_moment.py")


def _sums(name: str, old: str, new: str, tests: str = "test_second_moment") -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/stages/sums.py")


def _signs(name: str, old: str, new: str, tests: str = "sign") -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/stages/signs.py")


def _scaling(name: str, old: str, new: str, tests: str = "forms_of_weight_decay") -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/scaling.py")


def _step(file: str, name: str, old: str, new: str, tests: str) -> Fault:
    return Fault(name, old, new, tests, f"muon_kernels/step/{file}.py")


def _split(name: str, old: str, new: str, tests: str = "test_a_step_is_that or test_what_does or test_a_cut") -> Fault:
    return Fault(name, old, new, tests, "muon_kernels/split.py")


def _optimizer(name: str, old: str, new: str) -> Fault:
    return Fault(name, old, new, "peak_lr", "muon_kernels/optimizers/muon.py")


def _exact(name: str, old: str, new: str) -> Fault:
    return Fault(f"exact_rms: {name}", old, new, "tests/test_exact_rms.py", "muon_kernels/stages/exact_rms.py")


def _options(name: str, old: str, new: str) -> Fault:
    return Fault(name, old, new, "test_bad_options", "muon_kernels/options.py")


FAULTS = [
    # Second moments.
    _moment("mean is sum", "alpha=(1 - beta2) / X.shape[dim]", "alpha=1 - beta2"),
    _moment("mean of the other side", "/ X.shape[dim])", "/ X.shape[-3 - dim])"),
    _moment(
        "beta2 swapped", "V.mul_(beta2).add_(squares, alpha=(1 - beta2)", "V.mul_(1 - beta2).add_(squares, alpha=beta2"
    ),
    _moment("beta2 swapped, elements", "v.lerp_(square, 1 - beta2)", "v.lerp_(square, beta2)"),
    _moment("no root", "factor = V.sqrt_().add_(eps)", "factor = V.add_(eps)"),
    _moment("no root, elements", "torch.sqrt(v, out=square).add_(eps)", "square.copy_(v).add_(eps)"),
    _moment("no epsilon", "V.sqrt_().add_(eps).reciprocal_()", "V.sqrt_().reciprocal_()", "what_has_no"),
    _moment("no epsilon, elements", "torch.sqrt(v, out=square).add_(eps)", "torch.sqrt(v, out=square)", "what_has_no"),
    _moment("epsilon inside the root", "V.sqrt_().add_(eps).", "V.add_(eps).sqrt_().", "test_epsilon"),
    _moment(
        "epsilons swapped",
        'Form(1e-10, 2, 3, 0), "element": Form(1e-8,',
        'Form(1e-8, 2, 3, 0), "element": Form(1e-10,',
        "test_epsilon",
    ),
    _sums(
        "norm of U' kept",
        "before.div_(after.clamp_(min=TINY)).sqrt_()",
        "after.clamp_(min=TINY).div_(before).sqrt_()",
    ),
    _sums("norm squared", "after.clamp_(min=TINY)).sqrt_()", "after.clamp_(min=TINY))"),
    _moment(
        "norm of a batch",
        "torch.sum(squares, (1, 2), keepdim=True, out=before)",
        "before.fill_(squares.sum() / len(X))",
    ),
    _moment("factor once in the norm", "squares.mul_(factor).mul_(factor)", "squares.mul_(factor)"),
    _sums(
        "last element's blocks lost",
        "for i in range(0, batch, matrices):",
        "for i in range(0, max(batch - matrices, 1), matrices):",
        "blocks",
    ),
    _sums(
        "rows of a block lost",
        "for row in range(0, m, rows):",
        "for row in range(0, max(m - rows, 1), rows):",
        "blocks",
    ),
    _sums("sums of blocks forgotten", "    out.add_(partial)", "    out.copy_(partial)", "blocks"),
    _moment("scratch used before it is written", "    before.zero_(), after.zero_()\n", "", "blocks"),
    _moment(
        "scratch too small", "2 * n + 2 + in_cache(device) * block", "in_cache(device) * block", "test_second or blocks"
    ),
    _moment("orientations mixed", "key=lambda V: V.shape[-1] == 1", "key=lambda V: 0"),
    _moment("elements: first matrices again", "        start = stop\n    return norm_kept", "    return norm_kept"),
    _moment("on a GPU: norm not kept", "        X.mul_(kept)\n        return None", "        return None", "blocks"),
    _moment(
        "memory is asked for",
        "norm_kept(before, after)), block)",
        "norm_kept(before, after) * 1), block)",
        "no_memory",
    ),
    # Parts.
    _moment(
        "parts of columns share",
        "Piece(V.ndim - 1, before, piece.parts, 1, 1, 1)",
        "Piece(V.ndim - 1, 0, piece.parts, 1, 1, 1)",
        "follow_the_parts",
    ),
    _moment(
        "rows of a convolution",
        "piece.dim != (0 if flattens(shape, flatten) else len(shape) - 2)",
        "piece.dim != len(shape) - 2",
        "follow_the_parts",
    ),
    _moment(
        "one statistic for all parts",
        "parts = sum(piece.parts for piece in split_rows) if split_rows else 1",
        "parts = 1",
        "follow_the_parts or another_cut",
    ),
    _step(
        "operands",
        "parts before are not counted",
        "before += 1 if piece is None else piece.parts",
        "pass",
        "follow_the_parts",
    ),
    _step("bucket", "rows for columns", "found.mT if turned else found", "found", "test_second_moment"),
    _moment(
        "norms of the first matrix",
        'array("d", map(mul, ratios, kept))',
        'array("d", [x * kept[0] for x in ratios])',
        "test_second_moment",
    ),
    # Signs.
    _signs("norm not counted", ".add_(1 / margin).div_(norm)", ".add_(1 / margin)"),
    _signs("margin forgotten", ".add_(1 / margin)", ".add_(1.0)"),
    _signs("scale of the magnitudes", "return scale.mul_(0.0).add_", "return scale.add_"),
    _signs("NaN has a sign", "scale.mul_(0.0)", "scale.zero_()"),
    _signs("zero is no matrix", ".clamp_(min=1.0)", ""),
    _signs("norms not told", "        norms.copy_(norm)", "        pass", "sign or power"),
    _signs("squares for norms", "norm = sums.view(-1).sqrt_()", "norm = sums.view(-1)"),
    _signs("no signs", "    X.sign_()\n", ""),
    # Weight decay.
    _scaling("independent of nothing", "return lr, weight_decay / lr if", "return lr, weight_decay if"),
    _scaling("decay at zero", "max(lr, 1e-30) if lr else 0.0", "max(lr, 1e-30)"),
    _scaling(
        "decay at a zero on a device", "torch.where(lr > 0, weight_decay / divisor, 0.0)", "weight_decay / divisor"
    ),
    _scaling("schedule squared", "weight_decay * lr / peak_lr", "weight_decay * (lr / peak_lr) ** 2"),
    _scaling("schedule upside down", "weight_decay * lr / peak_lr", "weight_decay * peak_lr / max(lr, 1e-30)"),
    _optimizer("a larger peak is lost", "max(peak, largest)", "largest"),
    _optimizer("OneCycleLR's peak is not seen", "    if largest is None:", "    if True:"),
    _optimizer("nor where the peak is on a device", "peak.clamp(min=largest) if", "peak if"),
    _optimizer("OneCycleLR's first lr is its peak", "largest if largest is not None else lr.clone()", "lr.clone()"),
    # Cuts.
    _split("interleaved groups", "((q // kv, 1, 1), kv) if interleaved", "((q, 1, 1), kv) if interleaved"),
    _split(
        "shares for sizes",
        'return _Parsed(shares, runs, name == "blocks", dim)',
        "return _Parsed(shares, runs, False, dim)",
    ),
    _split("rest ignored", "        if rest:", "        if False:"),
    _split("not a multiple", "        if n % (total * runs):", "        if n % total:"),
    _split("pieces overlap", "        start += count * size\n", "        start += size\n"),
    _split("columns of a stack", "        dim += len(shape) - 2\n", "        dim += len(shape) - 3\n"),
    _split(
        "equal ones apart",
        "for i in range(count) if separate else (0,)",
        "for i in range(count)",
        "copies or test_a_step_is_that or plan",
    ),
    _split(
        "two patterns, the last wins",
        "            if name in chosen:",
        "            if False:",
        "test_names or test_what_does or test_param_groups",
    ),
    _split("a pattern without a match", "        if not found:", "        if False:", "test_what_does or checkpoint"),
    # Options that do not go together.
    _options(
        "stages of SGD",
        "    if power != 1:\n        return\n    for stage in asked:",
        "    if power != 1:\n        return\n    for stage in ():",
    ),
    _options("cautious SGD", '("cautious", "stochastic_rounding"):', '("stochastic_rounding",):'),
    _options("a whole direction from no rank", 'if stage.needs_whole() and group["strategy"] == "gram":', "if False:"),
    # exact_rms.
    _exact("norm of the other side", "reciprocal_().mul_(m)", "reciprocal_().mul_(X.shape[2])"),
    _exact("not the root", ".sqrt_()", ""),
    _exact("zeros become NaN", "sums.clamp_(min=_SMALLEST).reciprocal_()", "sums.reciprocal_()"),
    _exact("with any power", "    normalizes = True\n", ""),
    _exact("scratch too small", "padded(2 * m + 1 + in_cache(device) * ", "padded(in_cache(device) * "),
    _options("no check at all", "    if power != 1:\n", "    if True:\n"),
    # QK-Clip and spectra, beside those of beside.py.
    Fault(
        "tau of the logit's root",
        "gamma = tau / largest.clamp(min=tau)",
        "gamma = (tau / largest.clamp(min=tau)).sqrt()",
        "every_head or clipping",
        "muon_kernels/qk_clip.py",
    ),
    Fault(
        "key heads as many as queries",
        'heads, "k": kv_heads, "q_rope"',
        'heads, "k": heads, "q_rope"',
        "cannot_be_used or grouped",
        "muon_kernels/qk_clip.py",
    ),
    Fault(
        "overlap is not seen",
        "if (shared := overlapping(every)) is not None:",
        "if (shared := None) is not None:",
        "cannot_be_used",
        "muon_kernels/qk_clip.py",
    ),
    Fault(
        "logits of another scale",
        "1 / math.sqrt(max(dim, 1)) if scale is None",
        "1 / max(dim, 1) if scale is None",
        "largest_logits",
        "muon_kernels/qk_clip.py",
    ),
    Fault(
        "frobenius over trace",
        "return _relative(sigma).square().sum(-1)",
        "return _relative(sigma).sum(-1)",
        "known or closed",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "condition upside down",
        "(sigma[..., 0] / smallest)",
        "(smallest / sigma[..., 0])",
        "known or closed",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "a column counts",
        "if min(split_shape(p.shape, flatten)[1:]) > 1 and",
        "if",
        "records or chosen",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "every weight once more",
        "if self.step % self._every == 0:",
        "if True:",
        "records or chosen",
        "muon_kernels/spectra.py",
    ),
]
