"""Faults in how launches are made ready, recorded and repeated, by Triton's backend and for all; see planting.py."""

from __future__ import annotations

from functools import partial

import planting

LAUNCH, STEP = "muon_kernels/triton_kernels/launch.py", "muon_kernels/functional.py"
TESTS = [
    "tests/triton_kernels/test_backend_triton.py",
    "tests/triton_kernels/test_products_triton.py",
    "tests/test_optimizer.py",
]
Mutant = partial(planting.Mutant, file=LAUNCH)

COMPILED = "test_what_cannot_be_compiled and fused_step"

MUTANTS = [
    Mutant("alignment is not part of the key", "*map(_type, arguments), *aligned", "*map(_type, arguments)", "test_an_address_less_aligned"),
    Mutant("dtypes are not part of the key", "*map(_type, arguments), *aligned", "*aligned", "test_f16 or test_error_is_that_of_one_rounding"),
    Mutant("a rehearsal launches", "        if not _state.rehearsing:\n", "        if True:\n", COMPILED),
    Mutant("a rehearsal does not end", "        _state.rehearsing = False\n\n\ndef", "        pass\n\n\ndef", "test_an_error_of_a_launch"),
    Mutant("no rehearsal", "            with rehearsal:\n                _step(work, seen, workspace, scalars)", "            pass", COMPILED, file=STEP),
    Mutant("recording does not end", "    finally:\n        _state.recording = None", "    finally:\n        pass", "test_what_cannot_be_compiled and cache-products"),
    Mutant("a record of other coefficients", 'if derived.get("key") != key:', 'if "key" not in derived:', "test_coefficients_change_between_steps and eager", file=STEP),
]  # fmt: skip
