"""Trainings of the demo: optimizers that take turns at every step, and the clock that stops them."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ...optimizers.muon_adamw import MuonAdamW
from ...optimizers.param_groups import param_groups
from .model import GPT
from .text import HELD_OUT_BATCHES

# No run is judged before it has done these, or half of the time is gone.
TRIAL_STEPS = 3
# A run whose steps take this many times as long as the fastest one's is stopped before the others take fewer steps.
TOO_SLOW = 3.0
# Time of the held-out batches in training steps: a forward pass is a third of a step at most.
HELD_OUT_STEPS = HELD_OUT_BATCHES / 3

# `match_rms_adamw` scales Muon's update to the size of AdamW's, so one learning rate serves all
# parameters of a run. The best of a grid of powers of two, by held-out loss after 250 steps, seed 0:
# Muon 1.961 1.957 2.025 at 8, 16, 32e-3; AdamW 2.475 2.449 2.471 2.522 at 1, 2, 4, 8e-3.
ADAMW_OPTIONS = {"lr": 2e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "fused": True}
MUON_OPTIONS = {"lr": 16e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
BESIDE_MUON_OPTIONS = {**ADAMW_OPTIONS, "lr": MUON_OPTIONS["lr"]}


def _muon_kernels(model: nn.Module) -> list[Optimizer]:
    groups = param_groups(model)
    return [MuonAdamW(groups, muon_options=MUON_OPTIONS, adamw_options=BESIDE_MUON_OPTIONS)]


def _torch_muon(model: nn.Module) -> list[Optimizer]:
    matrices, rest = param_groups(model, muon_options=MUON_OPTIONS, adamw_options=BESIDE_MUON_OPTIONS)
    return [torch.optim.Muon([matrices]), AdamW([rest])]


def _adamw(model: nn.Module) -> list[Optimizer]:
    return [AdamW([{"params": list(model.parameters()), **ADAMW_OPTIONS}])]


OPTIMIZERS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "muon_kernels": _muon_kernels,
    "torch.optim.Muon": _torch_muon,
    "AdamW": _adamw,
}
if not hasattr(torch.optim, "Muon"):  # new in torch 2.9
    del OPTIMIZERS["torch.optim.Muon"]


class Run:
    """Training of one model, with its losses and the times that the parts of each step took.

    Attributes:
        steps: number of steps over which the rate decays to 0; it may be lowered on the way.
        stopped: whether this training was too slow to go on.
    """

    def __init__(self, name: str, model: GPT, steps: int, fsdp: bool = False) -> None:
        """Train a copy of `model` with `OPTIMIZERS[name]`."""

        def schedule(step: int) -> float:
            warmup = max(1, self.steps // 20)
            return min((step + 1) / warmup, (self.steps - step) / (self.steps - warmup + 1))

        self.name = name
        self.steps = steps
        self.stopped = False
        self.model = copy.deepcopy(model)
        if fsdp:
            _shard(self.model)
        self.optimizers = OPTIMIZERS[name](self.model)
        self.schedulers = [LambdaLR(optimizer, schedule) for optimizer in self.optimizers]
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.held_out_loss = float("nan")

    def step(self, text: Tensor) -> None:
        """Do one training step on `text`, (BATCH, CONTEXT + 1), and note loss and times."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        start = perf_counter()
        loss = self.model(text[rank::ranks])
        loss.backward()
        gradients = perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        end = perf_counter()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.zero_grad()
            scheduler.step()
        if ranks > 1:
            dist.all_reduce(loss.detach_().div_(ranks))
        self.losses.append(loss.item())
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - gradients)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor]) -> None:
        """Set `held_out_loss` to the mean loss over `batches`."""
        losses = torch.stack([self.model(text) for text in batches])
        self.held_out_loss = losses.mean().item()

    def cost(self) -> float:
        """Return the median seconds of the last steps. The first step, which sets things up, counts only if alone."""
        return median(self.step_seconds[1:][-9:] or self.step_seconds)

    def smoothed(self, steps: int | None = None) -> Tensor:
        """Return the running mean of the first `steps` losses, from the first full window."""
        losses = self.losses[:steps]
        window = max(1, len(losses) // 15)
        return torch.tensor(losses).unfold(0, window, 1).mean(-1)


class Clock:
    """Time that a demonstration has left. After Ctrl-C it has none."""

    def __init__(self, seconds: float) -> None:
        """Start with `seconds` left."""
        self.seconds = seconds
        self._end = perf_counter() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - perf_counter()

    @contextmanager
    def stopped_by_ctrl_c(self) -> Iterator[None]:
        """Let Ctrl-C inside end the time instead of raising; a second one raises.

        Within a second it counts as the same one: torchrun passes it on to ranks that had it from the terminal.
        """
        first = inf

        def stop(*_: object) -> None:
            nonlocal first
            now = perf_counter()
            if now > first + 1:
                raise KeyboardInterrupt
            self._end, first = -inf, min(first, now)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def fitting(costs: Sequence[float], steps: int, seconds: float) -> tuple[list[int], int]:
    """Choose who trains on, and for how long.

    Args:
        costs: seconds that a step of each takes.
        steps: number of steps that each should still do.
        seconds: time that is left for all of them and their evaluation.

    Returns:
        The indices of those that go on, and how many steps each of them has time for.
    """
    going = sorted(range(len(costs)), key=costs.__getitem__)
    while sum(costs[i] for i in going) * (steps + HELD_OUT_STEPS) > seconds and (
        costs[going[-1]] >= TOO_SLOW * costs[going[0]]
    ):
        going.pop()
    fit = seconds / sum(costs[i] for i in going) - HELD_OUT_STEPS
    return sorted(going), steps if fit >= steps else max(0, int(fit))


def train(runs: Sequence[Run], batches: Iterable[Tensor], clock: Clock, show: Callable[[Run], None]) -> None:
    """Step all runs in turns, once with each batch, for as long as the clock allows.

    Runs that turn out too slow are stopped, and `steps` of the others is lowered if need be. `show` is called with
    every run that has changed.
    """
    for turn, text in enumerate(batches):
        going = [run for run in runs if not run.stopped]
        for index in range(len(going)):
            run = going[(turn + index) % len(going)]
            run.step(text)
            show(run)
        done = turn + 1
        left, seconds, *costs = _from_first_rank([clock.left(), clock.seconds, *(run.cost() for run in going)])
        if left == -inf:
            return
        if done < TRIAL_STEPS and left > seconds / 2:
            continue
        chosen, more = fitting(costs, going[0].steps - done, left)
        for index, run in enumerate(going):
            run.stopped = index not in chosen
            run.steps = done if run.stopped else done + more
            show(run)
        if not more:
            return


def _from_first_rank(numbers: Sequence[float]) -> list[float]:
    """Return `numbers` of the first rank, so that all ranks decide alike."""
    shared = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(shared, 0)
    return list(shared.tolist())


def _shard(model: GPT) -> None:
    """Shard the model over all ranks by torch's fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
