"""The step: sort parameters into buckets, choose for each, run.

`prepare` looks at everything and raises whatever there is to raise; `execute` then only computes. So a step either
happens or leaves parameters and state as they were.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import accumulate, repeat
from operator import attrgetter, eq, mul
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import backends, interrupts, memory, options
from .coefficients import DEFAULT, NS_STEPS, Schedule, resolve
from .distributed import blocks, exchange
from .distributed.placement import Placement, check_whole, local
from .distributed.strategies import STRATEGIES
from .graphs import capturing
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
from .newton_schulz import ALGORITHMS, Blend, Square, squares_of
from .packed import Halves, Packed, Quantized, floats, scale_size, scales_of, unpacked
from .plan import Bucket, Plan, plain_bucket, plan_bucket
from .scaling import lr_ratio, rule_of
from .second_moment import normalize, piece_of_rows, scratch_numbers, shape_of, take_signs
from .spectral import EXACT, check_power, schedule_of
from .split import by_name, check_split, close, matching, pieces

Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

# Of parameters, gradients and momentum. torch computes nothing in the 8-bit ones.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What momentum may be kept in.
MOMENTUM_DTYPES = (*DTYPES, torch.int8)


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

    params: Bundle | Packed
    momenta: Bundle | Packed | None
    grads: list[tuple[int, Layout]]
    ratios: array[float]  # one a matrix
    second_moments: list[Tensor]  # none, or as `normalize` takes them
    first: int  # matrices of the bucket in earlier chunks


class Plain(NamedTuple):
    """A parameter, or a piece of one, whose direction is its update."""

    gradient: int
    at: View | None  # of the gradient, if it is a piece
    param: Tensor
    momentum: Tensor
    ratio: float


class Work(NamedTuple):
    """A bucket with all that is settled before a step; `notes` is `Plan`'s.

    `number` is that of its first matrix among all of the group, which are counted as the parameters come. `between` is
    how many numbers of fp32 a matrix needs for what stands before and after the iteration.
    """

    bucket: Bucket
    notes: tuple[str, ...]
    schedule: Schedule
    device: torch.device
    chunks: list[Chunk]
    second_moment: str | None = None
    number: int = 0
    signs: bool = False
    between: int = 0


class Prepared(NamedTuple):
    """What `prepare` decided for a group; good for every step in which `signature` and options are the same.

    `plain` has what goes through no iteration. Tensors, or pieces of them, that no strides describe as matrices are
    stepped in copies: `copies` has (that of a parameter or momentum, its copy), and `grad_copies` (index of a gradient,
    the piece of it, its copy); the copies count as further gradients. `rehearsed` has the kinds of steps for which
    backends and memory are ready; `exchanges` what other ranks have a part in, `works` what they have not.
    """

    works: list[Work]
    plain: list[Plain]
    copies: list[tuple[Tensor, Tensor]]
    grad_copies: list[tuple[int, View, Tensor]]
    rehearsed: WeakKeyDictionary[memory.Mark, set[tuple[object, ...]]]
    exchanges: list[exchange.Exchange]


class Scalars(NamedTuple):
    """What may change from step to step; see `Muon`. A negative grad_scale ascends.

    `seed` is None without stochastic rounding; the matrices of a group take those from it on, as `Work` numbers them.
    """

    lr: float | Tensor
    weight_decay: float | Tensor
    momentum: float
    nesterov: bool
    dampened: bool
    eps: float
    grad_scale: float
    cautious: bool = False
    beta2: float = 0.0
    seed: int | None = None

    def of_momentum(self) -> dict[str, Any]:
        """What `momentum_update` takes."""
        names = ("momentum", "nesterov", "dampened", "grad_scale", "eps")
        return {name: getattr(self, name) for name in names}

    def of_update(self, number: int, first: int) -> dict[str, Any]:
        """What `apply_update` takes for a chunk, from its place in its bucket, and the bucket's."""
        update = {"lr": as_scalar(self.lr), "weight_decay": as_scalar(self.weight_decay), "cautious": self.cautious}
        if self.seed is not None:
            update |= {"stochastic_rounding": True, "seed": self.seed + number, "first": first}
        return update


class Stacks(NamedTuple):
    """What a chunk of `batch` matrices needs beside parameters and state."""

    X: Tensor  # (batch, m, n)
    Y: Tensor
    squares: list[Square]
    blend: Blend | None  # where iterates have weights
    scratch: Tensor  # (batch * scratch_bytes,) uint8
    between: Tensor  # (batch * between,) fp32, see `Work`
    unpacked: Tensor | None  # (batch, floats) fp32, of momentum or parameters that are kept packed
    derived: dict[str, Any]  # what is computed from them once


