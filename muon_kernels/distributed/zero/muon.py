"""Muon on flat slices: whole matrices are assembled where slice boundaries divide them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ...coefficients import NS_STEPS, resolve
from ...layout import split_shape
from ...options import OPTIONS, check_options, plain, settle, settled_checkpoint
from ...scaling import lr_ratio
from ...split import pieces
from ...step.options import Coefficients, schedule_for, splits, transposes
from ...step.orthogonalize import orthogonalize, spectral_power
from ...step.plan import plan_for_shapes
from ...tensors import check_matrices
from ..collectives import Pending, on_all
from .flat import Flat, Matrix, lay_out, length, meet
from .optimizer import Half, ZeroOptimizer, group_of

_MOMENTUM = "momentum_buffer"


class ZeroMuon(ZeroOptimizer):
    r"""`Muon` for replicated parameters with sharded state: algorithm 1 of arXiv 2502.16982, ZeRO-1.

    The formulas are `Muon`'s, but the direction is rounded to bf16 before its norm is taken, unless `power` is 1.
    Gradients are each rank's own. The step averages them, so DistributedDataParallel should not: use its `no_sync`, or
    do without it. Gradients are only read. After a step all ranks have the same parameters.

    Parameters of another dtype than fp32 have fp32 master copies, which are what steps update. These are made with the
    optimizer, so load a model's weights before. All other state is made then, too. It consists of one-dimensional
    DTensors in the state of each group's first parameter, `momentum_buffer` and maybe `master_param`, which
    torch.distributed.checkpoint saves and loads for any number of ranks.

    State lies matrix by matrix, as `split` divides parameters. A checkpoint has this layout, and one with another
    layout raises. So do steps after a change of `split` or `flatten` that would move elements.

    Args:
        params: parameters with at least two dimensions, or groups of them, the same on all ranks. Those of a group are
            of one dtype and on one device.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, dampened, flatten, split,
            transposed, ns_algorithm, backend, max_workspace_bytes, maximize, power: see `Muon`; groups may differ in
            them.
        process_group: the ranks; None for all.

    Raises:
        ValueError, TypeError: an argument that cannot be used, with what was expected.
        RuntimeError: another rank refuses its arguments.
    """

    _marks = "ns_coefficients"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int | None = NS_STEPS,
        adjust_lr_fn: str | Callable[[int, int], float] | None = None,
        *,
        dampened: bool = True,
        flatten: bool | None = None,
        split: str | Mapping[str, str] | None = None,
        transposed: bool | Sequence[str] = False,
        ns_algorithm: str = "auto",
        backend: str = "auto",
        max_workspace_bytes: int | None = None,
        maximize: bool = False,
        power: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Check everything and make the state."""
        group = group_of(process_group)
        given: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "dampened": dampened,
            "flatten": flatten,
            "split": split,
            "transposed": transposed,
            "ns_algorithm": ns_algorithm,
            "backend": backend,
            "max_workspace_bytes": max_workspace_bytes,
            "maximize": maximize,
            "power": power,
        }
        defaults = on_all(group, lambda: _settled(given))
        self.half = MuonHalf(defaults, group)
        super().__init__(params, defaults, group)

    def _half(self, group: Mapping[str, Any]) -> Half:
        if group.get("use_muon", True) is not True:
            raise ValueError(
                f"use_muon of a group of ZeroMuon should be True but is: {group['use_muon']!r}; give groups with "
                "use_muon=False to ZeroMuonAdamW"
            )
        return self.half


def _settled(options: dict[str, Any]) -> dict[str, Any]:
    """Return options in plain values, which a checkpoint can hold."""
    if options["ns_steps"] is NS_STEPS:
        options["ns_steps"] = len(resolve(plain(options["ns_coefficients"]), NS_STEPS).triples)
    settle(options, options)
    return options


