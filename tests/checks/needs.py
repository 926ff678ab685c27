"""What a test cannot do without."""

import pytest

from muon_kernels.backends import cpu

cpu_kernels = pytest.mark.skipif(not cpu.instruction_sets(), reason="there are no kernels for this processor")
