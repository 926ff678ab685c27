"""State of a training, and whether two of them are the same to the bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def snapshot(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> tuple[list[Tensor], dict[str, Any]]:
    """Copy the parameters and the optimizer's state."""
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    """Compare nested containers whose tensors have to be equal in dtype and bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