class MuonHalf(Half):
    """Momentum orthogonalized by Newton-Schulz, on flat slices."""

    def settle(self, group: dict[str, Any]) -> None:
        """Replace options of a group by plain values."""
        settle(group, self.defaults)

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError unless a group, settled, has options and parameters that can be stepped."""
        if other := sorted(OPTIONS.keys() & group.keys() - self.defaults.keys()):
            raise ValueError(f"a group has {other[0]!r}, an option of Muon that ZeroMuon does not have; leave it out")
        check_options({name: group[name] for name in self.defaults if name in group})
        largest = torch.finfo(torch.float32).max
        shapes = []
        for p, split, transposed in zip(group["params"], *_of_parameters(group), strict=True):
            check_matrices("parameter", p)
            for piece in pieces(tuple(p.shape), group["flatten"], split):
                count, rows, cols = split_shape(tuple(p.shape), group["flatten"], piece)
                shapes.append((rows, cols, count))
                rate = float(group["lr"]) * _ratio(group, (rows, cols), transposed)
                if rate > largest:
                    raise ValueError(f"lr times adjust_lr_fn's factor should be at most {largest} but is: {rate}")
        if group["params"]:
            plan_for_shapes(
                shapes,
                schedule=schedule_for(group["ns_coefficients"], group["ns_steps"], group["power"]),
                device=group["params"][0].device,
                dtype=torch.bfloat16,
                backend=group["backend"],
                ns_algorithm=group["ns_algorithm"],
                max_workspace_bytes=group["max_workspace_bytes"],
            )

    def flat(self, group: Mapping[str, Any], ranks: int) -> Flat:
        """Return the layout of a group's parameters; raise ValueError if there is none with its options."""
        shapes = tuple(tuple(p.shape) for p in group["params"])
        return lay_out(shapes, ranks, _of_parameters(group)[0], group["flatten"])

    def sliced(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the keys of the state that each rank keeps its slice of."""
        return (_MOMENTUM,)

    def fitted(self, saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Return a group of a checkpoint in plain values, see `Half`."""
        return super().fitted(settled_checkpoint([saved], [own], self.defaults)[0], own)

    def bytes_sent(self, group: Mapping[str, Any], flat: Flat) -> int:
        """Bytes that this rank sends in a step beside gradients and parameters: what others need of its directions."""
        if group["power"] == 1:
            return 0
        rank, others = self.ranks.rank(), [r for r in range(self.ranks.size()) if r != self.ranks.rank()]
        return 2 * sum(length(meet(flat.needed[r], flat.slices[rank])) for r in others)

    def step(
        self,
        group: dict[str, Any],
        flat: Flat,
        state: Mapping[str, Tensor],
        present: Sequence[bool],
        gradient: Tensor,
        updated: Tensor,
    ) -> None:
        """Update this rank's slice of a group, see `Half`; directions take the place of `gradient`."""
        rank = self.ranks.rank()
        own = flat.slices[rank]
        momentum, mu = state[_MOMENTUM], group["momentum"]
        for run, _ in flat.runs(rank, [there or None for there in present]):
            g, buffer = gradient[run], momentum[run]
            if group["dampened"]:
                buffer.lerp_(g, 1 - mu)
            else:
                buffer.mul_(mu).add_(g)
            if not group["nesterov"]:
                g.copy_(buffer)
            elif group["dampened"]:
                g.lerp_(buffer, mu)
            else:
                g.add_(buffer, alpha=mu)

        mine = [m for m in flat.matrices if present[m.param] and length(meet(m.at, own))]
        results = None if group["power"] == 1 else self._orthogonalized(group, flat, mine, gradient.bfloat16())
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        transposed = _of_parameters(group)[1]
        for i, m in enumerate(mine):
            begin, end = meet(m.at, own)
            here = slice(begin - own[0], end - own[0])
            update = gradient[here] if results is None else results[i].reshape(-1)[begin - m.at[0] : end - m.at[0]]
            ratio = _ratio(group, m.shape, transposed[m.param])
            updated[here].mul_(1 - lr * weight_decay).add_(update, alpha=-lr * ratio)

    def _orthogonalized(
        self, group: dict[str, Any], flat: Flat, mine: Sequence[Matrix], direction: Tensor
    ) -> list[Tensor]:
        """Return the results of `mine`, the matrices of which this rank's slice has elements.

        The matrices are assembled from all ranks' slices of the directions.
        """
        rank = self.ranks.rank()
        own, needed = flat.slices[rank], flat.needed[rank]
        to_send = [meet(other, own) for other in flat.needed]
        sent = torch.cat([direction[begin - own[0] : end - own[0]] for begin, end in to_send])
        whole = torch.empty(length(needed), dtype=torch.bfloat16, device=direction.device)
        Pending(
            "gathering matrices",
            self.ranks,
            lambda: dist.all_to_all_single(
                whole,
                sent,
                [length(meet(needed, other)) for other in flat.slices],
                [length(at) for at in to_send],
                group=self.ranks,
                async_op=True,
            ),
        ).wait()
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, m in enumerate(mine):
            by_shape.setdefault(m.shape, []).append(i)
        results = [whole] * len(mine)
        for shape, indices in by_shape.items():
            matrices = [whole[mine[i].at[0] - needed[0] : mine[i].at[1] - needed[0]].view(shape) for i in indices]
            for i, result in zip(indices, _powers(group, torch.stack(matrices)), strict=True):
                results[i] = result
        return results


Named = str | tuple[tuple[str, str], ...] | None


@lru_cache(maxsize=256)
def _found(
    count: int, names: tuple[str, ...] | None, split: Named, transposed: bool | tuple[str, ...]
) -> tuple[tuple[str | None, ...], tuple[bool, ...]]:
    """Return what `_of_parameters` does, for hashable values: matching names takes longer than a step on the host."""
    group: dict[str, Any] = {"params": range(count), "transposed": transposed}
    group["split"] = dict(split) if isinstance(split, tuple) else split
    if names is not None:
        group["param_names"] = names
    return tuple(cut for _, cut in splits(group)), tuple(transposes(group))


def _of_parameters(group: Mapping[str, Any]) -> tuple[tuple[str | None, ...], tuple[bool, ...]]:
    """Return of each parameter of a group its split, and whether it is stored as (inputs, outputs)."""
    names, split, transposed = group.get("param_names"), group["split"], group["transposed"]
    return _found(
        len(group["params"]),
        None if names is None else tuple(names),
        tuple(split.items()) if isinstance(split, Mapping) else split,
        transposed if isinstance(transposed, bool) else tuple(transposed),
    )


def _ratio(group: Mapping[str, Any], shape: tuple[int, int], transposed: bool) -> float:
    """Return the factor of the learning rate for a matrix of this shape."""
    return lr_ratio(group["adjust_lr_fn"], *(reversed(shape) if transposed else shape))


def _powers(group: Mapping[str, Any], matrices: Tensor) -> Tensor:
    """Return U Σ^p Vᵀ of every matrix of a stack, p the `power` of the group, below 1."""
    how = {key: group[key] for key in ("ns_algorithm", "backend", "max_workspace_bytes")}
    if group["power"]:
        return spectral_power(matrices, group["power"], **how)
    return orthogonalize(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"], **how)
