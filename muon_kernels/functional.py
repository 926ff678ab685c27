"""The step: sort parameters into buckets, choose for each, run.

`prepare` looks at everything and raises whatever there is to raise; `execute` then only computes. So a step either
happens or leaves parameters and state as they were.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import backends, options
from .coefficients import DEFAULT, NS_STEPS, Schedule, resolve
from .layout import (
    Bundle,
    Layout,
    Matrices,
    Piece,
    View,
    column_order,
    flattens,
    layout,
    overlapping,
    overlaps_itself,
    split_shape,
    view,
)
from .newton_schulz import ALGORITHMS, Square
from .plan import Bucket, plan_bucket
from .scaling import lr_ratio
from .split import pieces

Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

# Of parameters, gradients and momentum. torch computes nothing in the 8-bit ones.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Kind(NamedTuple):
    """What the matrices of a bucket have in common."""

    rows: int
    cols: int
    device: torch.device
    grad_dtype: torch.dtype
    momentum_dtype: torch.dtype
    param_dtype: torch.dtype


class Part(NamedTuple):
    """Matrices start..stop of one parameter, or of one piece of it."""

    piece: int
    start: int
    stop: int


class Chunk(NamedTuple):
    """The operands of one pass through the workspace."""

    params: Bundle
    momenta: Bundle
    grads: list[tuple[int, Layout]]
    ratios: array[float]  # one a matrix


class Work(NamedTuple):
    """A bucket with all that is settled before a step; `notes` is `Plan`'s."""

    bucket: Bucket
    notes: tuple[str, ...]
    schedule: Schedule
    device: torch.device
    chunks: list[Chunk]


class Prepared(NamedTuple):
    """What `prepare` decided for a group; good for every step in which `signature` and options are the same.

    Tensors, or pieces of them, that no strides describe as matrices are stepped in copies: `copies` has (that of a
    parameter or momentum, its copy), and `grad_copies` (index of a gradient, the piece of it, its copy); the copies
    count as further gradients. `rehearsed` has the kinds of steps for which backends are ready.
    """

    works: list[Work]
    copies: list[tuple[Tensor, Tensor]]
    grad_copies: list[tuple[int, View, Tensor]]
    rehearsed: set[tuple[int, ...]]


class Scalars(NamedTuple):
    """What may change from step to step; see `Muon`. A negative grad_scale ascends."""

    lr: float | Tensor
    weight_decay: float | Tensor
    momentum: float
    nesterov: bool
    dampened: bool
    eps: float
    grad_scale: float

    def of_momentum(self) -> dict[str, Any]:
        """What `momentum_update` takes."""
        names = ("momentum", "nesterov", "dampened", "grad_scale", "eps")
        return {name: getattr(self, name) for name in names}

    def of_update(self) -> dict[str, Any]:
        """What `apply_update` takes."""
        return {"lr": _scalar(self.lr), "weight_decay": _scalar(self.weight_decay)}


class Stacks(NamedTuple):
    """What a chunk of `batch` matrices needs beside parameters and state."""

    X: Tensor  # (batch, m, n)
    Y: Tensor
    squares: list[Square]
    scratch: Tensor  # (batch * scratch_bytes,) uint8
    derived: dict[str, Any]  # what is computed from them once


