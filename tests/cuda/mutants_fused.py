"""Plants faults in fused_step, one at a time, and sees whether tests/cuda/test_fused_step.py notices.

    python tests/cuda/mutants_fused.py [--only NAME]

Every fault costs a compilation; the copy is cut down to the two smallest kernels, which have all the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "csrc/cuda/fused_step_sm80.cu"
CUTS = [
    ("    if (rows <= 64) return launch<64>(args, count, stream);\n    return launch<128>(args, count, stream);\n",
     "    return cudaErrorInvalidValue;\n"),
    ("    if (rows <= 32) return launch<32>", "    return launch<32>"),
]  # fmt: skip


class Mutant(NamedTuple):
    """A fault: `old`, which occurs exactly once, becomes `new`; `tests` are for pytest's -k."""

    name: str
    old: str
    new: str
    tests: str


SMALL = "test_step and (1-1 or 3-17 or 29-32 or 16-160)"
ACCURATE = "test_accuracy and 16-160"
RACES = "test_no_races"
SCALES = "scale or quiet or zero"
OPTIONS = "test_options"
TRAFFIC = "test_memory_traffic"

MUTANTS = [
    # Barriers.
    Mutant("no barrier before S is stored", "        if (phase == 0 || phase == 3) {\n            __syncthreads();",
           "        if (phase == 0 || phase == 3) {", RACES),
    Mutant("no barrier after R is stored", "    square.store(R, s.terms);\n    __syncthreads();",
           "    square.store(R, s.terms);", RACES),
    Mutant("no barrier after a tile is stored", "        __syncthreads();\n        tile.add_gram", "        tile.add_gram",
           RACES),
    Mutant("no barrier before the update is read", "        __syncthreads();\n#pragma unroll\n        for (int u = 0; u < kUnits; ++u) {\n            const int count",
           "#pragma unroll\n        for (int u = 0; u < kUnits; ++u) {\n            const int count", RACES),
    # Precision.
    Mutant("one term", "if (of_a + t >= terms) continue;", "if (of_a + t >= 1) continue;", ACCURATE),
    Mutant("two terms always", "return t + 2;", "return 2;", "test_accuracy and you6"),
    Mutant("second term not of what is left", "low -= to_float(terms[t]);", "low -= 0;", ACCURATE),
    Mutant("everything allowed", "constexpr double kLimit = 4;", "constexpr double kLimit = 1e300;", "refused"),
    Mutant("transpose of S", "base + t * kTermBytes, lane, 16 * k, 8 * j, false)",
           "base + t * kTermBytes, lane, 16 * k, 8 * j, true)", ACCURATE),
    # Iteration.
    Mutant("b and c exchanged", "fmaf(triple[2], product[j][i], fmaf(triple[1],",
           "fmaf(triple[1], product[j][i], fmaf(triple[2],", ACCURATE),
    Mutant("one step less", "4 * s.steps - 2", "4 * s.steps - 6", ACCURATE),
    Mutant("margin ignored", "* s.margin);", "* 1.0f);", "test_accuracy and cubic5 and 16-160"),
    Mutant("coefficients of the first step", "s.coefficients[p / 4]", "s.coefficients[0]", ACCURATE),
    # Scales.
    Mutant("R not scaled down", "R[j][i] * shrink * shrink", "R[j][i]", SCALES),
    Mutant("R scaled down by half", "R[j][i] * shrink * shrink", "R[j][i] * shrink", SCALES),
    Mutant("no power of two", "if (larger > exponent) {", "if (false) {", SCALES),
    Mutant("zero has no guard", "norm == 0 ? 0 : 1 /", "1 /", SCALES),
    # Edges and layouts.
    Mutant("tail of a unit read whole", "x[i] = i < count ? p[i * from.stride] : 0.0f", "x[i] = p[i * from.stride]", SMALL),
    Mutant("tail of a unit written whole", "if (i < count) p[i * to.stride] = x[i];", "p[i * to.stride] = x[i];", SMALL),
    Mutant("alignment not asked for", "line_stride % kUnit == 0 && address", "address", SMALL),
    Mutant("last tile skipped", "for (int col = 0; col < s.cols; col += BLOCK_K) {\n        __syncthreads();",
           "for (int col = 0; col + BLOCK_K <= s.cols; col += BLOCK_K) {\n        __syncthreads();", SMALL),
    Mutant("rows 8 to 15 in the place of 0 to 7", "first_row + 8 * (i / 2), column", "first_row + 0 * (i / 2), column", SMALL),
    # Momentum and update.
    Mutant("gradient's scale forgotten in the second pass", "const float g = grad[u][i] * s.grad_scale;\n        if (!s.has",
           "const float g = grad[u][i];\n        if (!s.has", OPTIONS),
    Mutant("lerp of one branch", "return weight < 0.5f ?", "return true ?", "to_the_bit or test_options"),
    Mutant("gradient not read without momentum", "!s.has_momentum || s.nesterov;", "s.nesterov;", OPTIONS),
    Mutant("cautious where the signs differ", "change[i] * p[i] >= 0", "change[i] * p[i] <= 0", OPTIONS),
    Mutant("momentum not rounded", "        x[0] = to_float(bits.x);\n        x[1] = __uint_as_float(bits.x & 0xffff0000);\n        x[2] = to_float(bits.y);\n        x[3] = __uint_as_float(bits.y & 0xffff0000);\n        if (to.vectors",
           "        if (to.vectors", "test_dtypes"),
    Mutant("second launch begins anew", "const int64_t from = first + i;", "const int64_t from = i;", "test_counts"),
    # Speed.
    Mutant("no swizzle", "(chunk ^ (line / kLinesOfBanks & kMask))", "chunk", TRAFFIC),
    Mutant("no vectors", "vectors = stride == 1 &&", "vectors = false &&", TRAFFIC),
]  # fmt: skip


def run(tree: Path, tests: str, cache: str) -> bool:
    """Whether the chosen tests pass."""
    env = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'tests'}", "MUON_PTX_CACHE": cache}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/cuda/test_fused_step.py",
        "-k",
        tests,
    ]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or ("failed:" in done.stdout and "nvcc failed" in done.stdout):
        raise RuntimeError(done.stdout[-3000:])
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    missed = []
    with tempfile.TemporaryDirectory() as directory:
        tree, cache = Path(directory) / "tree", str(Path(directory) / "cache")
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        for name in files:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        text = (tree / SOURCE).read_text()
        for old, new in CUTS:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        for mutant in MUTANTS:
            if only not in mutant.name:
                continue
            assert text.count(mutant.old) == 1, f"{mutant.name}: found {text.count(mutant.old)} times"
            (tree / SOURCE).write_text(text.replace(mutant.old, mutant.new))
            caught = not run(tree, mutant.tests, cache)
            print("caught" if caught else "MISSED", mutant.name, flush=True)
            if not caught:
                missed.append(mutant.name)
    print(f"{len(missed)} missed" if missed else "all caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
