"""Kernels of instruction sets that this processor lacks, built with these in plain code: tests/emulated."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

from muon_kernels.backends import cpu

ROOT = Path(__file__).resolve().parents[1]
MISSING = [isa for isa in ("amx", "avx512bf16", "avx512") if isa not in cpu.instruction_sets()]

pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernels are for x86-64"),
    pytest.mark.skipif(not MISSING, reason="this processor has all instruction sets"),
]


def run(folder: Path, *command: str, **environment: str) -> str:
    """Run a command in a folder, from which Python imports first; what it said."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a copy of the package, with such a module."""
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(
        ROOT / "muon_kernels", folder / "muon_kernels", ignore=shutil.ignore_patterns("_C*.so", "__pycache__")
    )
    scripts = sysconfig.get_path("scripts")
    cmake, ninja = (shutil.which(name, path=scripts) or shutil.which(name) or name for name in ("cmake", "ninja"))
    options = [
        "-DMUON_KERNELS_EMULATED=ON",
        "-DCMAKE_BUILD_TYPE=None",
        "-DCMAKE_CXX_FLAGS=-O2",  # with -O1 tests, with -O3 compilers run twice as long
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'muon_kernels'}",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    run(folder, cmake, "-G", "Ninja", "-S", str(ROOT), "-B", "build", *options)
    run(folder, cmake, "--build", "build")
    return folder


@pytest.mark.parametrize("isa", MISSING)
def test_kernels(package: Path, isa: str) -> None:
    """What is asked of kernels that the processor has; dash and bracket, for one name begins another."""
    files = (str(ROOT / "tests" / name) for name in ("test_products.py", "test_elementwise.py"))
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    which = f"cpu-{isa}- or cpu-{isa}]"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which, "-c", str(ROOT / "pyproject.toml")]
    said = run(package, *command, *options, *files, PYTHONPATH=str(package), MUON_KERNELS_CPU_ISA="")
    passed = int(said.split(" passed")[0].rsplit(maxsplit=1)[-1])
    assert passed > 100 and " skipped" not in said, said