class Workspace:
    """Memory that steps share and keep, one block a device; it grows to the largest chunk and stays."""

    def __init__(self) -> None:
        self._blocks: dict[torch.device, Tensor] = {}
        self._stacks: dict[tuple[Bucket, int, torch.device], Stacks] = {}

    def reserve(self, device: torch.device, bytes_: int) -> None:
        """Have at least `bytes_` on `device`."""
        block = self._blocks.get(device)
        if block is None or block.numel() < bytes_:
            self._stacks.clear()
            self._blocks.pop(device, None)
            self._blocks[device] = torch.empty(bytes_, dtype=torch.uint8, device=device)

    def stacks(self, bucket: Bucket, batch: int, device: torch.device) -> Stacks:
        """Those of a chunk of `batch` matrices; the same tensors every time."""
        if (bucket, batch, device) not in self._stacks:
            with torch.inference_mode(False):  # what is kept must be of use outside inference mode too
                self._stacks[bucket, batch, device] = self._cut(bucket, batch, device)
        return self._stacks[bucket, batch, device]

    def _cut(self, bucket: Bucket, batch: int, device: torch.device) -> Stacks:
        m, n = bucket.shape
        ops = backends.get(bucket.backend)
        block = self._blocks[device]
        offset = 0

        def take(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
            nonlocal offset
            bytes_ = batch * rows * cols * dtype.itemsize
            offset, begin = offset + bytes_, offset
            return block[begin:offset].view(dtype).view(batch, rows, cols)

        def stack(cols: int) -> Tensor:
            return take(m, ops.leading_dimension(cols), bucket.workspace_dtype)[..., :cols]

        X, Y, *highs = stack(n), stack(n), *(stack(m) for _ in range(ALGORITHMS[bucket.algorithm].squares))
        # What needs alignment last, the doubles first: the leading dimensions of a backend that has them leave it.
        scratch = take(1, ops.scratch_bytes(m, n), torch.uint8).flatten()
        precise = ops.precise_squares()
        squares = [Square(high, take(1, m, torch.float32)[:, 0] if precise else None) for high in highs]
        return Stacks(X, Y, squares, scratch, {})


class _Source(NamedTuple):
    """A tensor that strides describe, or a piece of it, and how."""

    tensor: Tensor
    flatten: bool | None
    order: tuple[int, ...]
    piece: Piece | None

    def layout(self, part: Part) -> Layout:
        t, flatten, order, piece = self
        at = layout(t.shape, t.stride(), flatten, order, piece, part.start, part.stop)
        assert at is not None
        return at


def _source(
    t: Tensor, flatten: bool | None, order: tuple[int, ...], piece: Piece | None = None
) -> tuple[_Source, View | None]:
    """How to see `t` as matrices; where no strides do, an empty copy, and the view of `t` to fill it from.

    Strides do not tell of a negation that torch has put off, as in `z.conj().imag`.
    """
    if layout(t.shape, t.stride(), flatten, order, piece) is not None and not t.is_neg():
        return _Source(t, flatten, order, piece), None
    at = view(t.shape, t.stride(), flatten, order, piece)
    sizes = [math.prod(n for n, _ in dims) for dims in (at.batch, at.rows, at.cols)]
    return _Source(torch.empty(sizes, dtype=t.dtype, device=t.device), False, (), None), at


def _pieces(p: Tensor, flatten: bool | None, order: tuple[int, ...], split: str | None) -> tuple[Piece | None, ...]:
    """What to cut a parameter to; equal parts together, unless apart saves copies."""
    if split is None:
        return (None,)
    together, apart = (pieces(p.shape, flatten, split, apart) for apart in (False, True))

    def described(cut: Sequence[Piece | None]) -> bool:
        return all(layout(p.shape, p.stride(), flatten, order, piece) is not None for piece in cut)

    return apart if described(apart) and not described(together) else together


def _deal(counts: Sequence[tuple[int, int]], chunks: Sequence[int]) -> list[list[Part]]:
    """Cut (piece, number of its matrices) into chunks of the given sizes; a piece may be cut in two."""
    dealt: list[list[Part]] = []
    queue = [Part(index, 0, count) for index, count in counts]
    for room in chunks:
        chunk: list[Part] = []
        while room:
            index, start, stop = queue.pop(0) if queue[0].stop - queue[0].start <= room else queue[0]
            if stop - start > room:
                queue[0] = Part(index, start + room, stop)
                stop = start + room
            chunk.append(Part(index, start, stop))
            room -= stop - start
        dealt.append(chunk)
    return dealt


def has_memory(t: Tensor) -> bool:
    """Whether the elements can be reached by address: not those of torch's wrappers."""
    try:
        return t.data_ptr() != 0
    except RuntimeError:
        return False


def check_dense(name: str, t: Any) -> None:
    """Raise TypeError unless `t` is a tensor of a layout and a dtype that can be computed with."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} should be a Tensor but is: {type(t).__name__}")
    if t.layout != torch.strided:
        raise TypeError(f"{name} should be dense, not sparse, but has layout: {t.layout}")
    if t.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} should be of a floating-point dtype among {names} but is of: {t.dtype}")
    if t.numel() and t.device.type != "meta" and not has_memory(t):
        raise TypeError(
            f"{name} should be a tensor with memory of its own but is a {type(t).__name__} without, like DTensors and "
            "what torch.vmap and torch.func.grad pass; give matrices as (..., m, n), and of a DTensor its to_local()"
        )


def check_matrices(name: str, t: Any, hint: str = "") -> None:
    """Raise ValueError or TypeError unless `t` can be read as matrices."""
    check_dense(name, t)
    if t.ndim < 2:
        raise ValueError(f"{name} should have at least 2 dimensions but has size: {tuple(t.shape)}{hint}")


def check_like(name: str, t: Tensor, p: Tensor) -> None:
    """Raise ValueError unless `t` has the parameter's size."""
    if t.shape != p.shape:
        raise ValueError(f"{name} should have the parameter's size {tuple(p.shape)} but has: {tuple(t.shape)}")


def check_apart(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if two elements of the named tensors share memory: a step would write it twice."""
    for name, t in tensors:
        if overlaps_itself(t.shape, t.stride()):
            raise ValueError(
                f"{name} of size {tuple(t.shape)} should have memory for every element but its strides "
                f"{t.stride()} give several elements the same; clone it"
            )
    if (shared := overlapping(t for _, t in tensors)) is not None:
        name = next(name for name, t in tensors if t is shared)
        raise ValueError(
            f"{name} of size {tuple(shared.shape)} should have memory of its own but shares elements with another "
            f"parameter or momentum buffer; give only one of the two, or clone it"
        )


def _check_operands(p: Tensor, g: Tensor, buffer: Tensor) -> None:
    for name, t in (("gradient", g), ("momentum_buffer", buffer)):
        check_dense(name, t)
        check_like(name, t, p)
        if t.device != p.device:
            raise ValueError(f"{name} should be on the parameter's device {p.device} but is on: {t.device}")


def _scalar(x: float | Tensor) -> float | Tensor:
    return float(x) if options.on_host(x) else cast(Tensor, x).reshape(())


def signature(p: Tensor, g: Tensor, buffer: Tensor) -> tuple[object, ...]:
    """All that `prepare` looks at: where a parameter's tensors lie and what they are; not the gradient's address.

    The momentum buffer is the optimizer's own: it may be moved or replaced, but not seen otherwise.
    """
    return (
        p.data_ptr(),
        p.shape,
        p.stride(),
        p.dtype,
        id(buffer),
        buffer.data_ptr(),
        g.shape,
        (g.stride(), g.data_ptr() == 0) if g.layout == torch.strided else None,
        g.dtype,
        g.device,
        g.is_neg(),
    )


def prepare(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_bufs: Sequence[Tensor],
    *,
    ns_coefficients: Coefficients,
    ns_steps: int | None,
    adjust_lr_fn: str | Callable[[int, int], float] | None,
    flatten: bool | None = None,
    splits: Sequence[str | None] | None = None,
    ns_algorithm: str = "auto",
    backend: str = "auto",
    max_workspace_bytes: int | None = None,
    workspace_dtype: torch.dtype = torch.bfloat16,
) -> Prepared:
    """Everything that steps of one group have in common; nothing is written.

    Args:
        params: of any floating-point dtype and strides.
        grads: one a parameter; only looked at.
        momentum_bufs: one a parameter.
        splits: what each parameter is cut to, see `muon_kernels.split`; None leaves all whole.
        ns_coefficients, ns_steps, adjust_lr_fn, flatten, ns_algorithm, backend, max_workspace_bytes, workspace_dtype:
            see `Muon`.

    Raises:
        ValueError, TypeError: an operand or an option that cannot be used, with what was expected.
        RuntimeError: a named backend that cannot run here.
    """
    schedule = resolve(ns_coefficients, ns_steps)
    by_kind: dict[Kind, list[tuple[int, int]]] = {}
    ratios: list[float] = []
    cuts: list[tuple[int, tuple[int, ...], Piece | None]] = []
    for index, (p, g, buffer) in enumerate(zip(params, grads, momentum_bufs, strict=True)):
        _check_operands(p, g, buffer)
        order = column_order(p.shape, p.stride()) if flattens(p.shape, flatten) else ()
        for piece in _pieces(p, flatten, order, splits[index] if splits else None):
            count, rows, cols = split_shape(p.shape, flatten, piece)
            ratios.append(lr_ratio(adjust_lr_fn, rows, cols))
            kind = Kind(min(rows, cols), max(rows, cols), p.device, g.dtype, buffer.dtype, p.dtype)
            by_kind.setdefault(kind, []).append((len(cuts), count))
            cuts.append((index, order, piece))
    check_apart([("parameter", p) for p in params] + [("momentum_buffer", buffer) for buffer in momentum_bufs])

    prepared = Prepared([], [], [], set())
    sources: list[tuple[_Source, _Source, _Source, int]] = []
    for index, order, piece in cuts:
        p, g, buffer = params[index], grads[index], momentum_bufs[index]
        param, at_p = _source(p, flatten, order, piece)
        momentum, at_buffer = _source(buffer, flatten, order, piece)
        grad, at_g = _source(g, flatten, order, piece)
        for t, source, at in ((p, param, at_p), (buffer, momentum, at_buffer)):
            if at is not None:
                prepared.copies.append((at.of(t), source.tensor.view_as(at.of(t))))
        sources.append((param, momentum, grad, index if at_g is None else len(grads) + len(prepared.grad_copies)))
        if at_g is not None:
            prepared.grad_copies.append((index, at_g, grad.tensor.view_as(at_g.of(g))))

    for kind, counts in by_kind.items():
        dtypes = (kind.grad_dtype, kind.momentum_dtype, kind.param_dtype)
        name, notes = backends.choose(backend, kind.device, dtypes, workspace_dtype, (kind.rows, kind.cols))
        bucket = plan_bucket(
            (kind.rows, kind.cols),
            sum(count for _, count in counts),
            schedule,
            ns_algorithm=ns_algorithm,
            backend=name,
            max_workspace_bytes=max_workspace_bytes,
            workspace_dtype=workspace_dtype,
            bytes_per_element=kind.grad_dtype.itemsize + 2 * (kind.momentum_dtype.itemsize + kind.param_dtype.itemsize),
            direction_bytes=kind.grad_dtype.itemsize + kind.momentum_dtype.itemsize,
        )
        chunks = []
        for parts in _deal(counts, bucket.chunks):
            chunk = Chunk(Bundle(), Bundle(), [], array("d"))
            for part in parts:
                param, momentum, grad, read = sources[part.piece]
                chunk.params.append(Matrices(param.tensor, param.layout(part)))
                chunk.momenta.append(Matrices(momentum.tensor, momentum.layout(part)))
                chunk.grads.append((read, grad.layout(part)))
                chunk.ratios.extend([ratios[part.piece]] * (part.stop - part.start))
            chunks.append(chunk)
        prepared.works.append(Work(bucket, notes, schedule, kind.device, chunks))
    return prepared


def _iterate(
    work: Work, grads: Sequence[Matrices], momenta: Sequence[Matrices] | None, workspace: Workspace, scalars: Scalars
) -> Tensor:
    """Prologue and iteration of a chunk; the result lies in the workspace."""
    ops, schedule = backends.get(work.bucket.backend), work.schedule
    X, Y, squares, scratch, derived = workspace.stacks(work.bucket, sum(g.layout.batch for g in grads), work.device)
    scale = ops.momentum_update(grads, momenta, X, **scalars.of_momentum(), margin=schedule.margin, scratch=scratch)
    key = schedule, scale is not None and scale.data_ptr()
    if derived.get("key") != key:
        run = ALGORITHMS[work.bucket.algorithm].run
        program = ops.program(lambda: run(ops, X, Y, squares, scale, schedule.triples, schedule.margin))
        derived.update(key=key, program=program)
    return cast(Tensor, derived["program"]())


def _fused_step(work: Work, chunk: Chunk, grads: Sequence[Matrices], workspace: Workspace, scalars: Scalars) -> None:
    ops, schedule = backends.get(work.bucket.backend), work.schedule
    X, Y, squares, _, _ = workspace.stacks(work.bucket, work.bucket.slots, work.device)

    def iterate(scale: Tensor) -> Tensor:
        return ALGORITHMS[work.bucket.algorithm].run(ops, X, Y, squares, scale, schedule.triples, schedule.margin)

    ops.fused_step(
        chunk.params,
        grads,
        chunk.momenta,
        X,
        iterate,
        triples=schedule.triples,
        **scalars.of_momentum(),
        margin=schedule.margin,
        **scalars.of_update(),
        ratios=chunk.ratios,
    )


def _step(work: Work, grads: Sequence[Tensor], workspace: Workspace, scalars: Scalars) -> None:
    ops = backends.get(work.bucket.backend)
    for chunk in work.chunks:
        directions = [Matrices(grads[index], at) for index, at in chunk.grads]
        if work.bucket.fused:
            _fused_step(work, chunk, directions, workspace, scalars)
        else:
            result = _iterate(work, directions, chunk.momenta, workspace, scalars)
            ops.apply_update(chunk.params, result, **scalars.of_update(), ratios=chunk.ratios)


def execute(prepared: Prepared, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
    """Do a step: parameters and momentum buffers are written, gradients are not.

    Args:
        prepared: from `prepare`, for the same tensors.
        grads: one a parameter.
        scalars: of this step.
        workspace: in which `ready` has made room.
    """
    grads = [*grads, *(copy.copy_(at.of(grads[index])) for index, at, copy in prepared.grad_copies)]
    for target, copy in prepared.copies:
        copy.copy_(target)
    for work in prepared.works:
        _step(work, grads, workspace, scalars)
    for target, copy in prepared.copies:
        target.copy_(copy)


def ready(prepared: Prepared, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
    """Allocate what `execute` needs and have backends get ready what they will run; the last thing that may raise."""
    for work in prepared.works:
        workspace.reserve(work.device, work.bucket.workspace_bytes)
    seen = [*grads, *(copy for _, _, copy in prepared.grad_copies)]
    # What `signature` does not have, and a kernel may be another for.
    on_host = options.on_host(scalars.lr), options.on_host(scalars.weight_decay)
    kind = scalars.nesterov, scalars.dampened, *on_host, *(i for i, g in enumerate(seen) if g.data_ptr() % 16)
    if kind in prepared.rehearsed:
        return
    for work in prepared.works:
        if (rehearsal := backends.get(work.bucket.backend).rehearsal()) is not None:
            with rehearsal:
                _step(work, seen, workspace, scalars)
    prepared.rehearsed.add(kind)


def orthogonalize(
    G: Tensor,
    ns_coefficients: Coefficients = DEFAULT,
    ns_steps: int | None = NS_STEPS,
    eps: float = 1e-7,
    *,
    ns_algorithm: str = "auto",
    backend: str = "auto",
    max_workspace_bytes: int | None = None,
    workspace_dtype: torch.dtype = torch.bfloat16,
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
        workspace_dtype: torch.bfloat16 or torch.float16, see `Muon`.

    Returns:
        A new tensor of G's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that cannot be used.
        RuntimeError: a named backend that cannot run here.
    """
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
    check_matrices("G", G)
    options.check_eps(eps)
    if not coefficients or len(coefficients) % 3 or not 0 < margin < math.inf:
        raise ValueError(f"expected a, b, c of every step and a margin > 0 but got {list(coefficients)} and {margin}")
    a, b, c = (coefficients[i::3] for i in range(3))
    schedule = Schedule(tuple(zip(a, b, c, strict=True)), margin, "custom")
    count, rows, cols = split_shape(G.shape, False)
    shape = min(rows, cols), max(rows, cols)
    name, _ = backends.choose(backend, G.device, [G.dtype], workspace_dtype, shape)
    bucket = plan_bucket(
        shape,
        count,
        schedule,
        ns_algorithm=ns_algorithm,
        backend=name,
        max_workspace_bytes=max_workspace_bytes,
        bytes_per_element=2 * G.itemsize,
        workspace_dtype=workspace_dtype,
        stepped=False,
    )
    if G.numel() == 0:
        return torch.empty(G.shape, dtype=G.dtype, device=G.device)
    source, at_G = _source(G, False, ())
    if at_G is not None:
        source.tensor.view_as(at_G.of(G)).copy_(at_G.of(G))
    work = Work(bucket, (), schedule, G.device, [])
    workspace = Workspace()
    workspace.reserve(G.device, bucket.workspace_bytes)
    scalars = Scalars(0.0, 0.0, 0.0, False, True, eps, 1.0)
    out = torch.empty(count, rows, cols, dtype=G.dtype, device=G.device)
    for (part,) in _deal([(0, count)], bucket.chunks):
        at = source.layout(part)
        result = _iterate(work, [Matrices(source.tensor, at)], None, workspace, scalars)
        out[part.start : part.stop].copy_(result.mT if at.transposed else result)
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
