"""Sort parameters into buckets and choose for each; raise whatever there is to raise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from ..layout import view
from .bucket import plain_work, planned
from .operands import BucketKey, Operand, Viewer, check, piece_shapes
from .options import StepOptions
from .work import Plain, Prepared


def prepare(operands: Sequence[Operand], options: StepOptions) -> Prepared:
    """Decide everything that steps of these operands have in common; nothing is written.

    Args:
        operands: one a parameter; its gradient is only looked at.
        options: of the group that they are in.

    Raises:
        ValueError, TypeError: an operand or an option that cannot be used, with what was expected.
        RuntimeError: a named backend that cannot run here.
    """
    check(operands, options)
    if options.power == 1 and options.momentum:
        return _plain(operands, options)
    viewer = Viewer(options, len(operands))
    seen = [piece for index, operand in enumerate(operands) for piece in viewer.seen(index, operand)]
    places: dict[BucketKey, list[int]] = {}
    for i, piece in enumerate(seen):
        places.setdefault(piece.key, []).append(i)
    works = [planned(key, [seen[i] for i in at], options) for key, at in places.items()]
    return Prepared(works, [], viewer.copies, viewer.grad_copies, WeakKeyDictionary())


def _plain(operands: Sequence[Operand], options: StepOptions) -> Prepared:
    """Prepare what goes through no iteration, in torch's operations."""
    found: list[Plain] = []
    counts: Counter[BucketKey] = Counter()
    for index, operand in enumerate(operands):
        order, shapes = piece_shapes(operand, options)
        for piece, (count, rows, cols) in shapes:
            p, buffer, g, at = operand.param, operand.momentum, operand.grad, None
            assert buffer is not None
            counts[operand.bucket_key(rows, cols)] += count
            if piece is not None:
                views = [view(t.shape, t.stride(), options.flatten, order, piece) for t in (p, buffer, g)]
                p, buffer, at = views[0].of(p), views[1].of(buffer), views[2]
            found.append(Plain(index, at, p, buffer, operand.lr_ratio(options, rows, cols)))
    works = [plain_work(key, count, options) for key, count in counts.items()]
    return Prepared(works, found, [], [], WeakKeyDictionary())
