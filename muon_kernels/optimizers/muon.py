"""Muon as a torch optimizer: validation, state, groups. No arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, but it imports dynamo when called only
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer, ParamsT

from .. import interrupts
from ..checkpoint import STATE, check_checkpoint, check_state
from ..coefficients import COEFFICIENTS, DEFAULT, NS_STEPS, resolve
from ..distributed import consensus
from ..distributed.collectives import Failed
from ..distributed.ranks import Ranks, check_shared
from ..options import OPTIONS, check_keys, plain, settle
from ..step.cache import TaskCache
from ..step.options import Coefficients, alike, transposes
from ..step.plan import Plan
from ..step.run import plan_of
from ..step.work import Scalars, Task
from ..step.workspace import Workspace
from ..tensors import check_dense, check_disjoint, check_like, local
from .loading import fitted
from .muon_checks import check_muon_options, costs_of
from .prepare import prepared
from .scalars import scalars_of, set_peak_lr
from .stage_options import given_options, with_stage_options
from .state import Writes

_KELLER = COEFFICIENTS[DEFAULT].triples[0]


@with_stage_options
class Muon(Optimizer):
    r"""Momentum orthogonalized by Newton-Schulz: a drop-in for `torch.optim.Muon`, fused and batched.

    For every matrix W of shape (A, B) with gradient G, momentum buffer M and its Newton-Schulz iterate NS(·):

        M ← M + (1 - μ)(G - M)                       or, un-dampened, M ← μ M + G
        D = M + (1 - μ)(G - M) if nesterov else M    or, un-dampened, G + μ M
        W ← (1 - lr·weight_decay) W - lr·ratio(A, B)·NS(D)

    Sources: Keller Jordan et al., "Muon" (2024); Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982)
        for the weight decay and "match_rms_adamw". Matrices of equal shape are stepped together; `plan()` shows how.
        Gradients are only read. If a step raises, parameters and state are as they were, also where memory runs out;
        Ctrl-C waits until the matrices of this process are written. After `os.fork` a step in the new process waits
        forever for threads that the old one has, unless `torch.set_num_threads(1)` was there before the first step.

    Differs from `torch.optim.Muon` where that is at fault: the momentum buffer is never overwritten by the iteration,
    the norm is taken before rounding to bf16, and the update does not depend on the gradient's scale, from 1e-30 to
    1e30 (see `eps`).

    Args:
        params: parameters with at least two dimensions, or groups of them. Three dimensions are a batch of matrices,
            four or more a convolution, flattened to (first, all others); `flatten` decides otherwise. They may be
            slices of one tensor but not share an element.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: multiplied by `lr` as it is, not by the adjusted one; but see `weight_decay_form`.
        momentum: μ.
        nesterov: look one step ahead.
        ns_coefficients: one (a, b, c), a name of `muon_kernels.COEFFICIENTS`, or a list with one (a, b, c) a step.
        eps: smallest divisor of the normalisation, after an exact scaling of the norm to [1, 2); so it matters for
            zero only.
        ns_steps: number of steps; if not given, 5 or a named set's own number.
        adjust_lr_fn: ratio(A, B): None or "original" √max(1, A/B); "match_rms_adamw" 0.2·√max(A, B); "spectral" √(A/B),
            which groups hold by torch's name "spectral_unclamped"; "none" 1; or a pure function of (A, B) at the top
            level of a module. Its answers are kept from step to step. Groups and checkpoints hold its name, and a
            checkpoint is taken up only where the group has the same function.
        use_addmm: for torch.optim.Muon, which has it to fuse products; here they are.
        dampened: False writes the momentum as Moonlight does, without the factor 1 - μ.
        flatten: True flattens parameters of three dimensions too, False flattens none.
        split: how to cut parameters that hold several matrices, in the words of `muon_kernels.split`: one cut for all
            parameters of a group, as in `{"params": [...], "split": heads(12)}`, or a dict of cuts by name or `fnmatch`
            pattern, for parameters given with names; each pattern has to match in every group that takes the dict.
            Parts are stepped, and shown by `plan()`, like parameters of their own; momentum is the parameter's.
        transposed: whether parameters are stored as (inputs, outputs), as by transformers' Conv1D, in stacks of experts
            (E, in, out) and by ConvTranspose: their `adjust_lr_fn` is then applied to (B, A). True for all parameters
            of a group, or a list of names and `fnmatch` patterns, as for `split`. Nothing else asks for it: rows of
            `second_moment="neuron"` and of a `split` are rows as stored.
        ns_algorithm: "standard", "gram", or "auto" for the one with fewer FLOPs.
        backend: "cuda", "triton", "cpu", "eager", or "auto" for the first that can.
        max_workspace_bytes: cap on the memory beside parameters and state; larger buckets are stepped in several
            passes. None: 64 MiB for "cpu", 1 GiB for the others, or one matrix's need if that is more.
        workspace_dtype: of what is multiplied, a dtype or its name, which is what groups hold. torch.float16 is several
            times more accurate than torch.bfloat16 and as fast on a GPU; the "cpu" backend has it not, and "auto" then
            takes "eager", which is slower.
        momentum_dtype: of new momentum buffers; None: the gradient's. torch.int8 is 1.002 bytes an element: codes in
            `momentum_buffer`, and in `momentum_scale` the largest magnitude of every 2048 elements of a matrix, see
            packed.py. Steps compute in fp32. While there is such a momentum, `flatten` and `split` should not change.
            A group may change to torch.int8 or from it: its next step converts the momenta that it uses.
        maximize: ascend.
        power: p in [0, 1]: the direction's singular values become σ^p and not 1; see `muon_kernels.spectral_power`.
            Above 0, `ns_coefficients`, `ns_steps` and `eps` are not used, and the update scales with the direction^p.
        weight_decay_form: what of W decays in a step: "decoupled" lr·weight_decay; "independent" weight_decay, whatever
            lr above 0 is; "scheduled" lr·weight_decay·lr/peak_lr, AdamC's and MuonC's (arXiv 2506.02285).
        peak_lr: the largest `lr` of the schedule, for "scheduled"; None: the one that the group begins with. The
            `max_lr` that OneCycleLR writes into a group counts in its place where it is larger.
        cautious: decay only elements that the update moves towards zero, or not at all (arXiv 2510.12402).
        stochastic_rounding: round parameters, which must be bf16 then, up or down with the probabilities that make the
            mean exact. The same steps, from a checkpoint or not, have the same random bits, on every backend.
        sign_momentum: NS(sign(D)) and not NS(D), AdaMuon's (arXiv 2507.11005): its own settings are
            `Muon(params, sign_momentum=True, second_moment="element", dampened=False, adjust_lr_fn="match_rms_adamw")`.
            In fp16 workspaces an element below 1e-7 of the matrix's norm counts as zero.
        master_weights: take bf16 parameters for fp32 ones rounded to nearest, whose other 16 bits are `mantissa` in the
            state: steps are those of fp32 parameters, to the bit, in 4 bytes. Written between steps, a parameter keeps
            its `mantissa`, at most half a unit in its last place; delete that from the state to begin at the parameter.
        second_moment: divide NS(D) by the root of a running mean of its squares and keep its norm: "neuron" of each
            row, NorMuon's (arXiv 2510.05491), or "element" of each element, AdaMuon's; both papers scale as
            adjust_lr_fn="match_rms_adamw" does. A part of a `split` has rows of its own. With a power above 0, updates
            should be within 1e-18 and 1e18, where their squares are fp32.
        beta2: β₂ of that mean.
        process_group: of ranks that have the same plain tensors for parameters, and the same gradients, as under
            DistributedDataParallel, so that GradScaler leaves out the same steps on all: each steps a share, and only
            its owner keeps the momentum of a parameter. None: plain tensors are this process's own. DTensors say
            themselves where they are.
        strategy: who orthogonalizes matrices that several ranks have parts of: "owner", to whom the others send theirs;
            "gram", nobody: those cut along their longer dimension stay where they are, and Gram matrices are summed;
            "blocks", MuonBP's (arXiv 2510.16981), each rank its own part, and owners the whole every `block_period`
            steps. distributed/ has a file on each.
        block_period: for "blocks"; 1 is "owner".
        block_lr_ratio: for "blocks", what multiplies `lr` where parts are orthogonalized. `adjust_lr_fn` is then
            applied to their shapes; the paper's update is that of "match_rms_adamw".

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
        ns_coefficients: Coefficients = _KELLER,
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
        **others: Any,
    ) -> None:
        """Check everything and set nothing aside yet: momentum buffers come with the first gradients."""
        given = given_options(others) | locals()
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
        """Add a group after checking its options and parameters; on error the optimizer is unchanged."""
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
        """The number of steps of a group that gives its own coefficients but no number."""
        try:
            return len(resolve(ns_coefficients, self.defaults["ns_steps"]).triples)
        except ValueError:  # a set or a list of another length
            return len(resolve(ns_coefficients, None).triples)

    def _settle(self) -> None:
        """Write plain values where groups have been edited."""
        for group in self.param_groups:
            settle(group, self.defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise for options that cannot be used."""
        settle(group, self.defaults)
        check_muon_options(group)
        if self._ranks.shares(group["params"]):
            check_shared(group)
            self._ranks.check(group)

    def _check_gradients(self) -> None:
        """Raise for what other ranks should not wait for."""
        for group in self.param_groups:
            self._check_group(group)
            for p in group["params"]:
                if p.grad is not None:
                    check_dense("gradient", local(p.grad))
                    check_like("gradient", p.grad, p)

    def _batches(self) -> list[tuple[list[dict[str, Any]], Scalars]]:
        """Groups that a step does as one, for nothing that matters to it differs between them, and their numbers.

        Apart stay those whose steps are counted, and, as ranks have not agreed on their numbers, those of parameters
        that other ranks have parts or copies of.
        """
        batches: list[tuple[list[dict[str, Any]], Scalars]] = []
        by_numbers: dict[Scalars, list[list[dict[str, Any]]]] = {}
        for i, group in enumerate(self.param_groups):
            self._check_group(group)
            scalars = scalars_of(group, i)
            shared = bool(self._ranks.teams) and self._ranks.shares(group["params"])
            alone = shared or scalars.seed is not None or group["strategy"] == "blocks"
            others = [] if alone else by_numbers.setdefault(scalars, [])
            batch = next((groups for groups in others if alike(groups[0], group)), None)
            if batch is not None:
                batch.append(group)
                continue
            batches.append(([group], scalars))
            others.append(batches[-1][0])
        return batches

    def _prepare(
        self, groups: Sequence[dict[str, Any]], grad_of: Callable[[Tensor], Tensor | None]
    ) -> tuple[list[Task], list[Tensor], Writes]:
        """What a step of these groups does as one, its gradients, and what it would write into the state."""
        return prepared(groups, grad_of, self.state, self._ranks, self._tasks)

    def _keep(self, writes: Writes) -> None:
        for p, key, tensor in writes:
            if tensor is None:
                self.state[p].pop(key, None)
            else:
                self.state[p][key] = tensor

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError, TypeError, RuntimeError: see `muon_kernels.step.prepare`; nothing has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._steps += 1
        self._ranks.refresh(self.param_groups)
        try:
            agreed = consensus.agree(self._ranks.teams, self._check_gradients)
        except Failed as error:
            raise RuntimeError(
                f"step {self._steps} of Muon did not begin: {error}; every rank has to call step, which GradScaler "
                "leaves out where gradients of one rank alone are not finite: give all ranks the same before"
            ) from error
        # What is kept must be of use outside inference mode too.
        with torch.inference_mode(False), torch.no_grad():
            batches = self._batches()
            prepared = [self._prepare(groups, agreed.grad) for groups, _ in batches]
            for task in (task for tasks, _, _ in prepared for task in tasks):
                task.reserve(self._workspace)
            for (tasks, grads, _), (_, numbers) in zip(prepared, batches, strict=True):
                for task in tasks:
                    task.warm_up(grads, numbers, self._workspace)
        # Ranks may wait for each other, so an interrupt can only wait where there are none.
        alone = not any(task.together for tasks, _, _ in prepared for task in tasks)
        with interrupts.held() if alone else nullcontext():
            for (groups, numbers), (tasks, grads, new) in zip(batches, prepared, strict=True):
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
        return loss

    @torch.no_grad()
    def init_state(self) -> None:
        """Make all state that there will be, before a first step or after some; parameters are not moved.

        torch.distributed.checkpoint loads into what a `state_dict` has, so it needs this first where a model resumes:

            optimizer.init_state()
            parts = {"optimizer": get_optimizer_state_dict(model, optimizer)}
            torch.distributed.checkpoint.load(parts, checkpoint_id=folder)
            set_optimizer_state_dict(model, optimizer, parts["optimizer"])

        Called before a training as well, it puts all parameters into the checkpoint, also those whose gradients have
        not come yet. Momentum has the dtype of `momentum_dtype` or, in place of the gradient's, the parameter's.
        """
        self._ranks.refresh(self.param_groups)
        with torch.inference_mode(False), torch.no_grad():
            trained = lambda p: p if p.requires_grad else None
            found = [self._prepare(groups, trained)[2] for groups, _ in self._batches()]
        for new in found:
            self._keep(new)

    @torch.no_grad()
    def plan(self) -> Plan:
        """What a step does if every parameter has a gradient of its own dtype; `print` it."""
        tasks = [task for groups, _ in self._batches() for task in self._prepare(groups, lambda p: p)[0]]
        self._tasks.clear()  # it would keep the momentum buffers that a first step has not made yet
        return plan_of(tasks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a pickle or a checkpoint, torch.optim.Muon's too: what it lacks is as in the constructor."""
        super().__setstate__(state)
        self._workspace = Workspace()
        self._tasks = TaskCache()
        self.__dict__.setdefault("_steps", 0)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch puts this one into the defaults
                    group.setdefault(key, value)
            settle(group, self.defaults)
            set_peak_lr(group)
        if "_ranks" not in self.__dict__:  # a copy
            self._ranks = Ranks()
        self._ranks.refresh(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and copying keep.

        Raises:
            TypeError: with a process_group, which is of this process and has the state on several.
        """
        if self._ranks.owned:
            raise TypeError(
                "an optimizer with a process_group should not be copied or pickled, as ranks share its state; make "
                "another one and load the state_dict() that all ranks have asked for"
            )
        state: dict[str, Any] = super().__getstate__()
        return state

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Have what other ranks keep of the state in ours, for as long as the context lasts; on all ranks at once."""
        whole = consensus.gathered(self._ranks.owned, self.state)
        own = {p: self.state.get(p) for p in whole}
        try:
            self.state.update(whole)
            yield
        finally:
            for p, state in own.items():
                if state is None:
                    del self.state[p]
                else:
                    self.state[p] = state

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint, whole also where ranks share the state of plain tensors: then all have to ask for it."""
        self._settle()
        with self.whole_state():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim.Muon, momentum in the precision in which it was saved.

        Between eight bits and a floating-point momentum, and with `master_weights` and without, loading converts
        nothing: such a checkpoint raises. To change over, load it as it was saved and change the option in
        `param_groups`: the next step converts the momentum; masters begin at the parameters.

        Raises:
            ValueError, TypeError: it is another optimizer's, or groups, sizes or options do not fit; nothing has been
                changed then.
        """
        states = check_checkpoint(state_dict, self.param_groups, "Muon", "ns_coefficients", check_state)
        self._settle()
        state_dict = fitted(state_dict, states, self.param_groups, self.defaults, self._ranks)
        # torch casts state to the parameter's dtype, which would round what is fp32 with bf16 parameters.
        copies = [
            (p, {key: state[key].detach().to(p.device, copy=True) for key in STATE if key in state})
            for p, state in states
        ]
        super().load_state_dict(state_dict)
        for p, copy in copies:
            self.state[p].update(copy)
        for p in self._ranks.owned:
            if self._ranks.elsewhere(p):
                self.state.pop(p, None)
