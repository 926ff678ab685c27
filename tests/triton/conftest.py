"""Where Triton's kernels run: on tests/ptx, which executes what Triton compiled, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported: `TRITON_INTERPRET=1 pytest tests/triton`.
"""

import os

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`place`: an architecture, or 0 for the interpreter."""
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", [0] if INTERPRETED else [80, 90], ids=lambda p: f"sm_{p}" if p else "interpreter")
