"""Faults in what stands beside the step: spectra, QK-Clip, blocks of eight bits, graphs; see planting.py."""

from __future__ import annotations

from planting import Mutant

TESTS = ["tests/test_spectra.py", "tests/test_qk_clip.py", "tests/test_quantized.py", "tests/test_graphs.py"]

MUTANTS = [
    Mutant(
        "captured on the current device",
        "    with torch.cuda.device(device):\n        return",
        "    return",
        "stream_of_the_device",
        "muon_kernels/graphs.py",
    ),
    Mutant(
        "random bits are captured",
        "if scalars.seed is not None and capturing(work.device):",
        "if scalars.seed is not None and False:",
        "random_bits",
        "muon_kernels/step/run.py",
    ),
    Mutant(
        "entropy of sigma, not its square",
        "(_entropy(s.square()) / math.log",
        "(_entropy(s) / math.log",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "effective rank of sigma squared",
        "return s[..., 0] * _entropy(s).exp()",
        "return s[..., 0] * _entropy(s.square()).exp()",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "zero has rank one",
        "return s[..., 0] * _entropy(s).exp()",
        "return _entropy(s).exp()",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "natural logarithm of n+1",
        "math.log(s.shape[-1])).clamp",
        "math.log(s.shape[-1] + 1)).clamp",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "batch shares its NaN",
        ".flatten(-2).all(-1, keepdim=True)",
        ".all().expand(W.shape[:-2]).unsqueeze(-1)",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "not relative", "return _over(sigma, sigma[..., :1])", "return sigma", "test_spectra", "muon_kernels/spectra.py"
    ),
    Mutant(
        "zero well conditioned",
        ".where(smallest != 0, math.inf)",
        ".where(smallest != 0, 1.0)",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "rms is norm", "/ math.sqrt(max(W.shape[-2] * W.shape[-1], 1))", "", "test_spectra", "muon_kernels/spectra.py"
    ),
    Mutant(
        "update not copied",
        "p.detach().clone() for _, p",
        "p.detach() for _, p",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "update of rounded",
        "p.double() - before[p].double()",
        "p - before[p]",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "update without gradient",
        "if p in before and p.grad is not None",
        "if p in before",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "counts before",
        "due = (self.step + 1) % self._every",
        "due = self.step % self._every",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "flatten ignored",
        "step=self.step, flatten=flatten)",
        "step=self.step)",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant("later rows kept", 'if row["step"] <= self.step]', "]", "test_spectra", "muon_kernels/spectra.py"),
    Mutant("resume counts rows", "last if step is None else step", "last", "test_spectra", "muon_kernels/spectra.py"),
    Mutant(
        "median is mean",
        "middle = [median(by_step[step])",
        "middle = [sum(by_step[step]) / len(by_step[step])",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "JSON has Infinity",
        "if isinstance(v, float) and not math.isfinite(v) else v",
        "if False else v",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "not atomic",
        'beside = path.with_name(path.name + ".part")',
        "beside = path",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant(
        "names of group ignored",
        'or (named[place] if place < len(named) else f"{number}.{place}")',
        'or f"{number}.{place}"',
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Mutant("gamma not square root of", "applied**alpha", "applied", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Mutant("alpha swapped", '(1 - alpha)), ("q_rope"', 'alpha), ("q_rope"', "test_qk_clip", "muon_kernels/qk_clip.py"),
    Mutant("group takes the least logit", ".amin(1)", ".amax(1)", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Mutant(
        "groups interleaved",
        "applied.view(kv_heads, -1).amin(1)",
        "applied.view(-1, kv_heads).amin(0)",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Mutant("negative logits", "largest.clamp(min=tau)", "largest", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Mutant(
        "rope by sqrt", '("q_rope", applied)', '("q_rope", applied**alpha)', "test_qk_clip", "muon_kernels/qk_clip.py"
    ),
    Mutant(
        "factor rounded to bf16",
        "rows.mul_(scale.view(count, *[1] * weight.ndim))",
        "rows.mul_(scale.to(weight.dtype).view(count, *[1] * weight.ndim))",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Mutant("version hidden", "rows.mul_(scale", "rows.data.mul_(scale", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Mutant(
        "heads interleaved",
        "weight.detach().view(count, weight.shape[0] // count, *weight.shape[1:])",
        "weight.detach().view(weight.shape[0] // count, count, *weight.shape[1:]).transpose(0, 1)",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Mutant("host waits", "if on_host(bad) and bad.any()", "if bad.any()", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Mutant(
        "nan spreads", "applied = gamma.where(~bad, 1.0)", "applied = gamma", "test_qk_clip", "muon_kernels/qk_clip.py"
    ),
    Mutant("causal off by one", ".triu(begin + 1)", ".triu(begin)", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Mutant("causal ignores the chunk", ".triu(begin + 1)", ".triu(1)", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Mutant(
        "last chunk lost",
        "range(0, length, chunk)",
        "range(0, max(length - chunk, 1), chunk)",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Mutant(
        "half precision logits",
        "dtype = torch.promote_types(q.dtype, torch.float32)",
        "dtype = q.dtype",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Mutant(
        "scale twice",
        "return best * (1 / math.sqrt",
        "return best * (1 / 2 / math.sqrt",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Mutant(
        "absmax not exact",
        "F.threshold(x.div_(127), (_NAN + 0.5) / 127, math.nan, inplace=True).mul_(absmax.unsqueeze(-1))",
        "F.threshold(x, _NAN + 0.5, math.nan, inplace=True).mul_((absmax / 127).unsqueeze(-1))",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Mutant(
        "127 x leaves the range",
        "    torch.div(x, divisor.unsqueeze(-1), out=out)\n    out.mul_(127)",
        "    torch.div(x * 127, divisor.unsqueeze(-1), out=out)\n    out",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Mutant("truncated", ".round_()", ".trunc_()", "test_quantized", "muon_kernels/stages/packed.py"),
    Mutant("128 levels", "out.mul_(127)", "out.mul_(126)", "test_quantized", "muon_kernels/stages/packed.py"),
    Mutant(
        "NaN in absmax",
        "torch.nan_to_num(x, 0.0, 0.0, 0.0, out=out).abs_()",
        "torch.abs(x, out=out)",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Mutant(
        "NaN is zero",
        ".nan_to_num_(_NAN, _NAN, _NAN)",
        ".nan_to_num_(0, 0, 0)",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Mutant(
        "NaN code is a number",
        "F.threshold(x.div_(127), (_NAN + 0.5) / 127, math.nan, inplace=True)",
        "x.div_(127)",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Mutant(
        "blocks rounded down",
        "return -(-elements // block)",
        "return max(elements // block, 1)",
        "test_quantized",
        "muon_kernels/stages/quantize.py",
    ),
    Mutant(
        "column order",
        "F.pad(x.reshape(-1)",
        "F.pad(x.mT.reshape(-1) if x.ndim > 1 else x.reshape(-1)",
        "test_quantized",
        "muon_kernels/stages/quantize.py",
    ),
    Mutant(
        "magnitude of positives only", "out=out).abs_()", "out=out)", "test_quantized", "muon_kernels/stages/packed.py"
    ),
]