class Workspace:
    """Memory that steps share and keep, one block a device; it grows to the largest chunk and stays."""

    def __init__(self) -> None:
        self._blocks: dict[torch.device, Tensor] = {}
        self._stacks: dict[tuple[Bucket, Schedule, int, torch.device, int], Stacks] = {}

    def reserve(self, device: torch.device, bytes_: int) -> None:
        """Have at least `bytes_` on `device`."""
        block = self._blocks.get(device)
        if block is None or block.numel() < bytes_:
            self._stacks.clear()
            self._blocks.pop(device, None)
            self._blocks[device] = torch.empty(bytes_, dtype=torch.uint8, device=device)

    def addresses(self) -> list[int]:
        """Where the blocks are."""
        return [block.data_ptr() for block in self._blocks.values()]

    def stacks(self, work: Work, batch: int) -> Stacks:
        """Those of a chunk of `batch` matrices; the same tensors every time."""
        key = work.bucket, work.schedule, batch, work.device, work.between
        if key not in self._stacks:
            with torch.inference_mode(False):  # what is kept must be of use outside inference mode too
                self._stacks[key] = self._cut(*key)
        return self._stacks[key]

    def _cut(self, bucket: Bucket, schedule: Schedule, batch: int, device: torch.device, between: int) -> Stacks:
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

        numbers_between = take(1, between, torch.float32).flatten()
        memory = take(1, floats(m, n), torch.float32)[:, 0] if bucket.packed else None
        X, Y, *total = (stack(n) for _ in range(3 if schedule.weights else 2))
        highs = [stack(m) for _ in range(squares_of(bucket.algorithm, schedule))]
        # What needs alignment last, the doubles first: the leading dimensions of a backend that has them leave it.
        scratch = take(1, ops.scratch_bytes(m, n), torch.uint8).flatten()
        precise = ops.precise_squares()
        squares = [Square(high, take(1, m, torch.float32)[:, 0] if precise else None) for high in highs]
        offset += -offset % 8  # stacks of a backend whose leading dimensions are odd
        numbers = (take(1, 1, dtype)[:, 0, 0] for dtype in (torch.float64, *[torch.float32] * 4))
        blend = Blend(*total, *numbers) if total else None
        return Stacks(X, Y, squares, blend, scratch, numbers_between, memory, {})


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

    def untransposed(self, part: Part) -> Tensor:
        """(matrices, rows, cols) as the parameter has them, sharing its memory."""
        at = self.layout(part)
        seen = Matrices(self.tensor, at).view()
        return seen.mT if at.transposed else seen


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


def _seen(
    t: Tensor, flatten: bool | None, order: tuple[int, ...], piece: Piece | None, copies: list[tuple[Tensor, Tensor]]
) -> _Source:
    """`_source` of what a step writes; a copy goes to the list of those to fill before it and to read after it."""
    source, at = _source(t, flatten, order, piece)
    if at is not None:
        copies.append((at.of(t), source.tensor.view_as(at.of(t))))
    return source


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


def check_dense(name: str, t: Any, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Raise TypeError unless `t` is a tensor of a layout and a dtype that can be computed with."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} should be a Tensor but is: {type(t).__name__}")
    if t.layout != torch.strided:
        raise TypeError(f"{name} should be dense, not sparse, but has layout: {t.layout}")
    if t.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        kind = "a floating-point dtype among " if dtypes == DTYPES else "a dtype among " if len(dtypes) > 1 else ""
        raise TypeError(f"{name} should be of {kind}{names} but is of: {t.dtype}")
    if type(t).__name__ == "FakeTensor":
        raise TypeError(
            f"{name} should have memory but is a FakeTensor; to see what state an optimizer makes, build the model "
            'under torch.device("meta"), where steps make it; plan() tells of what else they need'
        )
    if t.numel() and t.device.type != "meta" and not has_memory(t):
        raise TypeError(
            f"{name} should be a tensor with memory of its own but is a {type(t).__name__} without, like DTensors and "
            "what torch.vmap and torch.func.grad pass; give matrices as (..., m, n), and of a DTensor its to_local()"
        )


def check_matrices(name: str, t: Any, hint: str = "") -> None:
    """Raise ValueError or TypeError unless `t` can be read as matrices."""
    check_dense(name, t)
    check_whole(name, t)
    if t.ndim < 2:
        raise ValueError(f"{name} should have at least 2 dimensions but has size: {tuple(t.shape)}{hint}")


def check_like(name: str, t: Tensor, p: Tensor) -> None:
    """Raise ValueError unless `t` has the parameter's size."""
    if t.shape != p.shape:
        raise ValueError(f"{name} should have the parameter's size {tuple(p.shape)} but has: {tuple(t.shape)}")


