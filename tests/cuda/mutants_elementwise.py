"""Plants faults in the elementwise CUDA kernels, one at a time, and sees whether the tests notice.

    python tests/cuda/mutants_elementwise.py [--only NAME] [--log FILE]

A fault costs a compilation; all take about a quarter of an hour. What only costs time is no fault, unless the profile's
assertions count it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """A fault: `old`, which occurs exactly once in csrc/cuda/`file`, becomes `new`; pytest's -k chooses the tests."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MOMENTUM, APPLY, SHARED = "momentum_update.cu", "apply_update.cu", "elementwise.cuh"
UPDATE = "test_momentum_update and float32-torch.float32"
DECAY = "test_apply_update and float32-torch.bfloat16"

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
    Mutant("f16: no power of two", MOMENTUM, "factor(tile_power(sum, true))", "factor(0)", "digits"),
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
        "tile_power(smallest, u.half) == whole",
        "tile_power(largest, u.half) == whole",
        "different_sizes",
    ),
    Mutant(
        "two blocks rescale the same tiles", MOMENTUM, "share = blockIdx.x % u.shares;", "share = 0;", "different_sizes"
    ),
    Mutant("infinity has a scale", MOMENTUM, "if (!isfinite(norm)) return __int_as_float(0x7fc00000);", "", "no_norm"),
    # Walks, lists, shared memory.
    Mutant("lines beyond the matrix", SHARED, "return offset(l) < lines; }", "return lines > 0; }", UPDATE),
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


def caught(work: Path, mutant: Mutant) -> str | None:
    """The first test that fails, or None."""
    file = work / "csrc" / "cuda" / mutant.file
    sound = file.read_text()
    assert sound.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r} occurs {sound.count(mutant.old)} times"
    file.write_text(sound.replace(mutant.old, mutant.new))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/cuda/test_elementwise_cuda.py",
        ]
        done = subprocess.run([*command, "-k", mutant.tests], cwd=work, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.MULTILINE)
        assert failed, f"{mutant.name}: no test ran\n{done.stdout[-2000:]}"
        return failed[1]
    finally:
        file.write_text(sound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a mutant's name")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in m.name]
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        # One place for all: the executor's cache keeps what a fault did not touch.
        work = Path(scratch) / "work"
        skip = shutil.ignore_patterns(".git", "__pycache__", "build")
        shutil.copytree(ROOT, work, ignore=skip)
        for m in chosen:
            test = caught(work, m)
            missed += test is None
            line = f"{m.file:20} {m.name:42} {test or 'NOT NOTICED'}"
            print(line, flush=True)
            if options.log:
                with options.log.open("a") as log:
                    log.write(line + "\n")
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
