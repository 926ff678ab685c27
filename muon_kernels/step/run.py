"""Run what was prepared: prologue, iteration, epilogue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from .. import backends, interrupts, memory, options
from ..graphs import capturing
from ..layout import Bundle, Matrices
from ..newton_schulz import ALGORITHMS
from ..stages.packed import Packed, unpacked
from ..verbs import Step
from .options import as_scalar
from .plan import Bucket, Plan
from .work import Chunk, Plain, Prepared, Scalars, Task, Work
from .workspace import Stacks, Workspace


def iterate(
    work: Work,
    grads: Sequence[Matrices],
    momenta: Bundle | Packed | None,
    workspace: Workspace,
    scalars: Scalars,
    rehearsing: bool = False,
) -> Tensor:
    """Run prologue and iteration of a chunk; the result lies in the workspace."""
    stacks = workspace.stacks(work, sum(g.layout.batch for g in grads))
    norms = None if stacks.blend is None else stacks.blend.norms
    with unpacked(momenta, stacks.unpacked, rehearsing) as seen:
        scale = backends.get(work.bucket.backend).momentum_update(
            scalars.momentum_update(grads, seen, stacks.X, work.schedule.margin, stacks.scratch, norms)
        )
    return run_iteration(work, stacks, scale)


def run_iteration(work: Work, stacks: Stacks, scale: Tensor | None) -> Tensor:
    """Iterate a stack of directions; the result lies in the workspace."""
    ops, derived = backends.get(work.bucket.backend), stacks.derived
    norms = None if stacks.blend is None else stacks.blend.norms
    for stage in work.stages:
        scale = stage.before(stacks.X, scale, work.schedule.margin, norms, stacks.stage_scratch)
    key = scale is not None and scale.data_ptr()
    if derived.get("key") != key:
        X, Y, squares, blend, *_ = stacks
        run = ALGORITHMS[work.bucket.algorithm].run
        program = ops.program(lambda: run(ops, X, Y, squares, scale, work.schedule, blend))
        derived.update(key=key, program=program)
    result = cast(Tensor, derived["program"]())
    for stage in work.stages:
        stage.orthogonalized(result, stacks.stage_scratch)
    return result


def _fused_step(work: Work, chunk: Chunk, grads: Sequence[Matrices], workspace: Workspace, scalars: Scalars) -> None:
    ops, schedule = backends.get(work.bucket.backend), work.schedule
    assert isinstance(chunk.params, Bundle) and isinstance(chunk.momenta, Bundle)
    stacks = workspace.stacks(work, work.bucket.slots)
    X, Y, squares, *_ = stacks

    def iterate(scale: Tensor) -> Tensor:
        return ALGORITHMS[work.bucket.algorithm].run(ops, X, Y, squares, scale, schedule)

    ops.fused_step(
        Step(
            scalars.momentum_update(grads, chunk.momenta, X, schedule.margin),
            iterate,
            schedule.triples,
            scalars.apply_update(chunk.params, X, chunk.ratios),
            scalars.apply_options(chunk.numbers, work.window),
            work.bucket.parts,
            stacks.partials,
        )
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
            result = iterate(work, directions, chunk.momenta, workspace, scalars, rehearsing)
            stacks, ratios = workspace.stacks(work, len(chunk.ratios)), chunk.ratios
            for stage in () if rehearsing else work.stages:
                ratios = stage.after(result, chunk.second_moments, scalars, ratios, stacks.stage_scratch)
            with unpacked(chunk.params, stacks.unpacked, rehearsing) as params:
                update = scalars.apply_update(params, result, ratios)
                ops.apply_update(update, scalars.apply_options(chunk.numbers, work.window))


def _plain_step(plain: Plain, grad: Tensor, scalars: Scalars) -> None:
    """Step in the operations of torch.optim.SGD, in their order: un-dampened, with the same bits."""
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
    """Return `t` in the dtype of `spare`, in which a copy may lie."""
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


def check_uncaptured(works: Sequence[Work], scalars: Scalars) -> None:
    """Raise RuntimeError where random bits would be captured in a graph."""
    for work in works:
        if scalars.seed is not None and capturing(work.device):
            raise RuntimeError(
                "a step with stochastic_rounding should not be captured in a graph, of which every replay would round "
                "by the same random bits; step outside of it"
            )


def plan_of(tasks: Iterable[Task]) -> Plan:
    """Return the plan of a step of these tasks, as far as this rank does it."""
    ordered = sorted(tasks, key=lambda task: task.together)
    notes = dict.fromkeys(note for task in ordered for work in task.works for note in work.notes)
    buckets = [bucket for task in ordered for bucket in task.buckets]
    exchanged = [shared for task in ordered if (shared := task.exchanged) is not None]
    return Plan(tuple(buckets), tuple(notes), tuple(exchanged))


class Local:
    """Task of operands that this rank steps alone."""

    together = False
    exchanged = None

    def __init__(self, prepared: Prepared, indices: Sequence[int] | None = None) -> None:
        """`indices`: of the operands' gradients among those of the step; None: they are all."""
        self.prepared, self._indices = prepared, indices

    @property
    def works(self) -> list[Work]:
        """Implement `Task`."""
        return self.prepared.works

    @property
    def buckets(self) -> list[Bucket]:
        """Implement `Task`."""
        return [work.bucket for work in self.works]

    def facts(self, team: object) -> list[tuple[str, str]]:
        """Implement `Task`: nothing is exchanged."""
        return []

    def reserve(self, workspace: Workspace) -> None:
        """Implement `Task`."""
        for work in self.works:
            workspace.reserve(work.device, work.bucket.workspace_bytes)
        for _, _, copy in self.prepared.grad_copies:
            workspace.keep(copy.device, [copy])
        for _, copy in self.prepared.copies:
            workspace.keep(copy.device, [copy])

    def warm_up(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
        """Implement `Task`."""
        prepared = self.prepared
        check_uncaptured(self.works, scalars)
        for work in self.works:
            _check_range(work, scalars)
        seen = [*self._own(grads), *(copy for _, _, copy in prepared.grad_copies)]
        # What `signature` does not have, and a kernel may be another for.
        on_host = options.on_host(scalars.lr), options.on_host(scalars.weight_decay)
        kind = scalars.nesterov, scalars.dampened, *on_host, *(i for i, g in enumerate(seen) if g.data_ptr() % 16)
        kind = scalars.cautious, *workspace.addresses(), *kind
        if kind in prepared.rehearsed.get(memory.mark(), ()):
            return
        with memory.rehearsal():
            self._run_plain(seen, scalars)
        for work in self.works:
            if (rehearsal := backends.get(work.bucket.backend).rehearsal()) is not None:
                with rehearsal:
                    _step(work, seen, workspace, scalars, rehearsing=True)
        prepared.rehearsed.setdefault(memory.mark(), set()).add(kind)

    def run(self, grads: Sequence[Tensor], scalars: Scalars, workspace: Workspace) -> None:
        """Implement `Task`."""
        prepared, own = self.prepared, self._own(grads)
        with interrupts.held():
            own = [*own, *(copy.copy_(at.of(own[index])) for index, at, copy in prepared.grad_copies)]
            for target, copy in prepared.copies:
                copy.copy_(target)
            self._run_plain(own, scalars)
            for work in prepared.works:
                _step(work, own, workspace, scalars)
            for target, copy in prepared.copies:
                target.copy_(copy)

    def _own(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return grads if self._indices is None else [grads[i] for i in self._indices]

    def _run_plain(self, grads: Sequence[Tensor], scalars: Scalars) -> None:
        for plain in self.prepared.plain:
            g = grads[plain.gradient]
            _plain_step(plain, g if plain.at is None else plain.at.of(g), scalars)
