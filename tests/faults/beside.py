"""Faults in what stands beside the step: spectra, QK-Clip, blocks of eight bits, graphs; see plant.py."""

from __future__ import annotations

from plant import Fault

TESTS = ["tests/test_spectra.py", "tests/test_qk_clip.py", "tests/test_quantized.py", "tests/test_graphs.py"]

FAULTS = [
    Fault(
        "captured on the current device",
        "    with torch.cuda.device(device):\n        return",
        "    return",
        "stream_of_the_device",
        "muon_kernels/graphs.py",
    ),
    Fault(
        "random bits are captured",
        "if scalars.seed is not None and capturing(work.device):",
        "if scalars.seed is not None and False:",
        "random_bits",
        "muon_kernels/step/run.py",
    ),
    Fault(
        "entropy of sigma, not its square",
        "(_entropy(s.square()) / math.log",
        "(_entropy(s) / math.log",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "effective rank of sigma squared",
        "return s[..., 0] * _entropy(s).exp()",
        "return s[..., 0] * _entropy(s.square()).exp()",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "zero has rank one",
        "return s[..., 0] * _entropy(s).exp()",
        "return _entropy(s).exp()",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "natural logarithm of n+1",
        "math.log(s.shape[-1])).clamp",
        "math.log(s.shape[-1] + 1)).clamp",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "batch shares its NaN",
        ".flatten(-2).all(-1, keepdim=True)",
        ".all().expand(W.shape[:-2]).unsqueeze(-1)",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "not relative", "return _over(sigma, sigma[..., :1])", "return sigma", "test_spectra", "muon_kernels/spectra.py"
    ),
    Fault(
        "zero well conditioned",
        ".where(smallest != 0, math.inf)",
        ".where(smallest != 0, 1.0)",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "rms is norm", "/ math.sqrt(max(W.shape[-2] * W.shape[-1], 1))", "", "test_spectra", "muon_kernels/spectra.py"
    ),
    Fault(
        "update not copied",
        "p.detach().clone() for _, p",
        "p.detach() for _, p",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "update of rounded",
        "p.double() - before[p].double()",
        "p - before[p]",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "update without gradient",
        "if p in before and p.grad is not None",
        "if p in before",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "counts before",
        "due = (self.step + 1) % self._every",
        "due = self.step % self._every",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "flatten ignored",
        "step=self.step, flatten=flatten)",
        "step=self.step)",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault("later rows kept", 'if row["step"] <= self.step]', "]", "test_spectra", "muon_kernels/spectra.py"),
    Fault("resume counts rows", "last if step is None else step", "last", "test_spectra", "muon_kernels/spectra.py"),
    Fault(
        "median is mean",
        "middle = [median(by_step[step])",
        "middle = [sum(by_step[step]) / len(by_step[step])",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "JSON has Infinity",
        "if isinstance(v, float) and not math.isfinite(v) else v",
        "if False else v",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "not atomic",
        'beside = path.with_name(path.name + ".part")',
        "beside = path",
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault(
        "names of group ignored",
        'or (named[place] if place < len(named) else f"{number}.{place}")',
        'or f"{number}.{place}"',
        "test_spectra",
        "muon_kernels/spectra.py",
    ),
    Fault("gamma not square root of", "applied**alpha", "applied", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Fault("alpha swapped", '(1 - alpha)), ("q_rope"', 'alpha), ("q_rope"', "test_qk_clip", "muon_kernels/qk_clip.py"),
    Fault("group takes the least logit", ".amin(1)", ".amax(1)", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Fault(
        "groups interleaved",
        "applied.view(kv_heads, -1).amin(1)",
        "applied.view(-1, kv_heads).amin(0)",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Fault("negative logits", "largest.clamp(min=tau)", "largest", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Fault(
        "rope by sqrt", '("q_rope", applied)', '("q_rope", applied**alpha)', "test_qk_clip", "muon_kernels/qk_clip.py"
    ),
    Fault(
        "factor rounded to bf16",
        "rows.mul_(scale.view(count, *[1] * weight.ndim))",
        "rows.mul_(scale.to(weight.dtype).view(count, *[1] * weight.ndim))",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Fault("version hidden", "rows.mul_(scale", "rows.data.mul_(scale", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Fault(
        "heads interleaved",
        "weight.detach().view(count, weight.shape[0] // count, *weight.shape[1:])",
        "weight.detach().view(weight.shape[0] // count, count, *weight.shape[1:]).transpose(0, 1)",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Fault("host waits", "if on_host(bad) and bad.any()", "if bad.any()", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Fault(
        "nan spreads", "applied = gamma.where(~bad, 1.0)", "applied = gamma", "test_qk_clip", "muon_kernels/qk_clip.py"
    ),
    Fault("causal off by one", ".triu(begin + 1)", ".triu(begin)", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Fault("causal ignores the chunk", ".triu(begin + 1)", ".triu(1)", "test_qk_clip", "muon_kernels/qk_clip.py"),
    Fault(
        "last chunk lost",
        "range(0, length, chunk)",
        "range(0, max(length - chunk, 1), chunk)",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Fault(
        "half precision logits",
        "dtype = torch.promote_types(q.dtype, torch.float32)",
        "dtype = q.dtype",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Fault(
        "scale twice",
        "return best * (1 / math.sqrt",
        "return best * (1 / 2 / math.sqrt",
        "test_qk_clip",
        "muon_kernels/qk_clip.py",
    ),
    Fault(
        "absmax not exact",
        "F.threshold(x.div_(127), (_NAN + 0.5) / 127, math.nan, inplace=True).mul_(absmax.unsqueeze(-1))",
        "F.threshold(x, _NAN + 0.5, math.nan, inplace=True).mul_((absmax / 127).unsqueeze(-1))",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Fault(
        "127 x leaves the range",
        "    torch.div(x, divisor.unsqueeze(-1), out=out)\n    out.mul_(127)",
        "    torch.div(x * 127, divisor.unsqueeze(-1), out=out)\n    out",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Fault("truncated", ".round_()", ".trunc_()", "test_quantized", "muon_kernels/stages/packed.py"),
    Fault("128 levels", "out.mul_(127)", "out.mul_(126)", "test_quantized", "muon_kernels/stages/packed.py"),
    Fault(
        "NaN in absmax",
        "torch.nan_to_num(x, 0.0, 0.0, 0.0, out=out).abs_()",
        "torch.abs(x, out=out)",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Fault(
        "NaN is zero",
        ".nan_to_num_(_NAN, _NAN, _NAN)",
        ".nan_to_num_(0, 0, 0)",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Fault(
        "NaN code is a number",
        "F.threshold(x.div_(127), (_NAN + 0.5) / 127, math.nan, inplace=True)",
        "x.div_(127)",
        "test_quantized",
        "muon_kernels/stages/packed.py",
    ),
    Fault(
        "blocks rounded down",
        "return -(-elements // block)",
        "return max(elements // block, 1)",
        "test_quantized",
        "muon_kernels/stages/quantize.py",
    ),
    Fault(
        "column order",
        "F.pad(x.reshape(-1)",
        "F.pad(x.mT.reshape(-1) if x.ndim > 1 else x.reshape(-1)",
        "test_quantized",
        "muon_kernels/stages/quantize.py",
    ),
    Fault(
        "magnitude of positives only", "out=out).abs_()", "out=out)", "test_quantized", "muon_kernels/stages/packed.py"
    ),
]