def check_apart(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if two elements of the named tensors share memory: a step would write it twice."""
    tensors = [(name, local(t)) for name, t in tensors]
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


def check_second_moment(name: str, V: Any, form: str, p: Tensor, flatten: bool | None, split: str | None) -> None:
    """Raise ValueError or TypeError unless V can be the second moment of `p`."""
    check_dense(name, local(V))
    expected = shape_of(form, p.shape, flatten, split)
    if V.shape != expected or V.dtype != torch.float32:
        raise ValueError(
            f"{name} should be of size {expected} and float32 for second_moment={form!r} but is of size "
            f"{tuple(V.shape)} and {str(V.dtype).removeprefix('torch.')}; delete it from the state to start anew"
        )


def check_rounding(p: Tensor) -> None:
    """Raise TypeError unless a parameter is of the dtype that is rounded stochastically."""
    if p.dtype != torch.bfloat16:
        raise TypeError(
            f"stochastic_rounding is of torch.bfloat16 parameters but one is of: {p.dtype}; "
            "put it into a group with stochastic_rounding=False"
        )


def check_momentum_scale(name: str, scale: Any, p: Tensor, flatten: bool | None, split: str | None) -> None:
    """Raise ValueError or TypeError unless it can be the absmax of an int8 momentum of `p`."""
    if scale is None:
        raise ValueError(
            f"{name} should be in the state beside a momentum_buffer of int8 but is not; delete that from the state to "
            "start anew"
        )
    check_dense(name, scale)
    expected = (scale_size(p.shape, flatten, split),)
    if scale.shape != expected or scale.dtype != torch.float32:
        raise ValueError(
            f"{name} should be of size {expected}, one for every block of each matrix, and float32 but is of size "
            f"{tuple(scale.shape)} and {str(scale.dtype).removeprefix('torch.')}; were flatten or split others then? "
            "delete momentum_buffer from the state to start anew"
        )


def check_master(p: Tensor) -> None:
    """Raise TypeError unless a parameter is of the dtype that can be the upper half of an fp32 one."""
    if p.dtype != torch.bfloat16:
        raise TypeError(
            f"master_weights is of torch.bfloat16 parameters but one is of: {p.dtype}; "
            "put it into a group with master_weights=False"
        )


def check_mantissa(name: str, mantissa: Any, p: Tensor) -> None:
    """Raise ValueError or TypeError unless it can be the lower half of fp32 numbers whose upper one is `p`."""
    check_dense(name, mantissa, (torch.int16,))
    check_like(name, mantissa, p)


def _check_operands(p: Tensor, g: Tensor, buffer: Tensor | None) -> None:
    check_dense("gradient", g)
    check_like("gradient", g, p)
    check_device("gradient", g, p)
    if buffer is not None:
        check_momentum(buffer, p)


def check_momentum(buffer: Tensor, p: Tensor) -> None:
    """Raise ValueError or TypeError unless it can be a momentum of `p`."""
    check_dense("momentum_buffer", buffer, MOMENTUM_DTYPES)
    check_like("momentum_buffer", buffer, p)
    check_device("momentum_buffer", buffer, p)


def check_device(name: str, t: Tensor, p: Tensor) -> None:
    """Raise ValueError unless `t` is where the parameter is."""
    if t.device != p.device:
        raise ValueError(f"{name} should be on the parameter's device {p.device} but is on: {t.device}")


def as_scalar(x: float | Tensor) -> float | Tensor:
    """A float, or a tensor without dimensions if only a device knows the number."""
    return float(x) if options.on_host(x) else cast(Tensor, x).reshape(())


def signature(
    params: Sequence[Tensor], grads: Sequence[Tensor], own: Sequence[Sequence[Tensor | None]]
) -> list[Iterator[object]]:
    """All that `prepare` looks at: where a parameter's tensors lie and what they are; not the gradient's address.

    Momentum buffers and what else is the optimizer's `own` may be moved or replaced, but not seen otherwise. One
    property of all tensors comes after another, by C code alone: many small parameters make a step of such questions.
    """
    return [
        *(map(id, kept) for kept in own),
        *(map(Tensor.data_ptr, [t for t in kept if isinstance(t, Tensor)]) for kept in own),
        map(Tensor.data_ptr, params),
        map(_SHAPE, params),
        map(Tensor.stride, params),
        map(_DTYPE, params),
        map(_LAYOUT, grads),  # before the strides, which sparse ones do not have
        map(_SHAPE, grads),
        map(Tensor.stride, grads),
        map(bool, map(Tensor.data_ptr, grads)),
        map(_DTYPE, grads),
        map(_DEVICE, grads),
        map(Tensor.is_neg, grads),
    ]


_SHAPE, _DTYPE, _LAYOUT, _DEVICE = map(attrgetter, ("shape", "dtype", "layout", "device"))


def prepare(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_bufs: Sequence[Tensor | None] | None,
    *,
    ns_coefficients: Coefficients = DEFAULT,
    ns_steps: int | None = None,
    power: float = 0.0,
    adjust_lr_fn: str | Callable[[int, int], float] | None,
    flatten: bool | None = None,
    splits: Sequence[str | None] | None = None,
    transposed: Sequence[bool] = (),
    ns_algorithm: str = "auto",
    backend: str = "auto",
    max_workspace_bytes: int | None = None,
    workspace_dtype: torch.dtype = torch.bfloat16,
    sign_momentum: bool = False,
    second_moment: str | None = None,
    stochastic_rounding: bool = False,
    master_weights: bool = False,
    moments: Sequence[Tensor | None] = (),
    scales: Sequence[Tensor | None] = (),
    mantissas: Sequence[Tensor] = (),
    placements: Sequence[Placement | None] | None = None,
    strategy: str = "owner",
    block_lr_ratio: float = 1.0,
    apart: bool = False,
) -> Prepared:
    """Everything that steps of one group have in common; nothing is written.

    Args:
        params: of any floating-point dtype and strides.
        grads: one a parameter; only looked at.
        momentum_bufs: one a parameter; None: the direction is the gradient.
        splits: what each parameter is cut to, see `muon_kernels.split`; None leaves all whole.
        transposed: whether each is (inputs, outputs), see `Muon`; () if none is.
        ns_coefficients, ns_steps, power, adjust_lr_fn, flatten, ns_algorithm, backend, max_workspace_bytes,
            workspace_dtype, sign_momentum, second_moment, stochastic_rounding, master_weights: see `Muon`.
        moments: with a second_moment, one a parameter.
        scales: if a momentum is int8, one a parameter: its absmax, see packed.py; for others it does not matter.
        mantissas: with master_weights, the lower halves, one a parameter.
        placements: of parameters, gradients and momenta that are this rank's part of what several ranks step together;
            None for those that it steps alone. There is no momentum_buf where another rank keeps it.
        strategy, block_lr_ratio: see `Muon`.
        apart: whether parts of matrices that are cut are stepped as matrices, see distributed/blocks.py.

    Raises:
        ValueError, TypeError: an operand or an option that cannot be used, with what was expected.
        RuntimeError: a named backend that cannot run here.
    """
    schedule = schedule_for(ns_coefficients, ns_steps, power)

    def ratio_of(index: int, rows: int, cols: int) -> float:
        turned = bool(transposed) and transposed[index]
        return lr_ratio(adjust_lr_fn, *((cols, rows) if turned else (rows, cols)))

    for p, V, split in zip(params, moments, splits or repeat(None), strict=False):
        if V is None:  # another rank keeps it
            continue
        check_second_moment("second_momentum_buffer", V, cast(str, second_moment), p, flatten, split)
        check_device("second_momentum_buffer", V, p)
    for p, mantissa in zip(params, mantissas, strict=bool(mantissas)):
        check_master(p)
        check_mantissa("mantissa", mantissa, p)
        check_device("mantissa", mantissa, p)
    by_kind: dict[Kind, list[tuple[int, int]]] = {}
    scaled: list[Tensor | None] = []  # of every cut, the absmax of an int8 momentum
    ratios: list[float] = []
    cuts: list[tuple[int, tuple[int, ...], Piece | None]] = []
    shared: list[Placement | None] = []
    buffers = momentum_bufs if momentum_bufs is not None else [None] * len(params)
    for index, (p, g, buffer) in enumerate(zip(params, grads, buffers, strict=True)):
        _check_operands(p, g, buffer)
        if stochastic_rounding:
            check_rounding(p)
        split, placement = splits[index] if splits else None, placements[index] if placements else None
        cut_here = apart and placement is not None and placement.team.shards is not None and power != 1
        if placement is not None and power != 1 and not cut_here:
            shared.append(placement)
            continue
        shared.append(None)
        order = column_order(p.shape, p.stride()) if flattens(p.shape, flatten) else ()
        scale = None
        if buffer is not None and buffer.dtype == torch.int8:
            scale = scales[index] if scales else None
            if power == 1:
                raise ValueError(
                    "momentum_buffer should be floating-point where power is 1, which is SGD in torch, but is of int8; "
                    "delete it from the state to start anew"
                )
            check_momentum_scale("momentum_scale", scale, p, flatten, split)
            check_device("momentum_scale", cast(Tensor, scale), p)
            if order:  # blocks are along rows as everybody sees them, whatever the strides
                order = tuple(range(1, p.ndim))
        if placement is None:
            cut = [(piece, split_shape(p.shape, flatten, piece)) for piece in _pieces(p, flatten, order, split)]
        elif cut_here:
            cut = list(blocks.parts(placement, flatten, split))
        else:
            cut = [(piece, shape) for piece, shape, _ in exchange.cuts(placement, flatten, split)]
        scaled += repeat(None, len(cut)) if scale is None else scales_of(scale, p.shape, flatten, split, len(cut))
        for piece, (count, rows, cols) in cut:
            ratios.append(ratio_of(index, rows, cols) * (block_lr_ratio if cut_here else 1.0))
            momentum_dtype = g.dtype if buffer is None else buffer.dtype
            kind = Kind(min(rows, cols), max(rows, cols), p.device, g.dtype, momentum_dtype, p.dtype)
            by_kind.setdefault(kind, []).append((len(cuts), count))
            cuts.append((index, order, piece))
    check_apart(
        [("parameter", p) for p in params]
        + [("momentum_buffer", b) for b in buffers if b is not None]
        + [("second_momentum_buffer", V) for V in moments if V is not None]
        + [("momentum_scale", scale) for scale in scales if isinstance(scale, Tensor)]
        + [("mantissa", m) for m in mantissas]
    )

    prepared = Prepared([], [], [], [], WeakKeyDictionary(), [])
    if power == 1 and momentum_bufs is not None:
        for (index, order, piece), ratio in zip(cuts, ratios, strict=True):
            p, buffer, g, at = params[index], buffers[index], grads[index], None
            assert buffer is not None
            if piece is not None:
                views = [view(t.shape, t.stride(), flatten, order, piece) for t in (p, buffer, g)]
                p, buffer, at = views[0].of(p), views[1].of(buffer), views[2]
            prepared.plain.append(Plain(index, at, p, buffer, ratio))
        for kind, counts in by_kind.items():
            bucket = plain_bucket((kind.rows, kind.cols), sum(count for _, count in counts), _bytes_per_element(kind))
            prepared.works.append(Work(bucket, (), schedule, kind.device, []))
        return prepared
    if any(shared):
        prepared.exchanges.extend(
            exchange.prepare(
                params,
                grads,
                momentum_bufs,
                shared,
                schedule=schedule,
                ratio=ratio_of,
                flatten=flatten,
                splits=splits,
                ns_algorithm=ns_algorithm,
                backend=backend,
                max_workspace_bytes=max_workspace_bytes,
                workspace_dtype=workspace_dtype,
                sign_momentum=sign_momentum,
                form=second_moment,
                moments=moments,
                work=Work,
                way=STRATEGIES[strategy],
            )
        )
    sources: list[tuple[_Source, _Source | None, _Source, int]] = []
    for index, order, piece in cuts:
        param = _seen(params[index], flatten, order, piece, prepared.copies)
        buffer = buffers[index]
        momentum = None if buffer is None else _seen(buffer, flatten, order, piece, prepared.copies)
        g = grads[index]
        grad, at = _source(g, flatten, order, piece)
        sources.append((param, momentum, grad, index if at is None else len(grads) + len(prepared.grad_copies)))
        if at is not None:
            prepared.grad_copies.append((index, at, grad.tensor.view_as(at.of(g))))

    seconds: list[_Source] = []
    parts_before = [0] * len(moments)
    for index, order, piece in cuts if moments else ():
        V, copies = cast(Tensor, moments[index]), prepared.copies
        if second_moment == "element":
            seconds.append(_seen(V, flatten, order, piece, copies))
            continue
        at_rows = piece_of_rows(V, params[index].shape, flatten, piece, parts_before[index])
        seconds.append(_seen(V, False, (), at_rows, copies))
        parts_before[index] += 1 if piece is None else piece.parts
    lower = [
        _seen(mantissas[index], flatten, order, piece, prepared.copies) for index, order, piece in cuts if mantissas
    ]
    numbers = [0, *accumulate(split_shape(params[index].shape, flatten, piece)[0] for index, _, piece in cuts)]
    for kind, counts in by_kind.items():
        quantized = kind.momentum_dtype == torch.int8
        packed = quantized + master_weights
        dtypes = (
            kind.grad_dtype,
            torch.float32 if quantized else kind.momentum_dtype,
            torch.float32 if master_weights else kind.param_dtype,
        )
        name, notes = backends.choose(backend, kind.device, dtypes, workspace_dtype, (kind.rows, kind.cols))
        between = scratch_numbers(second_moment, sign_momentum, kind.rows, kind.cols, kind.device)
        bucket = plan_bucket(
            (kind.rows, kind.cols),
            sum(count for _, count in counts),
            schedule,
            ns_algorithm=ns_algorithm,
            backend=name,
            max_workspace_bytes=max_workspace_bytes,
            workspace_dtype=workspace_dtype,
            bytes_per_element=_bytes_per_element(kind, momentum_bufs is not None) + 4 * master_weights,
            direction_bytes=kind.grad_dtype.itemsize + kind.momentum_dtype.itemsize,
            stepped=momentum_bufs is not None,
            sign_momentum=sign_momentum,
            second_moment=second_moment,
            between_bytes=4 * between,
            stochastic_rounding=stochastic_rounding,
            packed=packed,
        )
        if sign_momentum:
            notes += ("sign_momentum=True goes over a direction twice more, and no step with it is fused",)
        kept = ["momentum_dtype=torch.int8"] * quantized + ["master_weights"] * master_weights
        if kept:
            notes += (f"{' and '.join(kept)} goes through fp32 memory of the workspace, and no step with it is fused",)
        if second_moment is not None:
            notes += (f"second_moment={second_moment!r} goes over an update twice more, and no step with it is fused",)
        chunks: list[Chunk] = []
        for parts in _deal(counts, bucket.chunks):
            first = sum(bucket.chunks[: len(chunks)])
            momenta = None if momentum_bufs is None else Packed() if quantized else Bundle()
            chunk = Chunk(Packed() if master_weights else Bundle(), momenta, [], array("d"), [], first)
            for part in parts:
                param, momentum, grad, read = sources[part.piece]
                seen = param.layout(part)
                if isinstance(chunk.params, Packed):
                    chunk.params.append(
                        Halves(param.untransposed(part), seen.transposed, lower[part.piece].untransposed(part))
                    )
                else:
                    chunk.params.append(Matrices(param.tensor, seen))
                if momentum is not None and isinstance(chunk.momenta, Packed):
                    absmax = cast(Tensor, scaled[part.piece])[part.start : part.stop]
                    chunk.momenta.append(Quantized(momentum.untransposed(part), seen.transposed, absmax))
                elif momentum is not None and isinstance(chunk.momenta, Bundle):
                    chunk.momenta.append(Matrices(momentum.tensor, momentum.layout(part)))
                chunk.grads.append((read, grad.layout(part)))
                chunk.ratios.extend([ratios[part.piece]] * (part.stop - part.start))
                if seconds:
                    moment = seconds[part.piece]
                    found = Matrices(moment.tensor, moment.layout(part)).view()
                    # A column is described as a row, too.
                    turned = second_moment == "neuron" and not seen.transposed
                    chunk.second_moments.append(found.mT if turned else found)
            chunks.append(chunk)
        number = numbers[counts[0][0]]
        work = Work(bucket, notes, schedule, kind.device, chunks, second_moment, number, sign_momentum, between)
        prepared.works.append(work)
    return prepared


def check_shared(group: Mapping[str, Any]) -> None:
    """Raise ValueError where an option of a group is not for what several ranks have parts or copies of."""
    wanted = {"master_weights": False, "workspace_dtype": "bfloat16"}
    for name, value in wanted.items():
        if group[name] != value:
            raise ValueError(f"{name} should be {value} for DTensors and with a process_group but is: {group[name]!r}")
    split = group["split"]
    if group["second_moment"] and any(split.values() if isinstance(split, Mapping) else (split,)):
        raise ValueError(
            f"second_moment should be None for DTensors and with a process_group where parameters are split but is: "
            f"{group['second_moment']!r}"
        )
    if group["momentum_dtype"] == "int8":
        raise ValueError("momentum_dtype should be floating-point for DTensors and with a process_group but is: int8")


# The options of a group that `prepare` takes.
SETTLED = (
    "ns_coefficients",
    "ns_steps",
    "power",
    "adjust_lr_fn",
    "flatten",
    "split",
    "transposed",
    "ns_algorithm",
    "backend",
    "max_workspace_bytes",
    "workspace_dtype",
    "sign_momentum",
    "second_moment",
    "stochastic_rounding",
    "master_weights",
    "strategy",
    "block_lr_ratio",
)


# Those of them that a parameter has its own answer to.
_OF_PARAMETERS = ("split", "transposed")
_OF_GROUPS = (*(key for key in SETTLED if key not in _OF_PARAMETERS), "momentum_dtype")


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two groups can be stepped as one, as far as their options say."""
    return all(one[key] == other[key] for key in _OF_GROUPS)


def settled(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options in SETTLED of groups that are stepped as one, as `Preparations` takes them."""
    return {
        **{key: groups[0][key] for key in SETTLED},
        **{key: [_of_parameters(group, key) for group in groups] for key in _OF_PARAMETERS},
        "workspace_dtype": options.dtype_of(groups[0]["workspace_dtype"]),
    }


def _of_parameters(group: Mapping[str, Any], key: str) -> Any:
    """Return an option with the parameters that it is about, which may move from one group to another."""
    if not group[key]:
        return None
    return group[key], list(map(id, group["params"])), list(group.get("param_names", ()))


def splits(group: Mapping[str, Any]) -> list[tuple[Tensor, str | None]]:
    """Every parameter of a group and what it is cut to."""
    params, split = group["params"], group["split"]
    if not isinstance(split, Mapping) or not split:
        return [(p, split or None) for p in params]
    if not params:
        return []
    if "param_names" not in group:
        raise ValueError(
            f"split by name should be of parameters that have one, but they have none: {dict(split)}; give pairs "
            "(name, parameter), as model.named_parameters() returns them, or muon_kernels.param_groups(model)"
        )
    return list(zip(params, by_name(split, group["param_names"]), strict=True))


def transposes(group: Mapping[str, Any]) -> list[bool]:
    """Whether each parameter of a group is (inputs, outputs)."""
    params, transposed = group["params"], group["transposed"]
    if isinstance(transposed, bool) or not params:
        return [transposed is True] * len(params)
    if "param_names" not in group:
        raise ValueError(
            f"transposed by name should be of parameters that have one, but they have none: {list(transposed)}; give "
            "pairs (name, parameter), as model.named_parameters() returns them, or muon_kernels.param_groups(model)"
        )
    names = group["param_names"]
    found = {pattern: matching(pattern, names) for pattern in transposed}
    for pattern, matched in found.items():
        if not matched:
            raise ValueError(f"transposed={pattern!r} matches no parameter of the group{close(pattern, names)}")
    chosen = {name for matched in found.values() for name in matched}
    return [name in chosen for name in names]


def check_settled(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError unless a group's options in SETTLED can be used."""
    if group["flatten"] is not None and not isinstance(group["flatten"], bool):
        raise TypeError(f"flatten should be True, False or None but is: {group['flatten']!r}")
    split = group["split"]
    for cut in split.values() if isinstance(split, Mapping) else (split,):
        check_split(cut)
    options.check_transposed(group["transposed"])
    resolve(group["ns_coefficients"], group["ns_steps"])
    rule_of(group["adjust_lr_fn"])
    options.check_algorithm(group["ns_algorithm"])
    if group["backend"] != "auto":
        backends.get(group["backend"])
    options.check_workspace(group["max_workspace_bytes"])
    options.check_workspace_dtype(group["workspace_dtype"])
    if check_power(group["power"]) and group["workspace_dtype"] != "bfloat16":
        raise ValueError(
            "workspace_dtype should be bfloat16 where power is above 0, as updates have any scale then, but is: "
            f"{group['workspace_dtype']}"
        )


class _Settled(NamedTuple):
    """What was prepared for a group, and for what."""

    options: dict[str, Any]
    threads: int
    parameters: int
    signature: list[list[object]]
    prepared: Prepared


class Preparations:
    """What `prepare` decided for groups, as long as they ask for the same."""

    def __init__(self) -> None:
        self._settled: dict[tuple[int, bool], _Settled] = {}

    def get(
        self,
        key: int,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        momentum_bufs: Sequence[Tensor | None] | None,
        options: dict[str, Any],
        named: Callable[[], tuple[Sequence[str | None], Sequence[bool]]],
        moments: Sequence[Tensor | None] = (),
        scales: Sequence[Tensor | None] = (),
        mantissas: Sequence[Tensor] = (),
        placements: Sequence[Placement | None] | None = None,
        apart: bool = False,
    ) -> Prepared:
        """`prepare` for the group `key`, with its options in SETTLED, or what it said before.

        Args:
            named: for the parameters, what follows from the options `split` and `transposed`, which may go by name.
            moments, scales, mantissas, placements: see `prepare`; where a parameter is does not change.
            apart: see `prepare`; either kind of step is remembered.
        """
        settled = self._settled.get((key, apart))
        own = [kept for kept in (momentum_bufs, moments, scales, mantissas) if kept]
        now = signature(params, grads, own)
        if (
            settled is None
            or settled.options != options
            or settled.threads != torch.get_num_threads()
            or len(settled.signature) != len(now)
            or settled.parameters != len(params)
            or not all(all(map(eq, before, after)) for before, after in zip(settled.signature, now, strict=True))
        ):
            # Copies: lists and a dict of splits may be changed in place.
            kept = {**options, **{key: deepcopy(options[key]) for key in ("ns_coefficients", "split", "transposed")}}
            splits, transposed = named()
            taken = {**options, "transposed": transposed}
            del taken["split"]
            taken |= {"moments": moments, "scales": scales, "mantissas": mantissas, "placements": placements}
            prepared = prepare(params, grads, momentum_bufs, splits=splits, apart=apart, **taken)
            found = list(map(list, signature(params, grads, own)))
            settled = self._settled[key, apart] = _Settled(kept, torch.get_num_threads(), len(params), found, prepared)
        return settled.prepared

    def clear(self) -> None:
        """Forget all."""
        self._settled.clear()


def schedule_for(ns_coefficients: Coefficients, ns_steps: int | None, power: float) -> Schedule:
    """What to iterate for a power: for 0 the coefficients say; for 1 nothing is."""
    return resolve(ns_coefficients, ns_steps) if power in (0, 1) else schedule_of(power)


def _bytes_per_element(kind: Kind, momentum: bool = True) -> int:
    return kind.grad_dtype.itemsize + 2 * (momentum * kind.momentum_dtype.itemsize + kind.param_dtype.itemsize)


def _iterate(
    work: Work,
    grads: Sequence[Matrices],
    momenta: Bundle | Packed | None,
    workspace: Workspace,
    scalars: Scalars,
    rehearsing: bool = False,
) -> Tensor:
    """Prologue and iteration of a chunk; the result lies in the workspace."""
    stacks = workspace.stacks(work, sum(g.layout.batch for g in grads))
    norms = None if stacks.blend is None else stacks.blend.norms
    with unpacked(momenta, stacks.unpacked, rehearsing) as seen:
        scale = backends.get(work.bucket.backend).momentum_update(
            grads,
            seen,
            stacks.X,
            **scalars.of_momentum(),
            margin=work.schedule.margin,
            scratch=stacks.scratch,
            norms=norms,
        )
    return _run(work, stacks, scale)


def _run(work: Work, stacks: Stacks, scale: Tensor | None) -> Tensor:
    """From the directions to the result, which lies in the workspace."""
    ops, derived = backends.get(work.bucket.backend), stacks.derived
    if work.signs:
        norms = None if stacks.blend is None else stacks.blend.norms
        scale = take_signs(stacks.X, scale, work.schedule.margin, norms, stacks.between)
    key = scale is not None and scale.data_ptr()
    if derived.get("key") != key:
        X, Y, squares, blend, *_ = stacks
        run = ALGORITHMS[work.bucket.algorithm].run
        program = ops.program(lambda: run(ops, X, Y, squares, scale, work.schedule, blend))
        derived.update(key=key, program=program)
    return cast(Tensor, derived["program"]())


def _fused_step(work: Work, chunk: Chunk, grads: Sequence[Matrices], workspace: Workspace, scalars: Scalars) -> None:
    ops, schedule = backends.get(work.bucket.backend), work.schedule
    assert isinstance(chunk.params, Bundle) and isinstance(chunk.momenta, Bundle)
    X, Y, squares, *_ = workspace.stacks(work, work.bucket.slots)

    def iterate(scale: Tensor) -> Tensor:
        return ALGORITHMS[work.bucket.algorithm].run(ops, X, Y, squares, scale, schedule)

    ops.fused_step(
        chunk.params,
        grads,
        chunk.momenta,
        X,
        iterate,
        triples=schedule.triples,
        **scalars.of_momentum(),
        margin=schedule.margin,
        **scalars.of_update(work.number, chunk.first),
        ratios=chunk.ratios,
    )


def _step(
    work: Work, grads: Sequence[Tensor], workspace: Workspace, scalars: Scalars, rehearsing: bool = False
) -> None:
    ops = backends.get(work.bucket.backend)
    for chunk in work.chunks:
        directions = [Matrices(grads[index], at) for index, at in chunk.grads]
        if work.bucket.fused:
            _fused_step(work, chunk, directions, workspace, scalars)
        else:
            result = _iterate(work, directions, chunk.momenta, workspace, scalars, rehearsing)
            stacks, ratios = workspace.stacks(work, len(chunk.ratios)), chunk.ratios
            if work.second_moment is not None and not rehearsing:
                kept = normalize(work.second_moment, result, chunk.second_moments, scalars.beta2, stacks.between)
                ratios = ratios if kept is None else array("d", map(mul, ratios, kept))
            with unpacked(chunk.params, stacks.unpacked, rehearsing) as params:
                ops.apply_update(params, result, **scalars.of_update(work.number, chunk.first), ratios=ratios)


def _plain_step(plain: Plain, grad: Tensor, scalars: Scalars) -> None:
    """In the operations of torch.optim.SGD, in their order: un-dampened, the same bits."""
    p, buffer = plain.param, plain.momentum
    if p.ndim == 0 or not p.numel():
        return
    rows = max(1, memory.piece(p.device) * len(p) // p.numel())
    for i in range(0, len(p), rows):
        _plain_piece(p[i : i + rows], buffer[i : i + rows], grad[i : i + rows], plain.ratio, scalars)


def _plain_piece(p: Tensor, buffer: Tensor, grad: Tensor, ratio: float, scalars: Scalars) -> None:
    mu, both = scalars.momentum, torch.promote_types(buffer.dtype, grad.dtype)
    wide = torch.promote_types(both, p.dtype)
    scaled, of_buffer, of_grad, sum_, ahead, update, moved = memory.take(
        p.device,
        *[(p.shape, dtype) for dtype in (grad.dtype, both, buffer.dtype, both, both, wide, wide)],
    )
    if memory.rehearsing():
        return
    lr, weight_decay = as_scalar(scalars.lr), as_scalar(scalars.weight_decay)
    g = grad if scalars.grad_scale == 1 else torch.mul(grad, scalars.grad_scale, out=scaled)
    if scalars.dampened:
        buffer.lerp_(_as(g, of_grad), 1 - mu)
    elif buffer.dtype == both:
        buffer.mul_(mu).add_(_as(g, of_grad))
    else:
        buffer.copy_(of_buffer.copy_(buffer.mul_(mu)).add_(g))
    direction = buffer
    if scalars.nesterov and scalars.dampened:
        direction = torch.lerp(g, _as(buffer, scaled if g is not scaled else sum_), mu, out=ahead)
    elif scalars.nesterov:
        direction = torch.add(_as(g, of_buffer), _as(buffer, sum_), alpha=mu, out=ahead)
    if isinstance(weight_decay, Tensor) or weight_decay:
        p.mul_(1 - lr * weight_decay)
    step_size = lr * ratio
    direction = _as(direction, update)
    if isinstance(step_size, Tensor):
        direction, step_size = torch.mul(direction, step_size, out=update), 1.0
    if p.dtype == wide:
        p.add_(direction, alpha=-step_size)
    else:
        p.copy_(moved.copy_(p).add_(direction, alpha=-step_size))


def _as(t: Tensor, spare: Tensor) -> Tensor:
    """`t` in the dtype of `spare`, in which a copy may lie."""
    return t if t.dtype == spare.dtype else spare.copy_(t)


def _check_range(work: Work, scalars: Scalars) -> None:
    """Raise ValueError where a step size is more than the parameters' dtype has, which torch finds out half-way."""
    lr = scalars.lr
    if isinstance(lr, Tensor) or lr <= 1:
        return
    for chunk in work.chunks:
        dtypes = {p.tensor.dtype if isinstance(p, Matrices) else p.stored.dtype for p in chunk.params}
        limit = min(torch.finfo(dtype).max for dtype in dtypes)
        if lr * max(chunk.ratios, default=0.0) > limit:
            raise ValueError(
                f"Learning rate, times what adjust_lr_fn says, should be at most {limit}, the largest number of "
                f"{min(dtypes, key=str)}, but lr is: {lr}"
            )


def plan_of(prepared: Sequence[Prepared]) -> Plan:
    """What steps of these groups do, as far as it is this rank that does it."""
    exchanges = [shared for decided in prepared for shared in decided.exchanges]
    alone = [work for decided in prepared for work in decided.works]
    together = [work for shared in exchanges for work in shared.works]
    notes = dict.fromkeys(note for work in (*alone, *together) for note in work.notes)
    buckets = [work.bucket for work in (*alone, *(work for work in together if work.bucket.slots))]
    return Plan(tuple(buckets), tuple(notes), tuple(shared.plan for shared in exchanges))


def execute(prepared: Prepared, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
    """Do a step: parameters and momentum buffers are written, gradients are not.

    Args:
        prepared: from `prepare`, for the same tensors.
        grads: one a parameter.
        scalars: of this step.
        workspace: in which `ready` has made room.
    """
    with interrupts.held():
        grads = [*grads, *(copy.copy_(at.of(grads[index])) for index, at, copy in prepared.grad_copies)]
        for target, copy in prepared.copies:
            copy.copy_(target)
        for plain in prepared.plain:
            g = grads[plain.gradient]
            _plain_step(plain, g if plain.at is None else plain.at.of(g), scalars)
        for work in prepared.works:
            _step(work, grads, workspace, scalars)
        for target, copy in prepared.copies:
            target.copy_(copy)
    for shared in prepared.exchanges:
        shared.run(grads, scalars, workspace, _run)


def reserve(prepared: Prepared, workspace: Workspace) -> None:
    """Have the memory of what `execute` writes; of all groups before the first is `ready`."""
    for shared in prepared.exchanges:
        shared.reserve()
    for work in _all_works(prepared):
        workspace.reserve(work.device, work.bucket.workspace_bytes)


def _all_works(prepared: Prepared) -> list[Work]:
    return [*prepared.works, *(work for shared in prepared.exchanges for work in shared.works)]


def ready(prepared: Prepared, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
    """Have backends get ready what `execute` will run, and memory that it takes; the last thing that may raise."""
    for work in _all_works(prepared):
        if scalars.seed is not None and capturing(work.device):
            raise RuntimeError(
                "a step with stochastic_rounding should not be captured in a graph, of which every replay would round "
                "by the same random bits; step outside of it"
            )
    for work in prepared.works:
        _check_range(work, scalars)
    seen = [*grads, *(copy for _, _, copy in prepared.grad_copies)]
    # What `signature` does not have, and a kernel may be another for.
    on_host = options.on_host(scalars.lr), options.on_host(scalars.weight_decay)
    kind = scalars.nesterov, scalars.dampened, *on_host, *(i for i, g in enumerate(seen) if g.data_ptr() % 16)
    kind = scalars.cautious, *workspace.addresses(), *kind
    if kind in prepared.rehearsed.get(memory.mark(), ()):
        return
    with memory.rehearsal():
        for plain in prepared.plain:
            g = seen[plain.gradient]
            _plain_step(plain, g if plain.at is None else plain.at.of(g), scalars)
    for work in prepared.works:
        if (rehearsal := backends.get(work.bucket.backend).rehearsal()) is not None:
            with rehearsal:
                _step(work, seen, workspace, scalars, rehearsing=True)
    prepared.rehearsed.setdefault(memory.mark(), set()).add(kind)


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
    """What a schedule makes of G, without momentum."""
    check_matrices("G", G)
    options.check_eps(eps)
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


def spectral_power(
    G: Tensor,
    p: float,
    *,
    exact: str | None = None,
    ns_algorithm: str = "auto",
    backend: str = "auto",
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """U Σ^p Vᵀ of every matrix G = U Σ Vᵀ, at up to 1.6 times the price of `orthogonalize`; see spectral.py.

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
