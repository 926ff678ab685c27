"""Faults in how launches are made ready, recorded and repeated, by Triton's backend and for all; see plant.py."""

from __future__ import annotations

from functools import partial

import plant

LAUNCH, STEP = "muon_kernels/triton_kernels/launch.py", "muon_kernels/step/run.py"
PRODUCTS, CUDA = "muon_kernels/triton_kernels/products.py", "muon_kernels/backends/cuda.py"
MEASURED, TUNING = "muon_kernels/triton_kernels/measured.py", "muon_kernels/triton_kernels/tuning.py"
TESTS = [
    "tests/triton_kernels/test_backend_triton.py",
    "tests/triton_kernels/test_products_triton.py",
    "tests/triton_kernels/test_tuning.py",
    "tests/test_backends.py",
    "tests/test_optimizer.py",
]
Fault = partial(plant.Fault, file=LAUNCH)

COMPILED = "test_what_cannot_be_compiled and fused_step"

FAULTS = [
    Fault("alignment is not part of the key", "*map(_type, arguments), *aligned", "*map(_type, arguments)", "test_an_address_less_aligned"),
    Fault("dtypes are not part of the key", "*map(_type, arguments), *aligned", "*aligned", "test_f16 or test_error_is_that_of_one_rounding"),
    Fault("a rehearsal launches", "        if not _state.rehearsing:\n", "        if True:\n", COMPILED),
    Fault("a rehearsal does not end", "        _state.rehearsing = False\n\n\ndef", "        pass\n\n\ndef", "test_an_error_of_a_launch"),
    Fault("no rehearsal", "                with rehearsal:\n                    _step(work, seen, workspace, scalars, rehearsing=True)", "                pass", COMPILED, file=STEP),
    Fault("recording does not end", "    finally:\n        _state.recording = None", "    finally:\n        pass", "test_what_cannot_be_compiled and cache-products"),
    Fault("a record of another scale", 'if derived.get("key") != key:', 'if "key" not in derived:', "test_a_record_of_products and eager", file=STEP),
    Fault("another device's kernel", "key = kernel, driver.active.get_current_device(), ", "key = kernel, ", "test_an_address_less_aligned"),
    Fault("wide numbers as narrow ones", "bit_length() > 31", "bit_length() > 62", "test_an_address_less_aligned"),
    Fault("compiled, not loaded", "                compiled._init_handles()\n", "", "test_an_address_less_aligned"),
    Fault("a later step without nesterov", "kind = scalars.nesterov, ", "kind = ", "test_a_later_step and nesterov", file=STEP),
    Fault("a later step not dampened", "scalars.nesterov, scalars.dampened, ", "scalars.nesterov, ", "test_a_later_step and dampened", file=STEP),
    Fault("a later step's lr on the device", "scalars.dampened, *on_host, ", "scalars.dampened, ", "test_a_later_step and lr", file=STEP),
    Fault("a later step's gradient elsewhere", ", *(i for i, g in enumerate(seen) if g.data_ptr() % 16)", "", "test_a_later_step and gradient", file=STEP),
    Fault("the vendor's library in a rehearsal", "        if _state.rehearsing:\n            rehearse()", "        if False:\n            rehearse()", "test_what_is_left_to_the_vendor_is"),
    Fault("the vendor's library at once", "do(partial(gemm_by_vendor, a, b, c, out, a_diagonal, alpha, beta, scale), room)", "gemm_by_vendor(a, b, c, out, a_diagonal, alpha, beta, scale)", "test_what_is_left_to_the_vendor_is", file=PRODUCTS),
    # Choices.
    Fault("sums rounded by an old torch", "return table if _SUMS_IN_FP32 else", "return table if True else", "test_where_torch_rounds", file=MEASURED),
    Fault("another version's candidates", "if [c._replace(cost=0) for c in kept] !=", "if [] and [c._replace(cost=0) for c in kept] !=", "test_what_cannot_be_read", file=MEASURED),
    Fault("costs not relative to the best", "relative[config].append(took / best)", "relative[config].append(took)", "test_what_is_measured", file=TUNING),
    Fault("the slower of the two multiplies", "< 1:\n            break", "> 1:\n            break", "test_what_is_measured", file=TUNING),
    Fault("cuda up to 127 rows", "rows <= max(FUSED_ROWS.values())", "rows < max(FUSED_ROWS.values())", "test_triton_is_taken", file=CUDA),
    Fault("cuda on sm_100", ', 10: "tcgen05"', "", "test_triton_is_taken", file=CUDA),
]  # fmt: skip
