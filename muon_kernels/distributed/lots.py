"""Lots: equal matrices that are sharded in the same way, by owner."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import mul
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .. import backends
from ..layout import Bundle, Layout, Matrices, Window
from ..stages.packed import Halves, Packed, Quantized, check_momentum_scale, floats, scales_of, unpacked
from ..stages.second_moment import SecondMoment, Whole, by_element, by_row
from . import second_moment
from .placement import Placement, Team
from .shards import layouts, pieces_held, shards_of
from .slices import Rectangle, record_bytes

if TYPE_CHECKING:
    from ..step.operands import Operand
    from ..step.options import StepOptions
    from ..step.work import Scalars, Work
    from .strategies.owner import OwnerRound

# Most fp32 numbers that packed matrices are unpacked to at a time, unless one matrix has more.
_NUMBERS, _NUMBERS_ON_CPU = 1 << 24, 1 << 20


_Seen = TypeVar("_Seen")


class Kept(NamedTuple):
    """Parameters and their state, in the order of a step's operands; of DTensors, this rank's shards.

    Attributes:
        momenta: None where another rank keeps it; None for all where the directions are the gradients.
        mantissas: lower halves of the parameters; None for all without `master_weights`.
    """

    params: Sequence[Tensor]
    momenta: Sequence[Tensor | None] | None
    mantissas: Sequence[Tensor | None] | None


class Entry(NamedTuple):
    """One matrix of a lot. Where this rank holds nothing of it, the layouts are None.

    Attributes:
        param: index of the parameter.
        ratio: factor of its learning rate.
        tall: whether the parameter holds it transposed.
        moment: second moment of this rank's shard, see `second_moment.views`, if it is kept here.
        mantissa_at: layout of the parameter's lower half, with `master_weights`.
        absmax: (1, blocks) of an int8 momentum, if it is kept here.
        number: with stochastic rounding, see numbers.py; else 0.
    """

    param: int
    param_at: Layout | None
    momentum_at: Layout | None
    grad_at: Layout | None
    ratio: float
    tall: bool
    moment: Tensor | None
    mantissa_at: Layout | None
    absmax: Tensor | None
    number: int = 0


class LotKey(NamedTuple):
    """Properties that all matrices of a lot share.

    Attributes:
        team: the ranks that step them.
        shape: (rows, cols) of the whole matrix, rows <= cols.
        shards: what each rank of `team.shards` holds of it.
        momentum_dtype: what momentum is computed with in, the same on all ranks: of one that a rank alone keeps, as the
            others can know it.
        rows_held: rows of which each rank keeps the second moment, where every rank keeps those of its own.
        turned: whether they are square and transposed, if stochastic rounding has to know.
    """

    team: Team
    shape: tuple[int, int]
    shards: tuple[Rectangle, ...]
    device: torch.device
    grad_dtype: torch.dtype
    momentum_dtype: torch.dtype
    param_dtype: torch.dtype
    rows_held: second_moment.RowsHeld | None
    turned: bool = False

    @property
    def window(self) -> Window:
        """Place of this rank's shards in the whole matrices, which are transposed if taller than wide."""
        top, left, *_ = self.shards[self.team.shard]
        return Window(left, top, self.shape[1], True) if self.turned else Window(top, left, self.shape[1])


def holders(key: LotKey) -> list[int]:
    """Return the ranks that hold elements of such a matrix."""
    return [rank for rank, shard in enumerate(key.shards) if shard.elements]


