"""Costs of Muon's options: a step with one of them beside a step without, on the workloads of large layers.

Pairs take turns in one process. Stochastic rounding and master weights need bf16 parameters, and are compared with a
step of those.

    pytest bench/bench_options.py --benchmark-columns=median,iqr,rounds
    python bench/bench_options.py            a Markdown table, for RESULTS.md
"""

from __future__ import annotations

import gc
import statistics
from functools import cache
from typing import Any

import measure
import pytest
import torch
from shapes import WORKLOADS
from torch import nn

import muon_kernels

ROUNDS = 9
LARGE = [name for name in WORKLOADS if "layer" in name]
OPTIONS: dict[str, dict[str, Any]] = {
    "cautious": {"cautious": True},
    "stochastic_rounding": {"stochastic_rounding": True},
    'second_moment="neuron"': {"second_moment": "neuron"},
    'second_moment="element"': {"second_moment": "element"},
    "sign_momentum": {"sign_momentum": True},
    "AdaMuon": {"second_moment": "element", "sign_momentum": True},
    "momentum_dtype=int8": {"momentum_dtype": torch.int8},
    "master_weights": {"master_weights": True},
}


def optimizer(workload: str, dtype: torch.dtype, **options: Any) -> muon_kernels.Muon:
    """Return an optimizer with parameters, gradients and state of its own that has stepped once."""
    params = []
    for p in measure.parameters(WORKLOADS[workload]):
        assert p.grad is not None
        params.append(nn.Parameter(p.detach().to(dtype)))
        params[-1].grad = p.grad.to(dtype)
    made = muon_kernels.Muon(params, **options)
    made.step()
    return made


@cache
def times(workload: str, option: str) -> tuple[list[float], list[float]]:
    """Time steps without and with the option, taken in turn; return seconds."""
    dtype = torch.bfloat16 if {"stochastic_rounding", "master_weights"} & set(OPTIONS[option]) else torch.float32
    pair = optimizer(workload, dtype), optimizer(workload, dtype, **OPTIONS[option])
    taken: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    for _ in range(ROUNDS):
        for own, muon in zip(taken, pair, strict=True):
            own.append(measure.seconds(muon.step, "cpu"))
    return taken


def cost(workload: str, option: str) -> float:
    """Return by how many percent a step with the option takes longer than the one before it without: the median."""
    return 100 * statistics.median(b / a - 1 for a, b in zip(*times(workload, option), strict=True))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("workload", LARGE)
def test_option(benchmark, workload: str, option: str) -> None:
    benchmark.group = f"{workload}, options"
    measure.report(benchmark, times(workload, option)[1])
    benchmark.extra_info["percent_longer"] = cost(workload, option)


def table() -> str:
    """Return a table: milliseconds without and with every option, and the difference in percent."""
    lines = ["| workload | option | without, ms | with, ms | longer by |", "|---|---|---|---|---|"]
    for workload in LARGE:
        for option in OPTIONS:
            without, with_ = (1e3 * statistics.median(own) for own in times(workload, option))
            lines.append(f"| {workload} | {option} | {without:.1f} | {with_:.1f} | {cost(workload, option):.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(measure.describe("cpu"), end="\n\n")
    print(table())
