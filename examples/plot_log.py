"""Draw the losses of several trainings into one picture.

python examples/plot_log.py runs/tiny-muon runs/tiny-adamw --out losses.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import logs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of trainings, each with a log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("losses.png"), help="picture (default: losses.png)")
    args = parser.parse_args(argv)
    if missing := [str(run) for run in args.runs if not (run / "log.jsonl").exists()]:
        parser.error(f"runs should be folders with a log.jsonl, but these have none: {', '.join(missing)}")
    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]  # else one would take the other's place
    logs.draw({name: run / "log.jsonl" for name, run in zip(names, args.runs, strict=True)}, args.out)


if __name__ == "__main__":
    main()
