"""Streams, and capture in CUDA graphs."""

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


def stream(device: torch.device) -> torch.Stream | None:
    """Return the current stream of `device`; None where torch knows no streams."""
    if device.type not in ("cuda", "xpu"):
        return None
    current: torch.Stream = getattr(torch, device.type).current_stream(device)
    return current
