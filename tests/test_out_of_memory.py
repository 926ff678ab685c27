"""A step that finds no memory changes nothing, whichever tensor it is that finds none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="preloads a library that cc makes")
def test_every_tensor_of_a_step(tmp_path: Path) -> None:
    library = tmp_path / "failing_memory.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "failing_memory.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "failing_memory.py"), str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    tried = re.search(r"(\d+) tried, 0 wrong", done.stdout)
    assert done.returncode == 0 and tried is not None, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert int(tried[1]) > 100
