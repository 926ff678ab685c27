"""Sort parameters into buckets and choose for each; raise whatever there is to raise."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import backends
from ..coefficients import DEFAULT
from ..distributed import exchange
from ..distributed.placement import Placement
from ..distributed.shards import shards_of
from ..distributed.strategies import STRATEGIES, blocks
from ..layout import Bundle, Matrices, Piece, column_order, flattens, split_shape, view
from ..scaling import lr_ratio
from ..stages.packed import Halves, Packed, Quantized, check_mantissa, check_master, check_momentum_scale, scales_of
from ..stages.second_moment import check_second_moment, piece_of_rows, scratch_numbers
from ..tensors import check_apart, check_device
from .operands import Source, check_operands, pieces_of, seen_as, source_of
from .options import Coefficients, check_rounding, schedule_for
from .plan import plain_bucket, plan_bucket
from .work import Chunk, Kind, Part, Plain, Prepared, Work


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
        check_operands(p, g, buffer)
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
            cut = [(piece, split_shape(p.shape, flatten, piece)) for piece in pieces_of(p, flatten, order, split)]
        elif cut_here:
            cut = list(blocks.parts(placement, flatten, split))
        else:
            cut = [(piece, shape) for piece, shape, _ in shards_of(placement, flatten, split)]
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
    sources: list[tuple[Source, Source | None, Source, int]] = []
    for index, order, piece in cuts:
        param = seen_as(params[index], flatten, order, piece, prepared.copies)
        buffer = buffers[index]
        momentum = None if buffer is None else seen_as(buffer, flatten, order, piece, prepared.copies)
        g = grads[index]
        grad, at = source_of(g, flatten, order, piece)
        sources.append((param, momentum, grad, index if at is None else len(grads) + len(prepared.grad_copies)))
        if at is not None:
            prepared.grad_copies.append((index, at, grad.tensor.view_as(at.of(g))))

    seconds: list[Source] = []
    parts_before = [0] * len(moments)
    for index, order, piece in cuts if moments else ():
        V, copies = cast(Tensor, moments[index]), prepared.copies
        if second_moment == "element":
            seconds.append(seen_as(V, flatten, order, piece, copies))
            continue
        at_rows = piece_of_rows(V, params[index].shape, flatten, piece, parts_before[index])
        seconds.append(seen_as(V, False, (), at_rows, copies))
        parts_before[index] += 1 if piece is None else piece.parts
    lower = [
        seen_as(mantissas[index], flatten, order, piece, prepared.copies) for index, order, piece in cuts if mantissas
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
        for parts in into_chunks(counts, bucket.chunks):
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


def into_chunks(counts: Sequence[tuple[int, int]], chunks: Sequence[int]) -> list[list[Part]]:
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


def _bytes_per_element(kind: Kind, momentum: bool = True) -> int:
    return kind.grad_dtype.itemsize + 2 * (momentum * kind.momentum_dtype.itemsize + kind.param_dtype.itemsize)
