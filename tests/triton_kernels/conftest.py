"""Where Triton's kernels run: in Triton's interpreter, or on tools/ptx, which executes what Triton compiled.

The interpreter takes no time to build a kernel, but has to be chosen before Triton is imported:
`TRITON_INTERPRET=1 pytest tests/triton_kernels`; test_interpreter.py does so in processes of its own. What is built,
few kernels of all that there are, is what says something about the code that a compiler makes of them.
"""

import os
from pathlib import Path

# With lines of the source in it, what Triton compiles is new, and so is translated and built again, when a line moves.
# For a profile or an error that names them: TRITON_DISABLE_LINE_INFO=0.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from checks.step import Gpu
from places import OnTheCpu, running

from muon_kernels.backends import triton as backend

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import interpreter

    interpreter.mend()

BOTH = (80, 90)
# Of the tests of elementwise kernels and of fused_step, those that are built, and for which architectures.
BUILT = {
    "test_momentum_update": BOTH,
    "test_ragged_sizes": BOTH,
    "test_tiles_of_different_sizes": BOTH,
    "test_numbers_below_bf16s_normal_range": (80,),
    "test_scale_is_the_norm_in_double": (80,),
    "test_scale_of_what_has_no_norm": BOTH,
    "test_orders_and_races": (80,),
    "test_offsets_have_64_bits": (80,),
    "test_many_matrices_take_one_launch": (80,),
    "test_apply_update": BOTH,
    "test_stochastic_rounding_is_unbiased": (80,),
    "test_random_bits_are_those_of_whole_matrices": (80,),
    "test_launches_and_compilations": (80,),
    "test_memory_traffic": BOTH,
    "test_step": BOTH,
    "test_accuracy": (80,),
    "test_accuracy_of_the_largest": (80,),
    "test_scale_does_not_matter": BOTH,
    "test_a_quiet_part_is_not_lost": BOTH,
    "test_zero_nan_and_infinity": BOTH,
    "test_every_order_gives_the_same_bits": BOTH,
    "test_momentum_is_torchs_to_the_bit": (80,),
    "test_no_races": BOTH,
    "test_compilations": (80,),
}
TOO_LONG = {"test_many_matrices_take_one_launch"}  # for the interpreter, which runs every program of a grid
# Of all dtypes of gradient, momentum and x, or of parameter and x: what is built, and what is interpreted.
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {
    80: {(F32, F32, BF16), (BF16, BF16, BF16), (F32, BF16), (BF16, BF16)},
    90: {(F32, F32, BF16), (F32, BF16)},
    0: {(BF16, F32, F16), (F16, BF16)},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`place`: an architecture, or 0 for the interpreter."""
    if "place" in metafunc.fixturenames:
        name = metafunc.function.__name__
        places = (None if name in TOO_LONG else 0,) if INTERPRETED else BUILT.get(name, (None,))
        metafunc.parametrize("place", places, ids=lambda p: f"sm_{p}" if p else "interpreter")


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> OnTheCpu:
    """The backend takes CPU tensors. Nothing outside the tests can switch this on."""
    device = OnTheCpu()
    monkeypatch.setattr(backend, "_device", device)
    return device


@pytest.fixture(params=[80, 90, "gpu"], ids=str)
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """Everywhere."""
    yield from running(request)


def _wanted(item: pytest.Item) -> bool:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    place = params.get("place", 0)
    dtypes = tuple(params[name] for name in ("dtype", "momentum_dtype", "X_dtype") if name in params)
    return place is not None and (len(dtypes) < 2 or dtypes in DTYPES[place])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Not skipped, but nowhere to be seen: the other place has them."""
    items[:] = [item for item in items if HERE not in item.path.parents or _wanted(item)]
