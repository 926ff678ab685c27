"""Checkpoints with anything in them: a load and the step after it happen, or raise and change nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

GARBLING = Path(__file__).with_name("garbling.py")
CASES = 70


def test_garbled_checkpoints() -> None:
    """In a process of its own, which a step that reads where nothing is would end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(GARBLING), "0", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    tried = re.findall(rf": {CASES} tried, 0 wrong", done.stdout)
    assert (done.returncode, len(tried)) == (0, 5), f"{done.stdout}\n{done.stderr[-2000:]}"
