"""Train what three papers compare, at a size for a laptop's processor; REPORT.md has the results.

    python examples/paper/run.py all
    python examples/paper/run.py all --quick --out /tmp/quick
    python examples/paper/run.py powers --steps 500 --out /tmp/longer

A training is appended to results.jsonl when it is done, and is not done again if it is there already. After an
interruption, start the same command once more. At the end, REPORT.md and its figures are written of the experiments
that are complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import experiments
import report
import torch
from harness import Results

HERE = Path(__file__).parent
EXPERIMENTS: dict[str, Sequence[Callable[..., Any]]] = {
    "powers": [experiments.powers],
    "scaling": [experiments.scaling, experiments.over_trained],
    "finetune": [experiments.finetune],
    "entropy": [experiments.entropy],
    "clip": [experiments.clip],
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument(
        "--steps", type=int, help="steps of a training of the middle size (default: 240 for powers, else 480)"
    )
    parser.add_argument("--quick", action="store_true", help="do a few steps of tiny models, to see whether it runs")
    parser.add_argument("--out", type=Path, help=f"folder for results, report and figures (default: {HERE})")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    args = parser.parse_args(arguments)
    scale = experiments.QUICK if args.quick else experiments.Scale()
    if args.steps is not None:
        if args.steps < 2:
            parser.error(f"--steps should be >= 2 but is: {args.steps}")
        scale = replace(scale, powers=args.steps, steps=args.steps)
    if args.out is None and scale != experiments.Scale():
        parser.error("--quick and --steps need --out, so that the report stays of the whole")
    out = args.out or HERE
    out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(args.threads)
    results = Results(out / "results.jsonl")
    for name, parts in EXPERIMENTS.items():
        if args.experiment in (name, "all"):
            print(name, flush=True)
            for part in parts:
                part(results, scale)
    report.write(out, scale)


if __name__ == "__main__":
    main()
