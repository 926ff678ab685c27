"""Plants faults in a kernel, one at a time, in a copy of the repository, and sees whether the kernel's tests notice."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """A fault: `old`, which occurs exactly once in `file`, becomes `new`; `tests` is pytest's -k."""

    name: str
    old: str
    new: str
    tests: str
    file: str = ""  # the kernel's


def _failure(root: Path, tests: Sequence[str], expression: str) -> str | None:
    """What failed, or None."""
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests, "-k", expression]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(.*?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not failed:
        sys.exit(f"the tests did not run:\n{done.stdout}{done.stderr}")
    return f"{failed[1]}: {failed[2] or ''}"[:160]


def plant(
    description: str | None,
    mutants: Sequence[Mutant],
    kernel: str,
    tests: Sequence[str],
    prepare: Callable[[Path], None] = lambda root: None,
) -> int:
    """The command line of a table of mutants; `prepare` is given the copy. 1 if a mutant survived."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--log", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, files.split("\0")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
        prepare(root)
        mutants = [m._replace(file=m.file or kernel) for m in mutants if arguments.only in m.name]
        for mutant in mutants:
            if (count := (root / mutant.file).read_text().count(mutant.old)) != 1:
                sys.exit(f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}")
        for expression in dict.fromkeys(m.tests for m in mutants):
            if failed := _failure(root, tests, expression):
                sys.exit(f"fails without a mutant: {failed}")
        for mutant in mutants:
            path = root / mutant.file
            text = path.read_text()
            path.write_text(text.replace(mutant.old, mutant.new))
            rows.append((mutant.name, _failure(root, tests, mutant.tests) or "SURVIVED"))
            path.write_text(text)
            print(": ".join(rows[-1]), flush=True)
    if arguments.log:
        width = max(len(name) for name, _ in rows)
        arguments.log.write_text("".join(f"{name.ljust(width)}  {caught}\n" for name, caught in rows))
    return int(any(caught == "SURVIVED" for _, caught in rows))