@dataclass
class Lot:
    """Equal matrices that are sharded in the same way, by owner.

    Attributes:
        key: what they have in common.
        work: how an owner iterates.
        entries: for every rank of the team, the matrices that it owns.
        round_size: matrices of one owner in a round.
        strategy: class of the rounds, where the matrices are sharded.
        owner_keeps_state: whether only the owner keeps the state of a matrix.
        part_bytes: of what replicas gather at once, see gathers.py.
    """

    key: LotKey
    work: Work
    entries: list[list[Entry]]
    round_size: int
    strategy: type[OwnerRound]
    owner_keeps_state: bool
    part_bytes: int

    @property
    def here(self) -> bool:
        """Whether this rank holds elements of the matrices."""
        return self.key.shards[self.key.team.shard].elements > 0

    @property
    def largest_record(self) -> int:
        """Bytes of the results of one matrix for the rank that holds most of it."""
        return max(record_bytes(shard.elements) for shard in self.key.shards)

    @property
    def second_moment(self) -> str | None:
        """The form of the second moment that results are divided by, or None."""
        return next((stage.form for stage in self.work.stages if isinstance(stage, SecondMoment)), None)

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return -(-max(map(len, self.entries)) // self.round_size)

    def __str__(self) -> str:
        """Return the lot's name in an error."""
        m, n = self.key.shape
        return f"the bucket of {sum(map(len, self.entries))} x {m}x{n}"


def matrices_of(
    index: int, operand: Operand, placement: Placement, options: StepOptions, strategy: type[OwnerRound]
) -> Iterator[tuple[LotKey, list[tuple[int | None, Entry]]]]:
    """Yield the matrices of an operand by key, each with the rank that keeps its momentum; None if every rank does."""
    p, g, V, flatten, before = operand.param, operand.grad, operand.second_moment, options.flatten, 0
    absmaxes = iter(_absmaxes(operand, placement, flatten))
    for piece, (batch, rows, cols), rectangles, row_ranges in shards_of(placement, flatten, operand.split):
        tall = rows > cols or (rows == cols and strategy.turns(rectangles))
        if tall:
            rectangles = tuple(Rectangle(left, top, c, r) for top, left, r, c in rectangles)
        form, shape = options.second_moment, (min(rows, cols), max(rows, cols))
        by_rows = form == "neuron" and placement.owner is None
        held = second_moment.RowsHeld(tall, row_ranges) if by_rows else None
        turned = options.stochastic_rounding and tall and rows == cols
        dtypes = g.dtype, _momentum_dtype(operand, placement), p.dtype
        key = LotKey(placement.team, shape, rectangles, p.device, *dtypes, held, turned)
        here = rectangles[placement.team.shard].elements > 0
        ats = [
            layouts(t, flatten, piece, batch, tall) if t is not None and here else [None] * batch
            for t in (p, operand.momentum, g, operand.mantissa)
        ]
        views: list[Tensor | None] = [None] * batch
        if form is not None and V is not None:
            views = list(second_moment.views(form, V, p, flatten, piece, before, batch, tall))
        numbers = operand.part_numbers(piece, before) or [0] * batch
        before += 1 if piece is None else piece.parts
        absmax = next(absmaxes, [None] * batch)
        ratio = operand.lr_ratio(options, rows, cols)
        yield (
            key,
            [
                (placement.owner, Entry(index, of_p, of_m, of_g, ratio, tall, view, of_lower, scale, number))
                for of_p, of_m, of_g, of_lower, view, scale, number in zip(*ats, views, absmax, numbers, strict=True)
            ],
        )


def _momentum_dtype(operand: Operand, placement: Placement) -> torch.dtype:
    kept = None if operand.momentum is None or placement.owner is not None else operand.momentum.dtype
    dtype = kept or operand.momentum_dtype or operand.grad.dtype
    return torch.float32 if dtype == torch.int8 else dtype


def _absmaxes(operand: Operand, placement: Placement, flatten: bool | None) -> list[list[Tensor | None]]:
    """Return the absmax of every matrix of every piece of this rank's shard; nothing unless the momentum is of int8."""
    if operand.momentum is None or operand.momentum.dtype != torch.int8:
        return []
    shapes = pieces_held(operand.param, placement, flatten, operand.split)
    check_momentum_scale("momentum_scale", operand.momentum_scale, shapes)
    scale = cast(Tensor, operand.momentum_scale)
    return [[of_one[None] for of_one in own] for own in scales_of(scale, shapes, len(shapes))]


class Results(NamedTuple):
    """Matrices of a lot whose results come at once.

    Attributes:
        lot: theirs.
        ratios, matrix_numbers: of `entries`.
        params: what this rank has of them; nothing where it has no shard.
    """

    lot: Lot
    entries: Sequence[Entry]
    ratios: array[float]
    matrix_numbers: array[int]
    params: Bundle | Packed

    @classmethod
    def of(cls, lot: Lot, kept: Kept, entries: Sequence[Entry]) -> Results:
        """Return the matrices of `entries`."""
        ratios, numbers = array("d", [each.ratio for each in entries]), array("i", [each.number for each in entries])
        return cls(lot, entries, ratios, numbers, params_of(kept, entries if lot.here else ()))

    def apply(self, X: Tensor, scalars: Scalars, numbers: Tensor, sizes: Tensor | None = None) -> None:
        """Update the parameters; all ranks that have shards have to call this, also without any.

        Args:
            X: (matrices, rows, cols), this rank's shards of the results; it may be written.
            scalars: of the step.
            numbers: fp32 memory of `numbers_for` the parameters, and of `numbers_for_moments`.
            sizes: (matrices,) factors of the ratios, where the owner has divided by second moments; None for none.
        """
        if sizes is None:
            ratios = normalized(self.lot, self.entries, X, scalars.beta2, self.ratios, numbers)
        else:
            ratios = array("d", map(mul, self.ratios, sizes.tolist()))
        ops = backends.get(self.lot.work.bucket.backend)
        for at, seen in in_memory(self.params, numbers) if self.params else ():
            options = scalars.apply_options(self.matrix_numbers[at], self.lot.key.window)
            ops.apply_update(scalars.apply_update(seen, X[at], ratios[at]), options)


def bundle_of(tensors: Sequence[Tensor | None], entries: Sequence[Entry], which: str) -> Bundle:
    """Return the matrices of `entries` in `tensors`, at the layouts in their field `which`."""
    bundle = Bundle()
    for entry in entries:
        tensor, at = tensors[entry.param], getattr(entry, which)
        assert tensor is not None and at is not None
        bundle.append(Matrices(tensor, at))
    return bundle


def params_of(kept: Kept, entries: Sequence[Entry]) -> Bundle | Packed:
    """Return the parameters of `entries`; with `master_weights`, the fp32 numbers of which they are halves."""
    if kept.mantissas is None:
        return bundle_of(kept.params, entries, "param_at")
    uppers, lowers = (
        bundle_of(tensors, entries, which)
        for tensors, which in ((kept.params, "param_at"), (kept.mantissas, "mantissa_at"))
    )
    return Packed(
        Halves(_as_kept(upper), upper.layout.transposed, _as_kept(lower))
        for upper, lower in zip(uppers, lowers, strict=True)
    )


def momenta_of(kept: Kept, entries: Sequence[Entry]) -> Bundle | Packed | None:
    """Return the momenta of `entries`, which are here; None where the directions are the gradients."""
    if kept.momenta is None:
        return None
    found = bundle_of(kept.momenta, entries, "momentum_at")
    if not entries or entries[0].absmax is None:
        return found
    return Packed(
        Quantized(_as_kept(codes), codes.layout.transposed, cast(Tensor, entry.absmax))
        for codes, entry in zip(found, entries, strict=True)
    )


def _as_kept(matrices: Matrices) -> Tensor:
    """Return (matrices, rows, cols) as the parameter has them, sharing its memory."""
    seen = matrices.view()
    return seen.mT if matrices.layout.transposed else seen


def _at_once(packed: Packed) -> tuple[int, int]:
    """Return how many of equal matrices are unpacked at a time, and the fp32 numbers of one."""
    _, rows, cols = packed[0].stored.shape
    each = floats(rows, cols)
    most = _NUMBERS_ON_CPU if packed[0].stored.device.type == "cpu" else _NUMBERS
    return min(len(packed), max(1, most // each)), each


def numbers_for(matrices: Bundle | Packed | None) -> int:
    """Return the fp32 numbers of memory in which `in_memory` unpacks matrices."""
    return math.prod(_at_once(matrices)) if isinstance(matrices, Packed) and matrices else 0


def in_memory(matrices: _Seen | Packed, numbers: Tensor) -> Iterator[tuple[slice, _Seen | list[Matrices]]]:
    """Yield matrices that verbs can read and write, each time with their places among all; pack again what is written.

    Args:
        matrices: equal ones, each by itself, or None. If they are not packed, they come all at a time.
        numbers: fp32 memory of `numbers_for` them, or more.
    """
    if not isinstance(matrices, Packed):
        yield slice(0, None), matrices
        return
    count, each = _at_once(matrices)
    for start in range(0, len(matrices), count):
        some = Packed(matrices[start : start + count])
        with unpacked(some, numbers[: len(some) * each].view(len(some), each), rehearsing=False) as seen:
            yield slice(start, start + len(some)), seen


def _moments_at_once(lot: Lot) -> tuple[int, int]:
    """Return how many matrices are divided by second moments at a time, the same on all ranks, and the scratch of one.

    That is in fp32 numbers, for the largest shard of any rank.
    """
    stage, device = SecondMoment(cast(str, lot.second_moment)), lot.key.device
    sizes = [(shard.rows, shard.cols) for shard in lot.key.shards]
    each = max(stage.floats(min(size), max(size), device) for size in sizes)
    return max(1, (_NUMBERS_ON_CPU if device.type == "cpu" else _NUMBERS) // each), each


def numbers_for_moments(lot: Lot, matrices: int) -> int:
    """Return the fp32 numbers of memory that `normalized` takes for so many matrices."""
    if lot.second_moment is None or lot.owner_keeps_state or not matrices:
        return 0
    count, each = _moments_at_once(lot)
    return min(count, matrices) * each


def normalized(
    lot: Lot, entries: Sequence[Entry], X: Tensor, beta2: float, ratios: array[float], numbers: Tensor
) -> array[float]:
    """Divide X, this rank's shards of results, by second moments; return the ratios to multiply them by.

    `numbers` is fp32 memory of `numbers_for_moments`. All ranks that have shards have to call it, also without any.
    """
    form, key = lot.second_moment, lot.key
    if form is None:
        return ratios
    own, (m, n), held = array("d", ratios), key.shape, key.rows_held
    tall = held is not None and held.tall
    whole = Whole()
    if key.team.shards is not None:
        height, width = (n, m) if tall else (m, n)
        if held is not None and not X.numel():  # the rank may have rows, but none of their columns
            rows = held.ranges[key.team.shard]
            X = X.reshape(len(X), *((0, rows[1] - rows[0]) if tall else (rows[1] - rows[0], 0)))
        whole = second_moment.Parts(key.team.shards, held, key.team.shard, height, width, str(lot))
    count, each = _moments_at_once(lot)
    for start in range(0, len(entries), count):
        some = slice(start, min(start + count, len(entries)))
        moments = [cast(Tensor, entry.moment) for entry in entries[some]]
        scratch = numbers[: len(moments) * each]
        if form == "neuron":
            by_row(X[some], moments, beta2, -2 if tall else -1, scratch, whole)
        elif kept := by_element(X[some], moments, beta2, scratch, whole):
            own[some] = array("d", map(mul, own[some], kept))
    return own
