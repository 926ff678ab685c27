"""Buckets: equal matrices together, in chunks that fit the workspace."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .. import backends
from ..layout import Bundle, Matrices
from ..stages import EightBitMomentum
from ..stages.packed import Halves, Packed, Quantized
from ..stages.stage import floats_for
from .operands import BucketKey, Seen
from .options import StepOptions
from .plan import Bucket, plain_bucket, plan_bucket
from .work import Chunk, Span, Work


def plain_work(key: BucketKey, count: int, options: StepOptions) -> Work:
    """Return the work of `count` matrices that go through no iteration: all of it is a plan's."""
    return Work(plain_bucket((key.rows, key.cols), count, bytes_per_element(key)), (), options.schedule, key.device, [])


def planned(key: BucketKey, members: Sequence[Seen], options: StepOptions) -> Work:
    """Decide how the matrices of a bucket are stepped.

    Args:
        key: what they have in common.
        members: the pieces of operands that they are.
        options: the group's.

    Raises:
        ValueError, TypeError, RuntimeError: see `backends.choose` and `plan_bucket`.
    """
    quantized, shape = key.momentum_dtype == torch.int8, (key.rows, key.cols)
    dtypes = (
        key.grad_dtype,
        torch.float32 if quantized else key.momentum_dtype,
        torch.float32 if options.master_weights else key.param_dtype,
    )
    name, notes = backends.choose(options.backend, key.device, dtypes, options.workspace_dtype, shape)
    stages = (EightBitMomentum(), *options.stages) if quantized else options.stages
    stage_floats = floats_for(stages, *shape, key.device)
    bucket = plan_bucket(
        shape,
        sum(seen.matrices for seen in members),
        options._replace(stages=stages),
        name,
        bytes_per_element=bytes_per_element(key, options.momentum) + 4 * options.master_weights,
        direction_bytes=key.grad_dtype.itemsize + key.momentum_dtype.itemsize,
        stepped=options.momentum,
        stage_bytes=4 * stage_floats,
    )
    return Work(
        bucket,
        (*notes, *(stage.note for stage in stages)),
        options.schedule,
        key.device,
        chunks_of(members, bucket, quantized, options),
        stages,
        key.window,
        stage_floats,
    )


def chunks_of(members: Sequence[Seen], bucket: Bucket, quantized: bool, options: StepOptions) -> list[Chunk]:
    """Return the operands of every pass through the workspace."""
    chunks: list[Chunk] = []
    for spans in into_chunks([seen.matrices for seen in members], bucket.chunks):
        params: Bundle | Packed = Packed() if options.master_weights else Bundle()
        momenta: Bundle | Packed | None = None
        if options.momentum:
            momenta = Packed() if quantized else Bundle()
        chunk = Chunk(params, momenta, [], array("d"), [], array("i"))
        for span in spans:
            _add(chunk, span, members[span.piece], options)
        chunks.append(chunk)
    return chunks


def _add(chunk: Chunk, span: Span, seen: Seen, options: StepOptions) -> None:
    param, at = seen.param, seen.param.layout(span)
    if isinstance(chunk.params, Packed):
        lower = seen.mantissa
        assert lower is not None
        chunk.params.append(Halves(param.untransposed(span), at.transposed, lower.untransposed(span)))
    else:
        chunk.params.append(Matrices(param.tensor, at))
    if seen.momentum is not None and isinstance(chunk.momenta, Packed):
        absmax = cast(Tensor, seen.absmax)[span.start : span.stop]
        chunk.momenta.append(Quantized(seen.momentum.untransposed(span), at.transposed, absmax))
    elif seen.momentum is not None and isinstance(chunk.momenta, Bundle):
        chunk.momenta.append(Matrices(seen.momentum.tensor, seen.momentum.layout(span)))
    chunk.grads.append((seen.gradient, seen.grad.layout(span)))
    chunk.ratios.extend([seen.ratio] * (span.stop - span.start))
    chunk.numbers.extend(seen.numbers[span.start : span.stop])
    if seen.second_moment is not None:
        found = Matrices(seen.second_moment.tensor, seen.second_moment.layout(span)).view()
        # A column is described as a row, too.
        turned = options.second_moment == "neuron" and not at.transposed
        chunk.second_moments.append(found.mT if turned else found)


def into_chunks(counts: Sequence[int], chunks: Sequence[int]) -> list[list[Span]]:
    """Cut pieces of so many matrices each into chunks of the given sizes; a piece may be cut in two."""
    filled: list[list[Span]] = []
    queue = [Span(index, 0, count) for index, count in enumerate(counts)]
    for room in chunks:
        chunk: list[Span] = []
        while room:
            index, start, stop = queue.pop(0) if queue[0].stop - queue[0].start <= room else queue[0]
            if stop - start > room:
                queue[0] = Span(index, start + room, stop)
                stop = start + room
            chunk.append(Span(index, start, stop))
            room -= stop - start
        filled.append(chunk)
    return filled


def bytes_per_element(key: BucketKey, momentum: bool = True) -> int:
    """Return the bytes that a step moves for an element: of the gradient once, of momentum and parameter twice."""
    return key.grad_dtype.itemsize + 2 * (momentum * key.momentum_dtype.itemsize + key.param_dtype.itemsize)
