"""Muon as a torch optimizer: validation, state, groups. No arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter, eq
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import backends
from .coefficients import COEFFICIENTS, DEFAULT, NS_STEPS, resolve
from .functional import (
    Coefficients,
    Prepared,
    Scalars,
    Workspace,
    check_parameter,
    execute,
    prepare,
    reserve,
    signature,
)
from .newton_schulz import ALGORITHMS
from .plan import Plan
from .scaling import lr_ratio

_KELLER = COEFFICIENTS[DEFAULT].triples[0]


class _Settled(NamedTuple):
    """What was prepared for a group, and for what."""

    options: dict[str, Any]
    threads: int
    signatures: list[tuple[object, ...]]
    prepared: Prepared


class Muon(Optimizer):
    r"""Momentum orthogonalized by Newton-Schulz: a drop-in for `torch.optim.Muon`, fused and batched.

    For every matrix W of shape (A, B) with gradient G, momentum buffer M and its Newton-Schulz iterate NS(·):

        M ← M + (1 - μ)(G - M)                       or, un-dampened, M ← μ M + G
        D = M + (1 - μ)(G - M) if nesterov else M    or, un-dampened, G + μ M
        W ← (1 - lr·weight_decay) W - lr·ratio(A, B)·NS(D)

    Sources: Keller Jordan et al., "Muon" (2024); Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982)
        for the weight decay and "match_rms_adamw". Matrices of equal shape are stepped together; `plan()` shows how.
        Gradients are only read. If a step raises, parameters and state are as they were.

    Differs from `torch.optim.Muon` where that is at fault: the momentum buffer is never overwritten by the iteration,
    the norm is taken before rounding to bf16, and the update does not depend on the gradient's scale (see `eps`).

    Args:
        params: parameters with at least two dimensions, or groups of them. Three dimensions are a batch of matrices,
            four or more a convolution, flattened to (first, all others); `flatten` decides otherwise.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: decoupled, multiplied by `lr` as it is, not by the adjusted one.
        momentum: μ.
        nesterov: look one step ahead.
        ns_coefficients: one (a, b, c), a name of `muon_kernels.COEFFICIENTS`, or a list with one (a, b, c) a step.
        eps: smallest divisor of the normalisation, after an exact scaling of the norm to [1, 2); so it matters for
            zero only.
        ns_steps: number of steps; if not given, 5 or a named set's own number.
        adjust_lr_fn: ratio(A, B): None or "original" √max(1, A/B); "match_rms_adamw" 0.2·√max(A, B); "spectral" √(A/B);
            "none" 1; or a function of (A, B).
        dampened: False writes the momentum as Moonlight does, without the factor 1 - μ.
        flatten: True flattens parameters of three dimensions too, False flattens none.
        ns_algorithm: "standard", "gram", or "auto" for the one with fewer FLOPs.
        backend: "cpu", "eager", or "auto" for the first that can.
        max_workspace_bytes: cap on the memory beside parameters and state; larger buckets are stepped in several
            passes. None: 64 MiB for "cpu", 1 GiB for "eager", or one matrix's need if that is more.
        momentum_dtype: of new momentum buffers; None: the gradient's.
        maximize: ascend.

    Raises:
        ValueError, TypeError: an argument that cannot be used, with what was expected.
    """

    # torch.amp.GradScaler then leaves unscaling and the skipped step to `step` (attributes grad_scale and found_inf).
    _step_supports_amp_scaling = True

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
        *,
        dampened: bool = True,
        flatten: bool | None = None,
        ns_algorithm: str = "auto",
        backend: str = "auto",
        max_workspace_bytes: int | None = None,
        momentum_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        """Check everything and set nothing aside yet: momentum buffers come with the first gradients."""
        defaults = {
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
            "momentum_dtype": momentum_dtype,
            "maximize": maximize,
        }
        _check_options(defaults)
        if ns_steps is NS_STEPS:  # a checkpoint must hold a plain number
            defaults["ns_steps"] = len(resolve(ns_coefficients, ns_steps).triples)
        self._workspace = Workspace()
        self._prepared: dict[int, _Settled] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options and parameters; on error the optimizer is unchanged."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            unknown = set(group) - set(self.defaults) - {"params", "param_names", "initial_lr", "use_muon"}
            if unknown:
                raise ValueError(
                    f"group options should be among {sorted(self.defaults)} but include: {sorted(unknown)}"
                )
            _check_options(group)
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("every parameter of a group should be there once but some are repeated")
            for p in group["params"]:
                check_parameter(p, group["flatten"])
                backends.choose(group["backend"], p.device, [p.dtype])
        except Exception:
            del self.param_groups[before:]
            raise

    def _prepare(
        self, group: dict[str, Any], grad_of: Callable[[Tensor], Tensor | None]
    ) -> tuple[Prepared, list[Tensor], dict[Tensor, Tensor]]:
        """What a step of this group does, its gradients, and the momentum buffers that it would add to the state."""
        _check_options(group)
        params, grads, buffers = [], [], []
        new: dict[Tensor, Tensor] = {}
        nothing: dict[str, Any] = {}
        for p in group["params"]:
            grad = grad_of(p)
            if grad is None:
                continue
            buffer = self.state.get(p, nothing).get("momentum_buffer")
            if buffer is None:
                dtype = group["momentum_dtype"] or grad.dtype
                buffer = new[p] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            params.append(p)
            grads.append(grad)
            buffers.append(buffer)
        options = {key: group[key] for key in _SETTLED}
        cached = self._prepared.get(id(group))
        # Signatures are compared one by one: a list of them would set off the garbage collector at every step.
        if (
            cached is None
            or cached.options != options
            or cached.threads != torch.get_num_threads()
            or len(cached.signatures) != len(params)
            or not all(map(eq, map(signature, params, grads, buffers), cached.signatures))
        ):
            signatures = list(map(signature, params, grads, buffers))
            # A copy: a list of coefficients may be changed in place.
            cached = _Settled(
                copy.deepcopy(options), torch.get_num_threads(), signatures, prepare(params, grads, buffers, **options)
            )
            self._prepared[id(group)] = cached
        return cached.prepared, grads, new

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError, TypeError, RuntimeError: see `muon_kernels.functional.prepare`; nothing has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch.amp.GradScaler sets these for the duration of a step.
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return loss
        scale: Tensor | None = getattr(self, "grad_scale", None)
        grad_scale = 1.0 if scale is None else 1.0 / float(scale)
        prepared = [self._prepare(group, attrgetter("grad")) for group in self.param_groups]
        for decided, _, _ in prepared:
            reserve(decided, self._workspace)
        for group, (decided, grads, new) in zip(self.param_groups, prepared, strict=True):
            for p, buffer in new.items():
                self.state[p]["momentum_buffer"] = buffer
            scalars = Scalars(
                group["lr"],
                group["weight_decay"],
                group["momentum"],
                group["nesterov"],
                group["dampened"],
                group["eps"],
                -grad_scale if group["maximize"] else grad_scale,
            )
            execute(decided, grads, scalars, self._workspace)
        return loss

    @torch.no_grad()
    def plan(self) -> Plan:
        """What a step does if every parameter has a gradient of its own dtype; `print` it."""
        prepared = [self._prepare(group, lambda p: p)[0] for group in self.param_groups]
        self._prepared.clear()  # it would keep the momentum buffers that a first step has not made yet
        return Plan(tuple(work.bucket for decided in prepared for work in decided.works))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a pickle or a checkpoint, torch.optim.Muon's too: what it lacks is as in the constructor."""
        super().__setstate__(state)
        self._workspace = Workspace()
        self._prepared = {}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":  # torch puts this one into the defaults
                    group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim.Muon, momentum in the precision in which it was saved.

        Raises:
            ValueError: groups, sizes or options do not fit; nothing has been changed then.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        buffers = {}
        if len(saved) == len(own):  # torch's own sentence otherwise
            for index, p in zip(saved, own, strict=True):
                buffer = state_dict["state"].get(index, {}).get("momentum_buffer")
                if buffer is None:
                    continue
                if not isinstance(buffer, Tensor) or not buffer.is_floating_point() or buffer.layout != torch.strided:
                    raise TypeError(
                        f"momentum_buffer of parameter {index} should be a dense floating-point tensor "
                        f"but is: {buffer!r:.80}"
                    )
                if buffer.shape != p.shape:
                    raise ValueError(
                        f"momentum_buffer of parameter {index} should have size {tuple(p.shape)} "
                        f"but has: {tuple(buffer.shape)}"
                    )
                buffers[p] = buffer
        for group in state_dict["param_groups"]:
            _check_options({**self.defaults, **group})
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype, which would round an fp32 momentum of bf16 parameters.
        for p, buffer in buffers.items():
            self.state[p]["momentum_buffer"] = buffer.detach().to(p.device, copy=True)


