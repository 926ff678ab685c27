"""Estimate of the time that a grid takes, from measured seconds a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from typing import Any

from configs import Config, Result, compute
from experiments import EXPERIMENTS, FIRST_LR, PAPER_LR, Scale
from workers import Speed, work

# Where learning rates are thought to be best, as factors of the first ones: of embeddings, of [1]'s and of [2]'s.
REST, OURS, PAPERS = 2.0, 0.5, 4.0


class Plan:
    """A `Run` that trains nothing and keeps what it was asked for; losses are made up, for the search of rates.

    Attributes:
        tasks: all that was asked for, in order, once.
    """

    def __init__(self) -> None:
        self.tasks: dict[Any, None] = {}

    def __call__(self, tasks: Sequence[Any]) -> list[Result]:
        """Return results that have a config and a loss alone."""
        self.tasks |= dict.fromkeys(tasks)
        return [{"config": asdict(task), "loss": _made_up(task)} for task in tasks]


def _made_up(task: Any) -> float:
    if not isinstance(task, Config):
        return 0.0
    if task.optimizer in PAPER_LR:
        return abs(math.log2(task.lr / (PAPERS * PAPER_LR[task.optimizer])))
    rest = task.lr if task.rest_lr is None else task.rest_lr
    centre = OURS * FIRST_LR[task.optimizer]
    return abs(math.log2(task.lr / centre)) + 0.1 * abs(math.log2(rest / (REST * centre)))


def plan(scale: Scale) -> dict[str, list[Any]]:
    """Return the tasks of each experiment; a task may be in several. How many trainings choose a rate is a guess."""
    found = {}
    for name, experiment in EXPERIMENTS.items():
        asked = Plan()
        experiment(asked, scale)
        found[name] = list(asked.tasks)
    return found


def flop(tasks: Sequence[Any]) -> float:
    """Add up the compute of the trainings among tasks."""
    return sum(compute(asdict(task)) for task in tasks if isinstance(task, Config))


def _of_a_speed(task: Any) -> Config:
    """Return a config that takes as long a step."""
    of = task if isinstance(task, Config) else task.start
    tau = None if of.tau is None else 0.0
    return replace(
        of, lr=1e-3, rest_lr=None, seed=0, start=None, steps=100, record_every=0, tau=tau, target_rms=0.2, text="both"
    )


def _steps(task: Any) -> float:
    """Return how many steps a task takes as long as. An evaluation is a third of a step."""
    if not isinstance(task, Config):
        return float(task.step)
    size = task.context * task.batch
    return task.steps + math.ceil(task.held_out / size) / 3 * (1 if task.start is None else 2)


def seconds(tasks: Sequence[Any], pool: Executor, say: Callable[[str], object]) -> dict[Any, float]:
    """Measure the speeds that tasks need, all in the pool so that its processes compete; return seconds by task."""
    timed = [task for task in tasks if isinstance(task, Config) or hasattr(task, "start")]
    speeds = list(dict.fromkeys(map(_of_a_speed, timed)))
    say(f"measuring {len(speeds)} speeds")
    by_speed = {of: result["seconds"] for of, result in zip(speeds, pool.map(work, map(Speed, speeds)), strict=True)}
    return {task: _steps(task) * by_speed[_of_a_speed(task)] for task in timed}


def report(scale: Scale, names: Sequence[str], done: Callable[[Any], bool], pool: Executor, workers: int) -> str:
    """Return a table of what is missing, and what it takes.

    Args:
        names: experiments to count.
        done: says whether a task is in the results.
    """
    left = {name: [task for task in tasks if not done(task)] for name, tasks in plan(scale).items() if name in names}
    every = list(dict.fromkeys(task for tasks in left.values() for task in tasks))
    takes = seconds(every, pool, print)
    lines, counted = [f"{'experiment':<12}{'tasks':>7}{'core hours':>12}{'EFLOP':>12}"], set()
    for name, tasks in left.items():
        new = [task for task in tasks if task not in counted]
        counted |= set(new)
        lines.append(f"{name:<12}{len(new):>7}{_hours(new, takes):>12.2f}{flop(new) / 1e18:>12.3g}")
    total = _hours(every, takes)
    lines.append(f"{'total':<12}{len(every):>7}{total:>12.2f}{flop(every) / 1e18:>12.3g}")
    lines.append(f"{total / workers:.2f} hours with {workers} workers; what several need counts in the first")
    return "\n".join(lines)


def _hours(tasks: Sequence[Any], takes: dict[Any, float]) -> float:
    return sum(takes.get(task, 1.0) for task in tasks) / 3600
