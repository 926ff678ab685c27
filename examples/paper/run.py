"""Train what the papers compare, at a size for a laptop's processor; see REPORT.md.

    python examples/paper/run.py all
    python examples/paper/run.py powers --steps 500 --out /tmp/longer

Trainings are appended to results.jsonl as they are done, and those that it has are not done again: start it once more
after an interruption. Then REPORT.md and its figures are written of all experiments that are complete.
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
    parser.add_argument("--steps", type=int, help="of a training of the middle size")
    parser.add_argument("--quick", action="store_true", help="see whether it runs: a few steps of tiny models")
    parser.add_argument("--out", type=Path, help=f"folder for results, report and figures (default: {HERE})")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
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
