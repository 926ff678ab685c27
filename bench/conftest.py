"""The workloads as a fixture, and facts about the machine for the plugin's reports."""

from __future__ import annotations

import pytest
import torch
from shapes import WORKLOADS


@pytest.fixture(params=WORKLOADS)
def workload(request: pytest.FixtureRequest) -> str:
    """Return the name of a workload."""
    return str(request.param)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
