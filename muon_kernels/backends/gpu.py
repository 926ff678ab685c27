"""Facts that the backends for GPUs have in common."""

from __future__ import annotations

# Facts, see `Backend`.
symmetric_products = True
precise_squares = True
default_workspace_bytes = 1 << 30


def leading_dimension(cols: int) -> int:
    """Let rows begin at 16 bytes, which is what a thread copies at a time and what descriptors ask for."""
    return -(-cols // 8) * 8