# What a step may settle once, see `functional.prepare`.
_SETTLED = (
    "ns_coefficients",
    "ns_steps",
    "adjust_lr_fn",
    "flatten",
    "ns_algorithm",
    "backend",
    "max_workspace_bytes",
)


def _check_options(options: dict[str, Any]) -> None:
    for key in ("nesterov", "dampened", "maximize"):
        if not isinstance(options[key], bool):
            raise TypeError(f"{key} should be True or False but is: {options[key]!r}")
    if options["flatten"] is not None and not isinstance(options["flatten"], bool):
        raise TypeError(f"flatten should be True, False or None but is: {options['flatten']!r}")
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, key in (
        ("Learning rate", "lr"),
        ("momentum", "momentum"),
        ("weight decay", "weight_decay"),
        ("eps", "eps"),
    ):
        value = options[key]
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"{name} should be a number but is: {value!r}")
        if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
            raise ValueError(f"{name} should be one real number but is a tensor of size {tuple(value.shape)}")
        if not 0.0 <= value:
            raise ValueError(f"{name} should be >= 0 but is: {options[key]}")
    if options["eps"] >= 1:
        raise ValueError(f"eps should be < 1, the smallest norm that it is compared with, but is: {options['eps']}")
    resolve(options["ns_coefficients"], options["ns_steps"])
    if not callable(options["adjust_lr_fn"]):
        lr_ratio(options["adjust_lr_fn"], 1, 1)
    if options["ns_algorithm"] != "auto" and options["ns_algorithm"] not in ALGORITHMS:
        raise ValueError(
            f"ns_algorithm should be 'auto' or one of {', '.join(map(repr, ALGORITHMS))} "
            f"but is: {options['ns_algorithm']!r}"
        )
    if options["backend"] != "auto":
        backends.get(options["backend"])
    cap = options["max_workspace_bytes"]
    if cap is not None and (not isinstance(cap, int) or cap <= 0):
        raise ValueError(f"max_workspace_bytes should be a positive integer or None but is: {cap!r}")
    dtype = options["momentum_dtype"]
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float64, torch.float16):
        raise ValueError(f"momentum_dtype should be a floating-point dtype or None but is: {dtype!r}")
