"""Triton's interpreter, with the faults mended that tests of bf16 kernels would meet.

It multiplies the bits of bf16 numbers, cuts off what bf16 has no room for, and rounds an fma twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Once a process, if Triton was imported with TRITON_INTERPRET=1."""
    convert = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            tensor = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
            return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, rounding)

    def values(x: Any) -> Any:
        return converted(x.data, tl.bfloat16, tl.float32, None).view(np.float32) if x.dtype == tl.bfloat16 else x.data

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        a, b = (interpreter.TensorHandle(values(t), tl.float32) for t in (a, b))
        return interpreter.TensorHandle(np.matmul(a.data, b.data, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        exact = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(c.data.dtype), c.dtype.scalar)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = dot  # type: ignore[method-assign]
    interpreter.InterpreterBuilder.create_fma = fma  # type: ignore[method-assign]
