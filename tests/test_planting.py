"""The lists of planted faults fit the sources, and their harness says of each what happened."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / "tests" / "faults" / "plant.py"


@pytest.fixture(scope="module")
def plant() -> ModuleType:
    """Return the harness."""
    spec = importlib.util.spec_from_file_location("plant", HARNESS)
    assert spec is not None and spec.loader is not None
    sys.modules["plant"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_fault_can_be_planted(plant: ModuleType) -> None:
    for faults in plant.read_lists(ROOT).values():
        for fault in (*faults.lean, *faults.faults):
            text = plant.place_of(ROOT, fault).read_text()
            assert fault.planted(text) != text, (faults.name, fault.name)


def test_names_are_of_one_fault(plant: ModuleType) -> None:
    for faults in plant.read_lists(ROOT).values():
        names = [fault.name for fault in faults.faults]
        assert sorted(names) == sorted(set(names)), faults.name


FOLDERS = ("tests/", "tools/", "examples/")


def test_files_of_tests_are_there(plant: ModuleType) -> None:
    for faults in plant.read_lists(ROOT).values():
        for fault in faults.faults:
            files = [word.split("::")[0] for word in faults.arguments(fault) if word.startswith(FOLDERS)]
            assert files and all((ROOT / file).exists() for file in files), (faults.name, fault.name)


def test_the_page_is_what_the_scores_make(plant: ModuleType) -> None:
    """`python tests/faults/plant.py --stale` writes it anew."""
    page = plant.page(plant.read_scores(ROOT), plant.read_lists(ROOT))
    assert (HARNESS.parent / "SCORES.md").read_text() == page


FILES = {
    "muon_kernels/__init__.py": "def one():\n    return 1\n\n\ndef two():\n    return 2\n",
    "muon_kernels/moved.py": "def three():\n    return 3\n\n\ndef five():\n    return 5\n",
    "tests/test_tiny.py": """import multiprocessing
import pytest
import muon_kernels
from muon_kernels import moved

def test_one():
    assert muon_kernels.one() == 1

def test_three():
    assert moved.three() == 3

def test_spawned():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(muon_kernels.one) == 1

@pytest.mark.skip
def test_of_another_machine():
    assert muon_kernels.two() == 2
""",
    "tests/faults/tiny.toml": """tests = ["tests/test_tiny.py"]

[[fault]]
name = "noticed"
old = "return 1"
new = "return -1"
tests = "one"
file = "muon_kernels/__init__.py"

[[fault]]
name = "noticed by a spawned process"
old = "return 1"
new = "return -1"
tests = "spawned"
file = "muon_kernels/__init__.py"

[[fault]]
name = "survives"
old = "return 2"
new = "return -2"
tests = "one"
file = "muon_kernels/__init__.py"

[[fault]]
name = "has tests that are skipped here"
old = "return 2"
new = "return -2"
tests = "another_machine"
file = "muon_kernels/__init__.py"

[[fault]]
name = "was renamed"
old = "return 4"
new = "return -4"
tests = "one"
file = "muon_kernels/__init__.py"

[[fault]]
name = "is there twice"
old = "return"
new = "pass"
tests = "one"
file = "muon_kernels/__init__.py"

[[fault]]
name = "was moved"
old = "return 3"
new = "return -3"
tests = "tests/test_tiny.py -k 'three or one'"
file = "muon_kernels/__init__.py"

[[fault]]
name = "ends the process"
old = "return 1"
new = "import os; os.kill(os.getpid(), 9)"
tests = "one"
file = "muon_kernels/__init__.py"
""",
}
FOUND = {
    "noticed": "test_tiny.py::test_one",
    "noticed by a spawned process": "test_tiny.py::test_spawned",
    "survives": "SURVIVED",
    "was renamed": "STALE",
    "is there twice": "STALE",
    "was moved": "test_tiny.py::test_three",
    "ends the process": "killed by signal 9",
}


def run(root: Path, *arguments: str) -> tuple[int, list[str]]:
    """The harness's exit status, and what it said of each fault."""
    command = [sys.executable, str(root / "tests" / "faults" / "plant.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # which is not what is tested
    done = subprocess.run(command, cwd=root.parent, env=environment, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def scores(root: Path) -> dict[str, Any]:
    rows = map(json.loads, (root / "tests" / "faults" / "scores.jsonl").read_text().splitlines())
    return {row["name"]: row["result"] for row in rows}


def test_the_harness_itself(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copy(HARNESS, root / "tests" / "faults")
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=b commit -qm c"):
        subprocess.run(["git", *command.split()], cwd=root, check=True)

    assert run(root, "--stale")[0] == 0
    assert scores(root) == {name: found for name, found in FOUND.items() if found == "STALE"}
    assert run(root, "tiny", "--only", "noticed", "--minutes", "0")[0] == 0
    assert "noticed" not in scores(root)

    status, said = run(root, "--missing")
    assert (status, scores(root)) == (1, FOUND), "\n".join(said)
    page = (root / "tests" / "faults" / "SCORES.md").read_text()
    assert "| tiny | 8 | 4 | 1 | 2 | 0 | 1 |" in page
    assert "## Survivors\n\n- tiny: survives\n" in page
    assert {name: (root / name).read_text() for name in FILES} == FILES

    # A fault that is another one now has no score, and what is mended is not stale.
    faults = root / "tests" / "faults" / "tiny.toml"
    faults.write_text(FILES["tests/faults/tiny.toml"].replace("return -1", "return 0").replace("return 4", "return 2"))
    assert run(root, "--stale")[0] == 0
    page = (root / "tests" / "faults" / "SCORES.md").read_text()
    assert "| tiny | 8 | 2 | 1 | 1 | 0 | 4 |" in page
    assert "| noticed | not run |" in page
