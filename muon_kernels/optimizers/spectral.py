"""The optimizers of "Delving into Muon and Beyond" (arXiv 2602.04669): powers of the spectrum of updates.

The updates are those of SGD and of Adam. Names have the update and the power: no letter is p = 1, S is 1/2, Q is 1/4
and Z is 0. mSGDZ is Muon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from .. import interrupts, options
from ..adamw_options import check_numbers
from ..checkpoint import check_checkpoint
from ..closures import ClosureOptimizer
from ..distributed.agreement import Facts, options_of_groups
from ..distributed.exchange import divide
from ..distributed.ranks import Ranks
from ..powers import check_power
from ..step.cache import TaskCache
from ..step.operands import Operand
from ..step.options import Coefficients, StepOptions, splits, transposes
from ..step.plan import Plan
from ..step.run import plan_of
from ..step.work import Scalars, Task
from ..step.workspace import Workspace
from ..tensors import check_dense, check_like, local
from .adamw_checks import check_adamw_state, check_step_size, new_adamw_state
from .muon import Muon
from .muon_checks import cost_of
from .state import check_copied, consolidate, forget_others, whole


class SpectralMomentum(Muon):
    r"""SGD with momentum whose update U Σ Vᵀ becomes U Σ^p Vᵀ: `Muon` with a `power`, and the paper's defaults.

        M ← μ M + G,   W ← (1 - lr·weight_decay) W - lr·ratio·U Σ^p Vᵀ,  M = U Σ Vᵀ

    p = 1 is torch.optim.SGD(momentum=μ), to the bit. Updates scale with the gradient to the p, so the best learning
    rate depends on p.

    Source: arXiv 2602.04669, with the settings of github.com/Ocram7/BeyondMuon.

    Args:
        params: as `Muon`'s.
        lr: learning rate.
        power: p, in [0, 1].
        weight_decay, momentum, nesterov, dampened: as `Muon`'s.
        ns_steps: number of steps for power 0, where the iteration is Muon's.
        adjust_lr_fn: as `Muon`'s, but None is the paper's: √max(1, A/B) for power 0, and 1 for others.
        muon_options: other keywords of `Muon`.

    Raises:
        ValueError, TypeError: an argument that cannot be used, with what was expected.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        power: float = 0.5,
        weight_decay: float | Tensor = 0.0,
        momentum: float = 0.9,
        nesterov: bool = False,
        *,
        dampened: bool = False,
        ns_steps: int | None = 15,
        adjust_lr_fn: str | Callable[[int, int], float] | None = None,
        **muon_options: Any,
    ) -> None:
        """Check everything. Allocate nothing yet: momentum buffers come with the first gradients."""
        if adjust_lr_fn is None and check_power(power):
            adjust_lr_fn = "none"
        super().__init__(
            params,
            lr,
            weight_decay,
            momentum,
            nesterov,
            dampened=dampened,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            power=power,
            **muon_options,
        )


