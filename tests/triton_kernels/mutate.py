"""Plants faults in the Triton kernels, one at a time, and sees whether the tests notice."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("muon_kernels") / "triton_kernels"


class Mutant(NamedTuple):
    """A fault: `old`, which occurs exactly once in `file`, becomes `new`; pytest's -k chooses the tests."""

    name: str
    file: str
    old: str
    new: str
    tests: str


def noticed(work: Path, mutant: Mutant, module: str) -> str | None:
    """The first test that fails, or None."""
    file = work / KERNELS / mutant.file
    sound = file.read_text()
    assert sound.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r} occurs {sound.count(mutant.old)} times"
    file.write_text(sound.replace(mutant.old, mutant.new))
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/triton/{module}"]
        path = ":".join(str(p) for p in (work, work / "tests", work / "tests" / "triton"))
        done = subprocess.run(
            ["env", f"PYTHONPATH={path}", *command, "-k", mutant.tests],
            cwd=work, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return None
        failed = re.search(r"^FAILED \S+?::(.+?)( - |$)", done.stdout, re.MULTILINE)
        assert failed, f"{mutant.name}: no test ran\n{done.stdout[-2000:]}"
        return failed[1]
    finally:
        file.write_text(sound)


def main(mutants: Sequence[Mutant], module: str, description: str | None) -> None:
    """Try them; the exit status says whether one went unnoticed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", default="", help="part of a mutant's name")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    chosen = [m for m in mutants if options.only in m.name]
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        # One place for all: the caches keep what a fault did not touch.
        work = Path(scratch) / "work"
        shutil.copytree(ROOT, work, ignore=shutil.ignore_patterns(".git", "__pycache__", "build"))
        for m in chosen:
            test = noticed(work, m, module)
            missed += test is None
            line = f"{m.file:15} {m.name:42} {test or 'NOT NOTICED'}"
            print(line, flush=True)
            if options.log:
                with options.log.open("a") as log:
                    log.write(line + "\n")
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    sys.exit(missed > 0)
