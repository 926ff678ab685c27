"""CUDA graphs."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether what is launched on `device` is captured in a graph, whichever device is the current one.

    AMD's devices are called cuda, too; of others, torch knows no graphs.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
