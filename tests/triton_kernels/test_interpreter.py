"""The same tests in Triton's interpreter, which must be chosen before Triton is imported: one process for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = "test_counts or no_norm or cautious or special_values or zero_nan or (test_options and changes0) or bit"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs there")
def test_interpreter() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here, "-k", f"({TESTS}) and interpreter"]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
