"""Facts about the machine for the plugin's reports."""

from __future__ import annotations

import pytest
import torch


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
