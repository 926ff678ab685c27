"""Distributed Muon, algorithm 1 of "Muon is Scalable for LLM Training" (arXiv 2502.16982): ZeRO-1 on a flat buffer.

All parameters of a group follow one another in a flat buffer. Each rank keeps the momentum, and the fp32 master copy,
of an equal slice of it, wherever that begins and ends. In a step

    gradients are reduced and scattered in fp32        4 bytes an element to send
    the slices' momenta are updated
    matrices are gathered in bf16                      2 bytes an element of those that a slice boundary divides
    whole matrices go through Newton-Schulz, and all but the slice of the result is dropped
    the slices of the parameters are updated
    parameters are gathered                            2 or 4 bytes an element

each times (k-1)/k for k ranks. The paper gathers all matrices on every rank. Here a rank gathers only those of which
its slice has elements, so that the others are sent nowhere and orthogonalized once. `Muon`, in contrast, sends no
gradients, which have been averaged before it sees them, and keeps whole momenta.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..checkpoint import check_checkpoint
from ..closures import ClosureOptimizer
from ..coefficients import NS_STEPS, resolve
from ..layout import split_shape
from ..options import check_keys, check_options, plain, settle, settled_checkpoint
from ..scaling import lr_ratio
from ..step.options import Coefficients
from ..step.orthogonalize import orthogonalize
from ..step.plan import plan_for_shapes
from ..tensors import check_dense, check_disjoint, check_like, check_matrices, is_dtensor, local
from . import consensus
from .collectives import Failed, Pending, gather
from .flat import Flat, Matrix, length, meet
from .placement import replicated, team_of

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_MASTER, _MOMENTUM = "master_param", "momentum_buffer"


class ZeroMuon(ClosureOptimizer):
    r"""`Muon` for replicated parameters with sharded state: algorithm 1 of arXiv 2502.16982, ZeRO-1.

    The formulas are `Muon`'s, but the direction is rounded to bf16 before its norm is taken. Gradients are each rank's
    own. The step averages them, so DistributedDataParallel should not: use its `no_sync`, or do without it. Gradients
    are only read. After a step all ranks have the same parameters.

    Parameters of another dtype than fp32 have fp32 master copies, which are what steps update. These are made with the
    optimizer, so load a model's weights before. All other state is made then, too. It consists of one-dimensional
    DTensors in the state of each group's first parameter, `momentum_buffer` and maybe `master_param`, which
    torch.distributed.checkpoint saves and loads for any number of ranks.

    Args:
        params: parameters with at least two dimensions, or groups of them, the same on all ranks. Those of a group are
            of one dtype and on one device.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, dampened, flatten,
            ns_algorithm, backend, max_workspace_bytes, maximize: see `Muon`; groups may differ in them.
        process_group: the ranks; None for all.

    Raises:
        ValueError, TypeError: an argument that cannot be used, with what was expected.
    """

    # Has torch.amp.GradScaler leave unscaling, and leaving out a step, to `step` (attributes grad_scale and found_inf):
    # gradients are each rank's own, and all ranks have to leave out the same steps.
    _step_supports_amp_scaling = True

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
        ns_algorithm: str = "auto",
        backend: str = "auto",
        max_workspace_bytes: int | None = None,
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Check everything and make the state."""
        group = process_group if process_group is not None else dist.group.WORLD
        if group is None:
            raise ValueError("process_group should be one, or torch.distributed initialized before, but is: None")
        self._team = team_of(group)
        self._group: dist.ProcessGroup = group
        self._flats: list[Flat] = []
        self._steps = 0
        if ns_steps is NS_STEPS:  # a checkpoint must hold a plain number
            ns_steps = len(resolve(plain(ns_coefficients), ns_steps).triples)
        defaults: dict[str, Any] = {
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
            "ns_algorithm": ns_algorithm,
            "backend": backend,
            "max_workspace_bytes": max_workspace_bytes,
            "maximize": maximize,
        }
        settle(defaults, defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state; on error the optimizer is unchanged.

        Args:
            param_group: a dict with `params` and options that differ from the defaults. All ranks have to add it.

        Raises:
            ValueError, TypeError: an option or a parameter that cannot be used, or ranks that differ in them.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        params: list[Tensor] = group["params"]
        try:
            check_keys(group, self.defaults)
            settle(group, self.defaults)
            check_options({name: group[name] for name in self.defaults if name in group})
            for p in params:
                check_matrices("parameter", p)
                if (p.dtype, p.device) != (params[0].dtype, params[0].device):
                    raise ValueError(
                        f"parameters of a group should be of one dtype and on one device but are {params[0].dtype} on "
                        f"{params[0].device} and {p.dtype} on {p.device}; make groups of them"
                    )
            check_disjoint([("parameter", p) for other in self.param_groups for p in other["params"]])
            if params:
                _check_plan(params, group)
            consensus.check_alike({p: replicated(self._team, p.shape, 0) for p in params}, group)
        except Exception:
            del self.param_groups[before:]
            raise
        flat = Flat(params, group["flatten"], self._group.size())
        self._flats.append(flat)
        if not params:
            return
        own = flat.slices[self._group.rank()]
        zeros = torch.zeros(length(own), dtype=torch.float32, device=params[0].device)
        self.state[params[0]][_MOMENTUM] = self._distributed(zeros, flat)
        if params[0].dtype != torch.float32:
            master = self._slice(params, flat)
            self.state[params[0]][_MASTER] = self._distributed(master, flat)

    def _distributed(self, own: Tensor, flat: Flat) -> Tensor:
        """Return a DTensor of which this rank's slice is `own`."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = DeviceMesh.from_group(self._group, own.device.type)
        size = torch.Size([flat.elements])
        return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=size, stride=(1,))

    def _slice(self, params: Sequence[Tensor], flat: Flat) -> Tensor:
        """Return a copy, in fp32, of what this rank's slice has of the parameters."""
        own = flat.slices[self._group.rank()]
        found = torch.empty(length(own), dtype=torch.float32, device=params[0].device)
        for p, start in zip(params, flat.starts, strict=False):
            begin, end = meet(own, (start, start + p.numel()))
            found[begin - own[0] : end - own[0]].copy_(p.reshape(-1)[begin - start : end - start])
        return found

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends in a step if every parameter has a gradient, reductions counted as in a ring."""
        rank, ranks = self._group.rank(), self._group.size()
        total = 0
        for flat, group in zip(self._flats, self.param_groups, strict=True):
            if group["params"]:
                whole = sum(length(meet(flat.needed[r], flat.slices[rank])) for r in range(ranks) if r != rank)
                total += 2 * whole + (ranks - 1) * flat.share * (4 + group["params"][0].itemsize)
        return total

    def _update(self) -> None:
        """Average gradients over ranks and step every parameter that has one on any rank; all ranks call it."""
        everything = [p for group in self.param_groups for p in group["params"]]
        # torch.amp.GradScaler sets these for the duration of a step.
        agreed = consensus.agree({self._team: everything}, found_inf=getattr(self, "found_inf", None))
        if agreed.found_inf:
            return
        scale: Tensor | None = getattr(self, "grad_scale", None)
        grads = []
        ratios = []
        for group, flat in zip(self.param_groups, self._flats, strict=True):
            settle(group, self.defaults)
            check_options({name: group[name] for name in self.defaults if name in group})
            shapes = dict.fromkeys(m.shape for m in flat.matrices)
            ratios.append({shape: lr_ratio(group["adjust_lr_fn"], *shape) for shape in shapes})
            grads.append([agreed.grad(p) for p in group["params"]])
            for p, g in zip(group["params"], grads[-1], strict=True):
                if g is not None:
                    check_dense("gradient", g)
                    check_like("gradient", g, p)
        self._steps += 1
        grad_scale = 1.0 if scale is None else 1.0 / float(scale)
        for group, flat, found, ratio in zip(self.param_groups, self._flats, grads, ratios, strict=True):
            if any(g is not None for g in found):
                try:
                    self._step(group, flat, found, ratio, -grad_scale if group["maximize"] else grad_scale)
                except Failed as error:
                    raise RuntimeError(
                        f"step {self._steps} of ZeroMuon is incomplete, momenta are updated and parameters may be: "
                        f"{error}; go on from the last checkpoint"
                    ) from error

    def _step(
        self,
        group: dict[str, Any],
        flat: Flat,
        grads: Sequence[Tensor | None],
        ratios: Mapping[tuple[int, int], float],
        grad_scale: float,
    ) -> None:
        params: list[Tensor] = group["params"]
        rank, ranks, device = self._group.rank(), self._group.size(), params[0].device
        state = self.state[params[0]]
        own = flat.slices[rank]
        mine = [m for m in flat.matrices if grads[m.param] is not None and length(meet(m.at, own))]

        def of(slice_: Tensor, m: Matrix) -> Tensor:
            begin, end = meet(m.at, own)
            return slice_[begin - own[0] : end - own[0]]

        gradient = self._averaged(flat, grads, device).mul_(grad_scale)

        momentum, mu = local(state[_MOMENTUM]), group["momentum"]
        direction = torch.zeros(flat.share, dtype=torch.bfloat16, device=device)
        for m in mine:
            g, buffer = of(gradient, m), of(momentum, m)
            if group["dampened"]:
                buffer.lerp_(g, 1 - mu)
                of(direction, m).copy_(g.lerp(buffer, mu) if group["nesterov"] else buffer)
            else:
                buffer.mul_(mu).add_(g)
                of(direction, m).copy_(g.add(buffer, alpha=mu) if group["nesterov"] else buffer)

        results = self._orthogonalized(group, flat, mine, direction)
        updated = local(state[_MASTER]) if _MASTER in state else self._slice(params, flat)
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        for m, result in zip(mine, results, strict=True):
            begin, end = meet(m.at, own)
            update = result.reshape(-1)[begin - m.at[0] : end - m.at[0]]
            of(updated, m).mul_(1 - lr * weight_decay).add_(update, alpha=-lr * ratios[m.shape])

        share = torch.zeros(flat.share, dtype=params[0].dtype, device=device)
        share[: updated.numel()].copy_(updated)
        gathered = torch.empty(ranks * flat.share, dtype=params[0].dtype, device=device)
        gather(gathered, share, self._team, "all ranks").wait()
        for p, grad, start in zip(params, grads, flat.starts, strict=False):
            if grad is not None:
                p.copy_(gathered[start : start + p.numel()].view(p.shape))

    def _averaged(self, flat: Flat, grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Return this rank's slice of the mean gradients in fp32, with room for the longest slice."""
        ranks = self._group.size()
        everything = torch.empty(ranks * flat.share, dtype=torch.float32, device=device)
        flat.fill(everything, grads)
        everything[flat.elements :].zero_()
        gradient = torch.empty(flat.share, dtype=torch.float32, device=device)
        Pending(
            "reducing gradients",
            lambda: _reduce_scatter(gradient, everything, group=self._group, async_op=True),
        ).wait()
        return gradient.div_(ranks)

    def _orthogonalized(
        self, group: dict[str, Any], flat: Flat, mine: Sequence[Matrix], direction: Tensor
    ) -> list[Tensor]:
        """Return the results of `mine`, the matrices of which this rank's slice has elements.

        The matrices are assembled from all ranks' slices of the directions.
        """
        rank = self._group.rank()
        own, needed = flat.slices[rank], flat.needed[rank]
        to_send = [meet(other, own) for other in flat.needed]
        sent = torch.cat([direction[begin - own[0] : end - own[0]] for begin, end in to_send])
        whole = torch.empty(length(needed), dtype=torch.bfloat16, device=direction.device)
        Pending(
            "gathering matrices",
            lambda: dist.all_to_all_single(
                whole,
                sent,
                [length(meet(needed, other)) for other in flat.slices],
                [length(at) for at in to_send],
                group=self._group,
                async_op=True,
            ),
        ).wait()
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, m in enumerate(mine):
            by_shape.setdefault(m.shape, []).append(i)
        results = [whole] * len(mine)
        for shape, indices in by_shape.items():
            matrices = [whole[mine[i].at[0] - needed[0] : mine[i].at[1] - needed[0]].view(shape) for i in indices]
            orthogonal = orthogonalize(
                torch.stack(matrices),
                group["ns_coefficients"],
                group["ns_steps"],
                group["eps"],
                ns_algorithm=group["ns_algorithm"],
                backend=group["backend"],
                max_workspace_bytes=group["max_workspace_bytes"],
            )
            for i, result in zip(indices, orthogonal, strict=True):
                results[i] = result
        return results

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, in plain values: this rank's slices as DTensors."""
        for group in self.param_groups:
            settle(group, self.defaults)
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned for the same groups and number of ranks.

        For another number of ranks, load the checkpoint into what `state_dict` returns here by
        torch.distributed.checkpoint first. Slices may also be given as the whole flat buffers.

        Args:
            state_dict: a checkpoint of this class.

        Raises:
            ValueError, TypeError: groups, sizes or options do not fit; nothing has been changed then.
        """
        check_checkpoint(state_dict, self.param_groups, "ZeroMuon", "ns_coefficients")
        found: list[tuple[Tensor, Tensor]] = []
        groups = settled_checkpoint(state_dict["param_groups"], self.param_groups, self.defaults)
        if len(groups) == len(self.param_groups):  # else torch has a sentence for it
            options = [{key: own[key] for key in self.defaults if key in own} for own in self.param_groups]
            groups = [{**own, **group} for own, group in zip(options, groups, strict=True)]
        for group in groups:
            whole = {**self.defaults, **group}
            check_options({name: whole[name] for name in self.defaults})
        for saved, group, flat in zip(groups, self.param_groups, self._flats, strict=False):
            if not group["params"] or len(saved["params"]) != len(group["params"]):
                continue  # torch has a sentence for it
            _check_plan(group["params"], saved)
            values = state_dict["state"].get(saved["params"][0], {})
            for key, own in self.state[group["params"][0]].items():
                if key not in values:
                    raise ValueError(f"a checkpoint of ZeroMuon should have {key} but has: {sorted(values)}")
                found.append((local(own), _own_slice(key, values[key], flat, self._group.rank())))
        kept = dict(self.state)
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        self.state.update(kept)
        for own, value in found:
            own.copy_(value)


def _own_slice(key: str, value: Any, flat: Flat, rank: int) -> Tensor:
    """Return this rank's slice of a value of a checkpoint, which is a whole buffer or a DTensor."""
    own = flat.slices[rank]
    expected = f"{key} should be of {flat.elements} elements, of which rank {rank} has {length(own)}"
    if not isinstance(value, Tensor) or tuple(value.shape) != (flat.elements,):
        raise ValueError(f"{expected}, but is: {tuple(value.shape) if isinstance(value, Tensor) else value!r}")
    if not is_dtensor(value):
        return value[own[0] : own[1]]
    if local(value).numel() != length(own):
        raise ValueError(
            f"{expected}, but it has {local(value).numel()}: saved by another number of ranks; load it by "
            "torch.distributed.checkpoint, which cuts it anew"
        )
    return local(value)


def _check_plan(params: Sequence[Tensor], group: dict[str, Any]) -> None:
    """Raise what orthogonalizing such matrices would raise."""
    shapes = [split_shape(tuple(p.shape), group["flatten"]) for p in params]
    plan_for_shapes(
        [(rows, cols, count) for count, rows, cols in shapes],
        schedule=resolve(group["ns_coefficients"], group["ns_steps"]),
        device=params[0].device,
        dtype=torch.bfloat16,
        backend=group["backend"],
        ns_algorithm=group["ns_algorithm"],
        max_workspace_bytes=group["max_workspace_bytes"],
    )
