"""The same tests in Triton's interpreter, which must be chosen before Triton is imported: a process for each file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What only says something of built kernels, or is long.
NOT = "not (built or accuracy or unbiased or races or order or in_double or different_sizes or ragged or table)"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs there")
@pytest.mark.parametrize("name", ["elementwise", "fused_step"])
def test_interpreted(name: str) -> None:
    file = Path(__file__).parent / f"test_{name}_triton.py"
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", file, "-k", NOT]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
