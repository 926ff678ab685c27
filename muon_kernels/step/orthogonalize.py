"""`orthogonalize` and `spectral_power`: the iteration alone, as functions and as custom operations of torch.

`prepare` looks at everything and raises whatever there is to raise; `execute` then only computes. So a step either
happens or leaves parameters and state as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, options
from ..coefficients import DEFAULT, NS_STEPS, Schedule, resolve
from ..layout import Matrices, split_shape
from ..powers import EXACT, check_power, schedule_of
from ..tensors import check_matrices
from .bucket import into_chunks
from .operands import source_of
from .options import Coefficients, StepOptions
from .plan import plan_bucket
from .run import iterate
from .work import Scalars, Work
from .workspace import Workspace


def orthogonalize(
    G: Tensor,
    ns_coefficients: Coefficients = DEFAULT,
    ns_steps: int | None = NS_STEPS,
    eps: float = 1e-7,
    *,
    ns_algorithm: str = "auto",
    backend: str = "auto",
    max_workspace_bytes: int | None = None,
    workspace_dtype: torch.dtype | str = torch.bfloat16,
) -> Tensor:
    """Approximate the orthogonal polar factor U Vᵀ of every matrix G = U Σ Vᵀ by Newton-Schulz.

    Precisely: U p(Σ / (margin ‖G‖_F)) Vᵀ with p the composition of the steps' polynomials, in products of
    `workspace_dtype` with fp32 accumulation. Invariant to the scale of G, from 1e-30 to 1e30; a zero matrix gives zero;
    NaN or infinity spoils its own matrix only.
    Not differentiated: the result is detached, whether or not G requires a gradient. Inside `torch.compile` it is one
    operation, torch.ops.muon_kernels.orthogonalize.

    Args:
        G: (..., m, n), any m, n and strides, of dtype float32, bfloat16, float16 or float64. Leading dimensions count
            matrices, also where `Muon` would flatten; they are what to use in place of `torch.vmap`. Only read.
        ns_coefficients: a name of `muon_kernels.COEFFICIENTS`, one (a, b, c), or a list with one a step.
        ns_steps: number of steps; if not given, 5 or a named set's own number.
        eps: in [0, 1), see `Muon`.
        ns_algorithm: "standard", "gram", or "auto" for the one with fewer FLOPs.
        backend: a name of `muon_kernels.backends.BACKENDS`, or "auto".
        max_workspace_bytes: cap on the workspace, an int; None for the backend's default.
        workspace_dtype: torch.bfloat16 or torch.float16, or a name of these, see `Muon`.

    Returns:
        A new tensor of G's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that cannot be used.
        RuntimeError: a named backend that cannot run here.
    """
    ns_coefficients, ns_steps, eps, max_workspace_bytes = map(
        options.plain, (ns_coefficients, ns_steps, eps, max_workspace_bytes)
    )
    options.check_workspace_dtype(workspace_dtype)
    workspace_dtype = options.dtype_of(workspace_dtype)
    schedule = resolve(ns_coefficients, ns_steps)
    coefficients = [c for triple in schedule.triples for c in triple]
    rest = (coefficients, schedule.margin, eps, ns_algorithm, backend, max_workspace_bytes, workspace_dtype)
    return _operation(G.detach(), *rest) if torch.compiler.is_compiling() else _orthogonalize(G, *rest)


@torch.no_grad()
def _orthogonalize(
    G: Tensor,
    coefficients: Sequence[float],
    margin: float,
    eps: float,
    ns_algorithm: str,
    backend: str,
    max_workspace_bytes: int | None,
    workspace_dtype: torch.dtype,
) -> Tensor:
    if not coefficients or len(coefficients) % 3 or not 0 < margin < math.inf:
        raise ValueError(f"expected a, b, c of every step and a margin > 0 but got {list(coefficients)} and {margin}")
    a, b, c = (coefficients[i::3] for i in range(3))
    schedule = Schedule(tuple(zip(a, b, c, strict=True)), margin, "custom")
    return _iterated(G, schedule, eps, ns_algorithm, backend, max_workspace_bytes, workspace_dtype)


def _iterated(
    G: Tensor,
    schedule: Schedule,
    eps: float,
    ns_algorithm: str,
    backend: str,
    max_workspace_bytes: int | None,
    workspace_dtype: torch.dtype,
) -> Tensor:
    """Apply a schedule to G, without momentum."""
    check_matrices("G", G)
    options.check_eps(eps)
    count, rows, cols = split_shape(G.shape, False)
    shape = min(rows, cols), max(rows, cols)
    name, _ = backends.choose(backend, G.device, [G.dtype], workspace_dtype, shape)
    told = StepOptions(
        schedule,
        ns_algorithm=ns_algorithm,
        max_workspace_bytes=max_workspace_bytes,
        workspace_dtype=workspace_dtype,
    )
    bucket = plan_bucket(shape, count, told, name, bytes_per_element=2 * G.itemsize, stepped=False)
    if G.numel() == 0:
        return torch.empty(G.shape, dtype=G.dtype, device=G.device)
    source, at_G = source_of(G, False, ())
    if at_G is not None:
        source.tensor.view_as(at_G.of(G)).copy_(at_G.of(G))
    work = Work(bucket, (), schedule, G.device, [])
    workspace = Workspace()
    workspace.reserve(G.device, bucket.workspace_bytes)
    scalars = Scalars(0.0, 0.0, 0.0, False, True, eps, 1.0)
    out = torch.empty(count, rows, cols, dtype=G.dtype, device=G.device)
    for (span,) in into_chunks([count], bucket.chunks):
        at = source.layout(span)
        result = iterate(work, [Matrices(source.tensor, at)], None, workspace, scalars)
        out[span.start : span.stop].copy_(result.mT if at.transposed else result)
    return out.reshape(G.shape)


_operation = torch.library.custom_op(
    "muon_kernels::orthogonalize",
    _orthogonalize,
    mutates_args=(),
    schema="(Tensor G, float[] coefficients, float margin, float eps, str ns_algorithm, str backend, "
    "int? max_workspace_bytes, ScalarType workspace_dtype) -> Tensor",
)


@_operation.register_fake
def _(G: Tensor, *_: object) -> Tensor:
    return torch.empty(G.shape, dtype=G.dtype, device=G.device)


def spectral_power(
    G: Tensor,
    p: float,
    *,
    exact: str | None = None,
    ns_algorithm: str = "auto",
    backend: str = "auto",
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """Approximate U Σ^p Vᵀ of every matrix G = U Σ Vᵀ, at up to 1.6 times the price of `orthogonalize`; see powers.py.

    Within 4.2 % of σ^p (2 % rms) for p ≥ 1/8 and singular values down to 1e-3 of the largest, in bf16 products with
    fp32 accumulation, whose rounding adds to that. Smaller ones fall below σ^p in proportion to σ. The power of c·G is
    c^p times that of G, from 1e-30 to 1e30; a zero matrix gives zero; NaN or infinity spoils its own matrix only.
    Not differentiated: the result is detached. Inside `torch.compile` it is one operation,
    torch.ops.muon_kernels.spectral_power.

    Args:
        G: (..., m, n), any m, n and strides, of dtype float32, bfloat16, float16 or float64; only read.
        p: from 0, which is `orthogonalize` with its defaults, to 1, which is a copy.
        exact: None; or "svd"; or "coupled", the iteration of arXiv 2602.04669, for p = 1/2 and 1/4 alone. References,
            slow, in float64 if that is G's dtype, else in float32.
        ns_algorithm, backend, max_workspace_bytes: see `orthogonalize`.

    Returns:
        A new tensor of G's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that cannot be used.
        RuntimeError: a named backend that cannot run here.
    """
    rest = check_power(options.plain(p), "p"), exact, ns_algorithm, backend, options.plain(max_workspace_bytes)
    return _power_operation(G.detach(), *rest) if torch.compiler.is_compiling() else _spectral_power(G, *rest)


@torch.no_grad()
def _spectral_power(
    G: Tensor, p: float, exact: str | None, ns_algorithm: str, backend: str, max_workspace_bytes: int | None
) -> Tensor:
    check_matrices("G", G)
    options.check_algorithm(ns_algorithm)
    options.check_workspace(max_workspace_bytes)
    if exact is not None:
        if exact not in EXACT:
            raise ValueError(f"exact should be None or one of {', '.join(map(repr, EXACT))} but is: {exact!r}")
        return EXACT[exact](G.to(torch.promote_types(G.dtype, torch.float32)), p).to(G.dtype)
    if p == 1:
        return G.clone(memory_format=torch.contiguous_format)
    schedule = schedule_of(p) if p else resolve(DEFAULT, None)
    return _iterated(G, schedule, 0.0, ns_algorithm, backend, max_workspace_bytes, torch.bfloat16)


_power_operation = torch.library.custom_op(
    "muon_kernels::spectral_power",
    _spectral_power,
    mutates_args=(),
    schema="(Tensor G, float p, str? exact, str ns_algorithm, str backend, int? max_workspace_bytes) -> Tensor",
)


@_power_operation.register_fake
def _(G: Tensor, *_: object) -> Tensor:
    return torch.empty(G.shape, dtype=G.dtype, device=G.device)
