"""Muon as a torch optimizer: groups, steps, checkpoints. It does no arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from .. import interrupts
from ..checkpoint import STATE, check_checkpoint, check_state
from ..closures import ClosureOptimizer
from ..coefficients import NS_STEPS, resolve
from ..distributed.agreement import Facts, options_of_groups
from ..distributed.collectives import Failed
from ..distributed.ranks import Ranks, check_shared
from ..options import OPTIONS, check_keys, plain, settle
from ..stages import StageOptions
from ..step.cache import TaskCache
from ..step.options import Coefficients, transposes
from ..step.plan import Plan
from ..step.run import plan_of
from ..step.work import Scalars, Task
from ..step.workspace import Workspace
from ..tensors import check_disjoint
from .loading import fitted, with_momenta
from .muon_checks import check_gradients, check_group, check_muon_options, costs_of
from .prepare import ReadyBatch, batches_of, prepared
from .scalars import set_peak_lr
from .stage_options import given_options, with_stage_options
from .state import Writes, check_copied, consolidate, forget_others, whole

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_stage_options
class Muon(ClosureOptimizer):
    r"""Momentum orthogonalized by Newton-Schulz: a drop-in for `torch.optim.Muon`, fused and batched.

    For every matrix W of shape (A, B), with gradient G, momentum buffer M and NS(·) the Newton-Schulz iteration:

        M ← M + (1 - μ)(G - M)                       or, un-dampened, M ← μ M + G
        D = M + (1 - μ)(G - M) if nesterov else M    or, un-dampened, G + μ M
        W ← (1 - lr·weight_decay) W - lr·ratio(A, B)·NS(D)

    Sources: Keller Jordan et al., "Muon" (2024); Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982)
        for the weight decay and "match_rms_adamw".

    Matrices of equal shape are stepped together; `plan()` shows how. Gradients are only read. If a step raises, also
    where memory runs out, parameters and state are as they were before. Ctrl-C waits until the matrices of this process
    are written. After `os.fork` a step in the new process waits forever for threads that only the old one has, unless
    `torch.set_num_threads(1)` was called before the first step.

    It differs from `torch.optim.Muon` where that is at fault: the iteration never overwrites the momentum buffer, the
    norm is taken before rounding to bf16, and the update does not depend on the gradient's scale, from 1e-30 to 1e30
    (see `eps`).

    Args:
        params: parameters with at least two dimensions, or groups of them. Three dimensions are a batch of matrices,
            four or more are a convolution, flattened to (first, all others); `flatten` decides otherwise. Parameters
            may be slices of one tensor but must not share an element.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: multiplied by `lr` itself, not by the adjusted learning rate; see `weight_decay_form`.
        momentum: μ.
        nesterov: whether to look one step ahead.
        ns_coefficients: one (a, b, c), a name in `muon_kernels.COEFFICIENTS`, or a list with one (a, b, c) for each
            step.
        eps: smallest divisor in the normalisation, after an exact scaling of the norm to [1, 2); so it matters for zero
            only.
        ns_steps: number of steps; if not given, 5 or a named set's own number.
        adjust_lr_fn: ratio(A, B). None or "original": √max(1, A/B). "match_rms_adamw": 0.2·√max(A, B), for updates of
            RMS 0.2·lr, which "keller" falls short of by a tenth or more; see `exact_rms`. "spectral": √(A/B), which
            groups hold by torch's name "spectral_unclamped". "none": 1. Or a pure function of (A, B) at the top level
            of a module, whose answers are kept from step to step; groups and checkpoints hold its name, and a
            checkpoint is loaded only where the group has the same function.
        use_addmm: accepted because torch.optim.Muon has it, to fuse products; here they always are.
        dampened: False updates the momentum as Moonlight does, without the factor 1 - μ.
        flatten: True flattens parameters of three dimensions, too; False flattens none.
        split: how to split parameters that hold several matrices, as text from `muon_kernels.split`: one split for all
            parameters of a group, as in `{"params": [...], "split": heads(12)}`, or a dict of splits by name or
            `fnmatch` pattern, for parameters given with names. Each pattern has to match in every group that takes the
            dict. Parts are stepped, and shown by `plan()`, like parameters of their own; the momentum is the whole
            parameter's.
        transposed: whether parameters are stored as (inputs, outputs), as by transformers' Conv1D, in stacks of experts
            (E, in, out) and by ConvTranspose; `adjust_lr_fn` is then applied to (B, A). True for all parameters of a
            group, or a list of names and `fnmatch` patterns, as for `split`. Nothing else depends on it: rows of
            `second_moment="neuron"` and of a `split` are rows as stored.
        ns_algorithm: "standard", "gram", or "auto" for the one with fewer FLOPs.
        backend: "cuda", "triton", "cpu", "eager", or "auto" for the first of these that can step the parameters.
        max_workspace_bytes: cap on the memory beside parameters and state. Larger buckets are stepped in several
            passes. None: 64 MiB for "cpu", 1 GiB for the others, or one matrix's need if that is more.
            What replicas gather of one another takes as much again at most.
        workspace_dtype: dtype of the matrices that are multiplied, or its name, which is what groups hold.
            torch.float16 is several times more accurate than torch.bfloat16 and as fast on a GPU; the "cpu" backend
            does not support it, so "auto" falls back to "eager", which is slower.
        momentum_dtype: dtype of new momentum buffers; None for the gradient's. torch.int8 takes 1.002 bytes an element:
            codes in `momentum_buffer`, and in `momentum_scale` the largest magnitude of every 2048 elements of a
            matrix, see stages/packed.py. Steps compute in fp32. While there is such a momentum, `flatten` and `split`
            should not change. A group may change to torch.int8 or from it: its next step converts the momenta that it
            uses.
        maximize: whether to ascend.
        power: p in [0, 1]: the direction's singular values σ become σ^p instead of 1; see
            `muon_kernels.spectral_power`. Above 0, `ns_coefficients`, `ns_steps` and `eps` are not used, and the update
            scales with the direction^p.
        weight_decay_form: share of W that decays in a step. "decoupled": lr·weight_decay. "independent": weight_decay,
            whatever lr above 0 is. "scheduled": lr·weight_decay·lr/peak_lr, as in AdamC and MuonC (arXiv 2506.02285).
        peak_lr: largest `lr` of the schedule, for "scheduled"; None for the one that the group begins with. The
            `max_lr` that OneCycleLR writes into a group counts instead where it is larger.
        cautious: whether to decay only what the update moves towards zero or leaves as it is (arXiv 2510.12402).
        stochastic_rounding: whether to round parameters, which must be bf16 then, up or down with the probabilities
            that make the mean exact. The same steps, from a checkpoint or not, have the same random bits, on every
            backend and however ranks share parameters; docs/low-precision.md says what they depend on.
        sign_momentum: whether to use NS(sign(D)) instead of NS(D), as AdaMuon (arXiv 2507.11005) does. In fp16
            workspaces an element below 1e-7 of the matrix's norm counts as zero. AdaMuon itself is
            `Muon(params, sign_momentum=True, second_moment="element", dampened=False, adjust_lr_fn="match_rms_adamw")`.
        master_weights: whether to take bf16 parameters for fp32 ones rounded to nearest, whose other 16 bits are
            `mantissa` in the state. Steps are then those of fp32 parameters, to the bit, in 4 bytes an element. A
            parameter that is written between steps keeps its `mantissa`, at most half a unit in its last place; delete
            that from the state to begin at the parameter.
        second_moment: running mean of squares by whose root NS(D) is divided, keeping its norm; None for none. "neuron"
            has a mean of each row, as in NorMuon (arXiv 2510.05491), "element" one of each element, as in AdaMuon. Both
            papers scale as adjust_lr_fn="match_rms_adamw" does. A part of a `split` has rows of its own. With a power
            above 0, updates should be within 1e-18 and 1e18, where their squares are in the range of fp32.
        beta2: β₂ of that mean.
        process_group: the ranks that have the same plain tensors for parameters, and the same gradients, as under
            DistributedDataParallel, so that GradScaler leaves out the same steps on all. Each rank steps a share, and
            only its owner keeps the momentum of a parameter. None: plain tensors are this process's own. DTensors know
            their own ranks.
        strategy: how to orthogonalize matrices of which several ranks hold shards. "owner": one rank gets the others'
            shards. "gram": matrices that are sharded along their longer dimension stay where they are, and Gram
            matrices are summed. "blocks": each rank takes its own shard, and owners the whole matrix every
            `block_period` steps, as in MuonBP (arXiv 2510.16981). See distributed/strategies/.
        block_period: for "blocks"; 1 is "owner".
        block_lr_ratio: for "blocks", factor of `lr` in steps of shards. `adjust_lr_fn` is then applied to the shapes of
            the shards; the paper's update is that of "match_rms_adamw".

    Raises:
        ValueError, TypeError: an argument that cannot be used, with what was expected.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int | None = NS_STEPS,
        adjust_lr_fn: str | Callable[[int, int], float] | None = None,
        use_addmm: bool = False,
        *,
        dampened: bool = True,
        flatten: bool | None = None,
        split: str | Mapping[str, str] | None = None,
        transposed: bool | Sequence[str] = False,
        ns_algorithm: str = "auto",
        backend: str = "auto",
        max_workspace_bytes: int | None = None,
        workspace_dtype: torch.dtype | str = torch.bfloat16,
        momentum_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
        power: float = 0.0,
        weight_decay_form: str = "decoupled",
        peak_lr: float | Tensor | None = None,
        cautious: bool = False,
        stochastic_rounding: bool = False,
        sign_momentum: bool = False,
        master_weights: bool = False,
        second_moment: str | None = None,
        beta2: float = 0.95,
        process_group: ProcessGroup | None = None,
        strategy: str = "owner",
        block_period: int = 5,
        block_lr_ratio: float = 1.0,
        **others: Unpack[StageOptions],
    ) -> None:
        """Check everything. Allocate nothing yet: momentum buffers come with the first gradients."""
        given = given_options(type(self), others) | locals()
        defaults: dict[str, Any] = {name: given[name] for name in OPTIONS}
        if ns_steps is NS_STEPS:  # a checkpoint must hold a plain number
            defaults["ns_steps"] = len(resolve(plain(ns_coefficients), ns_steps).triples)
        settle(defaults, defaults)
        check_muon_options(defaults)
        self._workspace = Workspace()
        self._tasks = TaskCache()
        self._ranks = Ranks(process_group)
        self._steps = 0
        if isinstance(params, nn.Module):
            raise TypeError(
                f"params should be hidden matrices but is a module: {type(params).__name__}; give "
                "muon_kernels.MuonAdamW(muon_kernels.param_groups(model)) all parameters of a model"
            )
        super().__init__(params, defaults)
        check_disjoint([("parameter", p) for group in self.param_groups for p in group["params"]])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options and parameters; on error the optimizer is unchanged.

        Args:
            param_group: a dict with `params` and options that differ from the defaults.

        Raises:
            ValueError, TypeError: an option or a parameter that cannot be used.
        """
        before = len(self.param_groups)
        if "ns_coefficients" in param_group:
            param_group.setdefault("ns_steps", self._steps_of(plain(param_group["ns_coefficients"])))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_keys(group, self.defaults)
            settle(group, self.defaults)
            set_peak_lr(group)
            check_muon_options(group)
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("every parameter of a group should be there once but some are repeated")
            if self._ranks.shares(group["params"]):
                check_shared(group)
            transposes(group)
            costs = costs_of(group)
            check_disjoint([("parameter", p) for p in group["params"]])
            self._ranks.add(group, costs)
        except Exception:
            del self.param_groups[before:]
            raise

    def _steps_of(self, ns_coefficients: Coefficients) -> int:
        """Return the number of steps of a group that gives its own coefficients but no number."""
        try:
            return len(resolve(ns_coefficients, self.defaults["ns_steps"]).triples)
        except ValueError:  # a set or a list of another length
            return len(resolve(ns_coefficients, None).triples)

    def _settle(self) -> None:
        """Replace options by plain values where groups have been edited."""
        for group in self.param_groups:
            settle(group, self.defaults)

    def _batches(self) -> list[tuple[list[dict[str, Any]], Scalars]]:
        """Return the groups that a step does as one, with the numbers that it takes; see `batches_of`."""
        for group in self.param_groups:
            check_group(group, self.defaults, self._ranks)
        return batches_of(self.param_groups, self._ranks)

    def _prepare(
        self, groups: Sequence[dict[str, Any]], grad_of: Callable[[Tensor], Tensor | None]
    ) -> tuple[list[Task], list[Tensor], Writes]:
        """Return the tasks of a step of `groups`, its gradients, and what it would write into the state."""
        return prepared(groups, self.param_groups, grad_of, self.state, self._ranks, self._tasks)

    def _keep(self, writes: Writes) -> None:
        for p, key, tensor in writes:
            if tensor is None:
                self.state[p].pop(key, None)
            else:
                self.state[p][key] = tensor

    def _update(self) -> None:
        """Step all groups: look at everything, get everything ready, then write."""
        self.step_beside(lambda: None, list)

    def step_beside(self, check: Callable[[], object], options: Callable[[], Facts]) -> None:
        """Step all groups beside parameters of another optimizer, which steps these next.

        Args:
            check: raises where the other parameters cannot be stepped; then nothing is stepped, on any rank.
            options: returns the options of their step, which have to be alike on all ranks.
        """
        self._run(self._ready(check, options))

    def shares(self, group: Mapping[str, Any]) -> bool:
        """Whether other ranks may have parameters of a group, too."""
        return self._ranks.shares(group["params"])

    def _ready(self, check: Callable[[], object], others: Callable[[], Facts]) -> Sequence[ReadyBatch]:
        """Get a step ready, on all ranks that step together, and write nothing; see `step_beside`."""
        self._steps += 1

        def prepare(grad_of: Callable[[Tensor], Tensor | None]) -> tuple[list[ReadyBatch], list[Task]]:
            check()
            # State and memory that are made here must be usable outside of inference mode, too.
            with torch.inference_mode(False), torch.no_grad():
                batches = self._batches()
                if self._ranks.teams:
                    check_gradients(self.param_groups)
                ready = [ReadyBatch(groups, numbers, *self._prepare(groups, grad_of)) for groups, numbers in batches]
                for task in (task for batch in ready for task in batch.tasks):
                    task.reserve(self._workspace)
                for batch in ready:
                    for task in batch.tasks:
                        task.warm_up(batch.grads, batch.scalars, self._workspace)
            return ready, [task for batch in ready for task in batch.tasks]

        def options(params: Sequence[Tensor]) -> Facts:
            return [*options_of_groups(self.param_groups, params, [*self.defaults, "step"]), *others()]

        try:
            return self._ranks.agree(self.param_groups, prepare, options)
        except Failed as error:
            raise RuntimeError(
                f"step {self._steps} of Muon did not begin: {error}; every rank has to call step, which GradScaler "
                "leaves out where gradients of one rank alone are not finite: give all ranks the same before"
            ) from error

    def _run(self, ready: Sequence[ReadyBatch]) -> None:
        """Write what `_ready` has got ready."""
        # An interrupt is deferred only where this rank is alone: another rank may wait for this one for ever.
        alone = not any(task.together for batch in ready for task in batch.tasks)
        self._ranks.consolidated = None
        with interrupts.held() if alone else nullcontext():
            for groups, numbers, tasks, grads, new in ready:
                self._keep(new)
                for group in groups:
                    if numbers.seed is not None or group["strategy"] == "blocks":
                        group["step"] = group.get("step", 0) + 1
                try:
                    for task in tasks:
                        task.run(grads, numbers, self._workspace)
                except Failed as error:
                    raise RuntimeError(
                        f"step {self._steps} of Muon is incomplete, parameters of some matrices are stepped and of "
                        f"others not: {error}; go on from the last checkpoint"
                    ) from error

    @torch.no_grad()
    def init_state(self) -> None:
        """Make all state that there will be, before a first step or after some. Parameters are not changed.

        torch.distributed.checkpoint loads into what a `state_dict` has, so it needs this first where a model resumes:

            optimizer.init_state()
            parts = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            torch.distributed.checkpoint.load(parts, checkpoint_id=folder)
            set_optimizer_state_dict(model, optimizer, parts["optimizer"])

        Called before a training as well, it puts all parameters into the checkpoint, also those that have had no
        gradient yet. Momentum has the dtype `momentum_dtype` or, in place of the gradient's, the parameter's.
        """
        self._ranks.refresh(self.param_groups)
        with torch.inference_mode(False), torch.no_grad():
            trained = lambda p: p if p.requires_grad else None
            found = [self._prepare(groups, trained)[2] for groups, _ in self._batches()]
        self._ranks.consolidated = None
        for new in found:
            self._keep(new)

    @torch.no_grad()
    def plan(self) -> Plan:
        """Return what a step does if every parameter has a gradient of its own dtype. `print` it for a table.

        After a step it also has the time that steps take the host, `Plan.host_seconds`.
        """
        tasks = [task for groups, _ in self._batches() for task in self._prepare(groups, lambda p: p)[0]]
        self._tasks.clear()  # tasks hold momentum buffers, which the first step will make anew
        return plan_of(tasks, self.host_seconds)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or a checkpoint, torch.optim.Muon's too. Options that it lacks are as in the constructor."""
        super().__setstate__(state)
        self._workspace = Workspace()
        self._tasks = TaskCache()
        self.__dict__.setdefault("_steps", 0)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # which torch puts into the defaults
                    group.setdefault(key, value)
            settle(group, self.defaults)
            set_peak_lr(group)
        if "_ranks" not in self.__dict__:  # a copy
            self._ranks = Ranks()
        self._ranks.refresh(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying keep.

        Raises:
            TypeError: with a process_group, which belongs to this process and shares the state with others.
        """
        check_copied(self._ranks)
        state: dict[str, Any] = super().__getstate__()
        return state

    def whole_state(self) -> AbstractContextManager[None]:
        """Return a context in which `state` has that of other ranks, too. All ranks have to enter it."""
        return whole(self.state, self._ranks, self.param_groups)

    @torch.no_grad()
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the state that ranks share to one of them, which can then call `state_dict` alone until the next step.

        As torch's ZeroRedundancyOptimizer does it, for trainers that save on one rank only. All ranks of the process
        group have to call it. It costs the messages of a `state_dict` that all ranks call, to one rank only, and on
        that rank host memory for the momenta of the others until the next step. On others `state_dict` raises until
        then. Without a process_group it does nothing.

        Args:
            to: rank in the process group.

        Raises:
            ValueError: there is no such rank.
            RuntimeError: some rank does not call it.
        """
        consolidate(self.state, self._ranks, to)

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint, of the whole state also where ranks share it.

        Then all ranks have to call this, or one alone after `consolidate_state_dict`.
        """
        self._settle()
        with self.whole_state():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim.Muon. Momentum keeps the precision in which it was saved.

        Loading converts nothing between eight-bit and floating-point momentum, nor between `master_weights` and none:
        such a checkpoint raises. To change over, load it as it was saved and change the option in `param_groups`. The
        next step converts the momentum; masters begin at the parameters.

        Args:
            state_dict: the checkpoint.

        Raises:
            ValueError, TypeError: it is another optimizer's, or groups, sizes or options do not fit; nothing has been
                changed then.
        """
        state_dict = with_momenta(state_dict)
        states = check_checkpoint(state_dict, self.param_groups, "Muon", "ns_coefficients", check_state)
        self._settle()
        state_dict = fitted(state_dict, states, self.param_groups, self.defaults, self._ranks)
        # torch casts state to the parameter's dtype, which would round fp32 state of bf16 parameters.
        copies = [
            (p, {key: state[key].detach().to(p.device, copy=True) for key in STATE if key in state})
            for p, state in states
        ]
        super().load_state_dict(state_dict)
        for p, copy in copies:
            self.state[p].update(copy)
        forget_others(self.state, self._ranks)
        self._ranks.consolidated = None
