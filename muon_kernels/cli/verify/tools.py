"""Stages 10 and 11: NVIDIA's tools, where they are installed, on the kernels of `exercise`."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from .stage import Context, Result, Skipped

CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck")
_ERRORS = 9  # the status that compute-sanitizer is told to end with
_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
_KERNELS = "regex:product|momentum|apply|fused|norm"
_PERMISSION = "ERR_NVGPUCTRPERM"


def found(tool: str) -> str:
    """Return the path of a tool; raise `Skipped` if it is not there."""
    folders = [os.environ.get("PATH", ""), *(os.path.join(h, "bin") for h in [os.environ.get("CUDA_HOME")] if h)]
    path = shutil.which(tool, path=os.pathsep.join(folders))
    if path is None:
        raise Skipped(f"{tool} is neither on PATH nor in CUDA_HOME; it comes with the CUDA toolkit")
    return path


def _exercise(context: Context) -> list[str]:
    names = [name for name in context.place.backends if name != "eager"]
    return [sys.executable, "-m", "muon_kernels.cli.verify.exercise", *names]


def _limit(context: Context, parts: int = 1) -> float:
    """Return the seconds of one of so many parts; even without an end there is one."""
    return min(max(1.0, context.left() / parts), 3600.0)


def _run(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Run a command; return its status, None if it took longer than `limit` seconds, and what it printed."""
    # Memory that torch keeps for later looks like its own to a tool: an access out of bounds would go unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def sanitize(context: Context) -> Result:
    """Run compute-sanitizer's four checks, each in a process of its own, with a limit of its own."""
    tool = found("compute-sanitizer")
    data: dict[str, Any] = {}
    wrong = []
    for i, check in enumerate(CHECKS):
        limit = _limit(context, len(CHECKS) - i)
        command = [tool, "--tool", check, "--error-exitcode", str(_ERRORS), *_exercise(context)]
        status, output = _run(command, limit)
        if status is None:
            data[check] = f"no result after {limit:.0f} s"
        elif status == 0:
            data[check] = "no errors"
        else:
            data[check] = output[-4000:]
            wrong.append(f"{check}: {_first_error(output) or f'status {status}'}")
    summary = ", ".join(f"{check} {said if len(said) < 40 else 'errors'}" for check, said in data.items())
    return Result(summary, data, tuple(wrong))


def _first_error(output: str) -> str:
    """Return the first line of what compute-sanitizer, or Python, reports."""
    lines = [line.lstrip("= ").strip() for line in output.splitlines()]
    reports = [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")]
    errors = [line for line in reports if "Error" in line or "Invalid" in line or "hazard" in line]
    return (errors or reports or [""])[0]


def profile(context: Context) -> Result:
    """Let ncu count what kernels do: tensor cores, memory, bank conflicts, stalls."""
    tool = found("ncu")
    sections = [word for section in _SECTIONS for word in ("--section", section)]
    command = [tool, "--clock-control", "none", "--csv", "--page", "details", *sections]
    command += ["--kernel-name", _KERNELS, "--launch-count", "8", *_exercise(context)]
    status, output = _run(command, _limit(context))
    if _PERMISSION in output:
        raise Skipped(f"the driver lets only root read counters ({_PERMISSION}); see NVIDIA's page of that name")
    if status is None:
        raise Skipped("ncu gave no result in time; give more --minutes")
    kernels = counted(output)
    if status or not kernels:
        raise RuntimeError(f"ncu ended with status {status}: {output[-1000:]}")
    return Result(f"{len(kernels)} kernels", {"kernels": kernels})


def counted(output: str) -> dict[str, dict[str, str]]:
    """Return metrics by kernel from what ncu prints: a table in CSV among lines of other kinds."""
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines[begin:] if line.startswith('"')):
        if row.get("Metric Name"):
            metrics = kernels.setdefault(f"{row['ID']}: {row['Kernel Name']}", {})
            metrics[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return kernels