class SpectralAdam(ClosureOptimizer):
    r"""Adam whose update R = m̂ / (√v̂ + eps) = U Σ Vᵀ becomes U Σ^p Vᵀ for matrices; other parameters get R itself.

        W ← (1 - lr·weight_decay) W - lr·ratio·U Σ^p Vᵀ

    p = 1 is torch.optim.AdamW, to the bit, and the state is AdamW's: `exp_avg`, `exp_avg_sq`, `step`. Moments and R are
    computed by a step of torch's AdamW on a parameter that is zero. That takes memory of a parameter's size while it
    runs, and R takes as much as all parameters while a step runs.

    Source: arXiv 2602.04669, with the settings of github.com/Ocram7/BeyondMuon.

    Args:
        params: parameters of any dimensions, dense and real, or groups of them. Those of two or more dimensions are
            matrices, as for `Muon`.
        lr: learning rate.
        power: p, in [0, 1].
        betas: decay rates of the two moments.
        eps: added to the divisor √v̂.
        weight_decay: decoupled, multiplied by `lr`.
        ns_coefficients, ns_steps: for power 0, as `Muon`'s.
        adjust_lr_fn: as `Muon`'s, but None is the paper's: √max(1, A/B) for power 0, and 1 for others.
        flatten, split, transposed, ns_algorithm, backend, max_workspace_bytes: as `Muon`'s.
        maximize: whether to ascend.
        process_group: as `Muon`'s: each rank steps a share of the matrices and keeps only the moments of that. Every
            rank steps all other parameters.

    Raises:
        ValueError, TypeError: an argument that cannot be used, with what was expected.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        power: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        ns_coefficients: Coefficients = "keller",
        ns_steps: int | None = 15,
        adjust_lr_fn: str | Callable[[int, int], float] | None = None,
        flatten: bool | None = None,
        split: str | Mapping[str, str] | None = None,
        transposed: bool | Sequence[str] = False,
        ns_algorithm: str = "auto",
        backend: str = "auto",
        max_workspace_bytes: int | None = None,
        maximize: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Check everything. Allocate nothing yet: moments come with the first gradients."""
        if adjust_lr_fn is None and check_power(power):
            adjust_lr_fn = "none"
        defaults = {
            "lr": lr,
            "power": power,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "flatten": flatten,
            "split": split,
            "transposed": transposed,
            "ns_algorithm": ns_algorithm,
            "backend": backend,
            "max_workspace_bytes": max_workspace_bytes,
            "maximize": maximize,
        }
        options.settle(defaults, defaults)
        _check_options(defaults, defaults)
        self._workspace, self._tasks = Workspace(), TaskCache()
        self._ranks = Ranks(process_group)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options and parameters; on error the optimizer is unchanged.

        Args:
            param_group: a dict with `params` and options that differ from the defaults.

        Raises:
            ValueError, TypeError: an option or a parameter that cannot be used.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            options.check_keys(group, self.defaults)
            options.settle(group, self.defaults)
            _check_options(group, self.defaults)
            for p in group["params"]:
                check_dense("parameter", local(p))
            matrices = [p for p in group["params"] if _iterated(p, group)]
            costs = [cost_of(p, split, group) for p, split in splits(group) if _iterated(p, group)]
            self._ranks.add({**group, "params": matrices, "param_names": _names(group, matrices)}, costs)
            self._prepare(group, matrices, [local(p) for p in matrices])
        except Exception:
            del self.param_groups[before:]
            raise

    def _prepare(self, group: dict[str, Any], params: list[Tensor], updates: list[Tensor]) -> list[Task]:
        placements = [self._ranks.placements.get(p) for p in params]
        own = list(map(local, params))

        def make() -> list[Task]:
            split_of = dict(splits(group))
            turned = dict(zip(group["params"], transposes(group), strict=True))
            operands = [
                Operand(here, update, split=split_of[p], transposed=turned[p])
                for p, here, update in zip(params, own, updates, strict=True)
            ]
            return divide(operands, placements, StepOptions.of(own_options, momentum=False), strategy="owner")

        own_options = {key: group[key] for key in self.defaults if key in group}  # other keys are the user's own
        settled = {key: group[key] for key in options.PREPARED_OPTIONS if key in own_options}
        return self._tasks.get(id(group), own, updates, (), settled, make)

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            options.settle(group, self.defaults)
            _check_options(group, self.defaults)
            self._ranks.check(group)
            for p in group["params"]:
                if (grad := p.grad) is None:
                    continue
                if self.state.get(p):
                    check_adamw_state("", p, self.state[p])
                check_step_size(p, group)
                check_dense("gradient", local(grad))
                check_like("gradient", grad, p)
                if grad.dtype != p.dtype:
                    raise TypeError(f"gradient should be of the parameter's dtype {p.dtype} but is of: {grad.dtype}")

    def _update(self) -> None:
        """Step all groups: look at everything, get everything ready, then write."""

        def prepare(grad_of: Callable[[Tensor], Tensor | None]) -> tuple[_Ready, list[Task]]:
            self._check_gradients()
            # What is kept must be of use outside inference mode too.
            with torch.inference_mode(False), torch.no_grad():
                batches = [self._batch(group, grad_of) for group in self.param_groups]
                for batch in batches:
                    for task in batch.tasks:
                        task.warm_up(batch.updates, batch.scalars, self._workspace)
                new = self._new_state(p for batch in batches for p in batch.grads)
            return _Ready(batches, new), [task for batch in batches for task in batch.tasks]

        def alike(params: Sequence[Tensor]) -> Facts:
            return options_of_groups(self.param_groups, params, self.defaults)

        ready = self._ranks.agree(self.param_groups, prepare, alike)
        # An interrupt is deferred only where this rank is alone: another rank may wait for this one for ever.
        alone = not any(task.together for batch in ready.batches for task in batch.tasks)
        self._ranks.consolidated = None
        with interrupts.held() if alone else nullcontext():
            self._keep(ready.new_state)
            for group, grads, rest, matrices, updates, tasks, scalars in ready.batches:
                self._adamw(group, grads, rest, [local(p) for p in rest], group["lr"], group["weight_decay"])
                # A step of size 1 turns a parameter that is zero into -R.
                own = [(p, u) for p, u in zip(matrices, updates, strict=True) if not self._ranks.elsewhere(p)]
                self._adamw(group, grads, [p for p, _ in own], [update for _, update in own], 1.0, 0.0)
                for task in tasks:
                    task.run(updates, scalars, self._workspace)

    def _batch(self, group: dict[str, Any], grad_of: Callable[[Tensor], Tensor | None]) -> _Batch:
        """Get the step of a group ready, but for its state."""
        found = {p: grad_of(p) for p in group["params"]}
        grads = {p: local(grad) for p, grad in found.items() if grad is not None}
        matrices = [p for p in grads if _iterated(p, group)]
        rest = [p for p in grads if not _iterated(p, group)]
        # Nobody reads the update of a matrix that another rank steps: the parameter stands in its place.
        updates = [p if self._ranks.elsewhere(p) else _zeros(p) for p in matrices]
        tasks = self._prepare(group, matrices, updates)
        for task in tasks:
            task.reserve(self._workspace)
        scalars = Scalars(group["lr"], group["weight_decay"], 0.0, False, True, 0.0, -1.0)
        return _Batch(group, grads, rest, matrices, updates, tasks, scalars)

    def _new_state(self, params: Iterable[Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """Return the state of the parameters that have none, here or on another rank."""
        return {p: new_adamw_state(p) for p in params if not (self._ranks.elsewhere(p) or self.state.get(p))}

    def _keep(self, new: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        for p, state in new.items():
            self.state[p].update(state)

    @torch.no_grad()
    def init_state(self) -> None:
        """Make all state that there will be, as `Muon.init_state` does. Parameters are not changed."""
        with torch.inference_mode(False), torch.no_grad():
            params = (p for group in self.param_groups for p in group["params"] if p.requires_grad)
            self._keep(self._new_state(params))

    def _adamw(
        self,
        group: dict[str, Any],
        grads: Mapping[Tensor, Tensor],
        params: list[Tensor],
        targets: list[Tensor],
        lr: float | Tensor,
        decay: float,
    ) -> None:
        """Step `targets` by torch's AdamW with the gradients and state of `params`; of DTensors, this rank's shards."""
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            targets,
            [grads[p] for p in params],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=decay,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    @torch.no_grad()
    def plan(self) -> Plan:
        """Return what a step does with the matrices if each has a gradient. `print` it for a table."""
        tasks: list[Task] = []
        for group in self.param_groups:
            matrices = [p for p in group["params"] if _iterated(p, group)]
            tasks += self._prepare(group, matrices, [local(p) for p in matrices])
        self._tasks.clear()
        return plan_of(tasks, self.host_seconds)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or a checkpoint. Options that it lacks are as in the constructor."""
        super().__setstate__(state)
        self._workspace, self._tasks = Workspace(), TaskCache()
        if "_ranks" not in self.__dict__:  # a copy
            self._ranks = Ranks()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # which torch puts into the defaults
                    group.setdefault(key, value)
            options.settle(group, self.defaults)
        self._ranks.refresh(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying keep.

        Raises:
            TypeError: with a process_group, which belongs to this process and shares the state with others.
        """
        check_copied(self._ranks)
        state: dict[str, Any] = super().__getstate__()
        return state

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the state that ranks share to one of them; see `Muon.consolidate_state_dict`."""
        consolidate(self.state, self._ranks, to)

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, in plain values; whole also where ranks share it, and then all have to call this."""
        for group in self.param_groups:
            options.settle(group, self.defaults)
        with whole(self.state, self._ranks):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim.AdamW.

        Args:
            state_dict: the checkpoint.

        Raises:
            ValueError, TypeError: it is another optimizer's, or groups, sizes or options do not fit; nothing has been
                changed then.
        """
        check_checkpoint(state_dict, self.param_groups, "SpectralAdam", "betas", _check_saved)
        saved = options.settled_checkpoint(state_dict["param_groups"], self.param_groups, self.defaults)
        if len(saved) == len(self.param_groups):  # else torch raises
            # A checkpoint of torch.optim.AdamW lacks options: they stay as the group has them.
            kept = [{key: value for key, value in own.items() if key in self.defaults} for own in self.param_groups]
            saved = [{**own, **group} for own, group in zip(kept, saved, strict=True)]
        for group in saved:
            _check_options({**self.defaults, **group}, self.defaults)
        super().load_state_dict(deepcopy({**state_dict, "param_groups": saved}))  # torch would share the moments
        forget_others(self.state, self._ranks)
        self._ranks.consolidated = None


class _Batch(NamedTuple):
    """The step of a group.

    Attributes:
        group: the group.
        grads: of all parameters that are stepped.
        rest: what AdamW alone steps.
        matrices: what is iterated; `updates`, of which `tasks` take AdamW's steps, belong to these.
        scalars: the numbers of the tasks.
    """

    group: dict[str, Any]
    grads: dict[Tensor, Tensor]
    rest: list[Tensor]
    matrices: list[Tensor]
    updates: list[Tensor]
    tasks: list[Task]
    scalars: Scalars


class _Ready(NamedTuple):
    """A step when nothing is left to do but to write."""

    batches: list[_Batch]
    new_state: dict[Tensor, dict[str, Tensor]]


def _check_saved(of: str, p: Tensor, state: Mapping[str, Any]) -> None:
    check_adamw_state(of, p, state, saved=True)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(local(p), memory_format=torch.preserve_format)


def _names(group: Mapping[str, Any], params: Iterable[Tensor]) -> list[str]:
    """Return the names of some parameters of a group, none where it has no names."""
    names = dict(zip(group["params"], group.get("param_names", ()), strict=False))
    return [names[p] for p in params if p in names]


def _iterated(p: Tensor, group: dict[str, Any]) -> bool:
    return p.ndim >= 2 and group["power"] != 1


def _check_options(group: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise unless the options of a group can be used, which are `known`; other keys are the user's own."""
    check_numbers(group)
    names = [name for name in known if name in group and name not in ("lr", "weight_decay", "eps")]
    options.check_options({name: group[name] for name in names})
