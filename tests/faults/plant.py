"""Plants faults, one at a time in a copy of the repository, and sees whether the tests notice: in GPU kernels, mostly.

    python tests/plant.py tests/cuda/mutants_products.py [--only NAME] [--log FILE]

A list has FAULTS; TESTS, the files of tests that must notice; and may have LEAN, (file, old, new) replaced before:
instantiations that no chosen test needs, to save time. A fault costs a compilation, a list a quarter of an hour.
The tests build the kernels, and names of builds are hashes of what goes into them: a fault's test cannot meet a sound
build. What only costs time is no fault, unless the profile's assertions count it.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """A fault: `old`, which occurs exactly once in `file`, becomes `new`; `tests` is pytest's -k.

    `also` has more of (old, new) in that file.
    """

    name: str
    old: str
    new: str
    tests: str
    file: str
    also: tuple[tuple[str, str], ...] = ()

    def planted(self, text: str) -> str:
        """The file with the fault in it."""
        for old, new in ((self.old, self.new), *self.also):
            if (count := text.count(old)) != 1:
                sys.exit(f"{self.name}: {old!r} occurs {count} times in {self.file}")
            text = text.replace(old, new)
        return text


def place_of(root: Path, file: str, old: str, name: str) -> Path:
    """The file that has `old` exactly once: the one that a list names or, where code has moved since, the only one."""
    named = root / file
    if named.exists() and named.read_text().count(old) == 1:
        return named
    sources = (path for folder in ("muon_kernels", "csrc", "python") for path in (root / folder).rglob("*.*"))
    texts = (path for path in sources if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"))
    found = [path for path in texts if path.read_text().count(old) == 1]
    if len(found) != 1:
        places = [str(path.relative_to(root)) for path in found]
        sys.exit(f"{name}: {old!r} should be in {file}, or in one other file, once, but is in: {places}")
    return found[0]


def _failure(root: Path, tests: Sequence[str], expression: str) -> str | None:
    """The first test that fails, or None."""
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests, "-k", expression]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(.*?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not failed or "nvcc failed" in done.stdout:
        sys.exit(f"the tests did not run:\n{done.stdout}{done.stderr}")
    return f"{failed[1]}: {failed[2] or ''}"[:160]


def main() -> int:
    """Try all; return 1 if one survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--log", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    given = runpy.run_path(str(arguments.list))
    mutants, tests, lean = given["FAULTS"], given["TESTS"], given.get("LEAN", ())
    chosen = [m for m in mutants if arguments.only in m.name]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, files.split("\0")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
        for built in (ROOT / "muon_kernels").glob("_C.*"):  # for faults in Python that only native code meets
            shutil.copyfile(built, root / "muon_kernels" / built.name)
        for mutant in (*(Fault("lean", old, new, "", file) for file, old, new in lean), *chosen):
            path = place_of(root, mutant.file, mutant.old, mutant.name)
            text = mutant.planted(path.read_text())
            if not mutant.tests:
                path.write_text(text)
        for expression in dict.fromkeys(m.tests for m in chosen):
            if failed := _failure(root, tests, expression):
                sys.exit(f"fails without a mutant: {failed}")
        for mutant in chosen:
            path = place_of(root, mutant.file, mutant.old, mutant.name)
            text = path.read_text()
            path.write_text(mutant.planted(text))
            rows.append((mutant.name, _failure(root, tests, mutant.tests) or "SURVIVED"))
            path.write_text(text)
            print(": ".join(rows[-1]), flush=True)
    survived = [name for name, failed in rows if failed == "SURVIVED"]
    print(f"{len(rows) - len(survived)} of {len(rows)} noticed")
    if arguments.log:
        width = max(len(name) for name, _ in rows)
        arguments.log.write_text("".join(f"{name.ljust(width)}  {failed}\n" for name, failed in rows))
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
