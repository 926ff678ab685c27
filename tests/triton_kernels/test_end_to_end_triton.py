"""`Muon(backend="triton")` from end to end: through Triton's launch code to its PTX, executed on the CPU; on a GPU, if
there is one, as well; and in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import interpreter
from checks.step import *  # noqa: F403
from checks.step import Gpu, test_steps_are_those_of_the_other_backends
from emulated_gpu import compiling
from places import OnTheCpu

from muon_kernels.backends import triton as backend


def test_in_the_interpreter() -> None:
    """Which must be chosen before Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


if __name__ == "__main__":
    interpreter.mend()
    backend._device = OnTheCpu()
    with compiling(80, 108) as device:
        test_steps_are_those_of_the_other_backends(Gpu("triton", "cpu", nullcontext, lambda: None))
        assert not device.log
