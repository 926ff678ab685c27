"""Facts that the backends for GPUs have in common."""

from __future__ import annotations


def symmetric_products() -> bool:
    """Implement `Backend.symmetric_products`."""
    return True


def precise_squares() -> bool:
    """Implement `Products.precise_squares`."""
    return True


def default_workspace_bytes() -> int:
    """Return 1 GiB."""
    return 1 << 30


def leading_dimension(cols: int) -> int:
    """Let rows begin at 16 bytes, which is what a thread copies at a time and what descriptors ask for."""
    return -(-cols // 8) * 8
