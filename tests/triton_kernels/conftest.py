"""Where Triton's kernels run: on tests/ptx, which executes what Triton compiled, or in Triton's interpreter.

The interpreter has to be chosen before Triton is imported: `TRITON_INTERPRET=1 pytest tests/triton_kernels`. It is
slow; a test runs what it is good for in a process of its own.
"""

import os

# With lines of the source in it, what Triton compiles is new, and so is translated and built again, when a line moves.
# For a profile or an error that names them: TRITON_DISABLE_LINE_INFO=0.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

import pytest

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter

    interpreter.mend()
# What one architecture compiles to is much like what another does; these are worth both.
ON_BOTH = {
    "test_accuracy_of_the_largest",
    "test_every_order_gives_the_same_bits",
    "test_launches_and_compilations",
    "test_memory_traffic",
    "test_no_races",
    "test_options",
    "test_orders_and_races",
    "test_ragged_sizes",
    "test_scale_does_not_matter",
    "test_step",
    "test_zero_nan_and_infinity",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`place`: an architecture, or 0 for the interpreter."""
    if "place" in metafunc.fixturenames:
        places = [0] if INTERPRETED else [80, 90] if metafunc.function.__name__ in ON_BOTH else [80]
        metafunc.parametrize("place", places, ids=lambda p: f"sm_{p}" if p else "interpreter")
