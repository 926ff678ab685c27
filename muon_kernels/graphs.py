"""Detection of CUDA graph capture."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether launches on `device` are being captured in a graph, whichever device is the current one.

    AMD's devices are called cuda, too; on other devices torch knows no graphs.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
