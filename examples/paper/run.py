"""Train what three papers compare, at a size for a laptop's processor; REPORT.md has the results.

    python examples/paper/run.py
    python examples/paper/run.py --estimate
    python examples/paper/run.py --size quick --out /tmp/quick
    python examples/paper/run.py scaling --size 10m --text corpus.txt --out /tmp/10m

A result is appended to results.jsonl when it is there, and is not made again. After an interruption, start the same
command once more: what was going on is begun anew, all else is kept. At the end, REPORT.md and its figures are written
of the experiments that are complete.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import arguments
import estimate
import report
from experiments import EXPERIMENTS, together
from results import Results
from workers import begin, digests, work


def device(name: str | None, size: str) -> str:
    """Return the device: that which was named, or a GPU for sizes that need one where there is one."""
    if name is None and size in ("laptop", "quick"):
        return "cpu"
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch can use, and torch finds none")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments", nargs="*", metavar="experiment", help=f"of {', '.join(EXPERIMENTS)}; all if none"
    )
    arguments.add(parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU for 10m and 124m, if there is one")
    parser.add_argument("--workers", type=int, default=2, help="trainings at the same time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: 1)")
    parser.add_argument("--estimate", action="store_true", help="measure steps, print the time of what is missing")
    args = parser.parse_args(given)
    if unknown := [name for name in args.experiments if name not in EXPERIMENTS]:
        parser.error(f"experiment should be one of {', '.join(EXPERIMENTS)} but is: {unknown[0]}")
    if min(args.workers, args.threads) < 1:
        parser.error(f"--workers and --threads should be >= 1 but are: {args.workers} and {args.threads}")
    scale, out = arguments.scale_and_folder(parser, args)
    names = args.experiments or list(EXPERIMENTS)
    out.mkdir(parents=True, exist_ok=True)

    # Threads that spin would take the time of the other workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    where = device(args.device, args.size)
    context = multiprocessing.get_context("spawn")  # the kernels' threads do not survive a fork
    with ProcessPoolExecutor(args.workers, context, begin, (where, args.threads)) as pool:
        results = Results(out / "results.jsonl", pool, work, args.workers)
        if args.estimate:
            print(estimate.report(scale, names, results.has, pool, args.workers))
            return

        # Before the first training: another Python has another library, which is the text.
        results.check_texts(pool.submit(digests, (scale.text, "code", "prose")).result())

        def interrupt(*_: object) -> None:
            results.stop()  # or the threads of `together` would go on
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            together(lambda name: EXPERIMENTS[name](results, scale), names)
        finally:
            signal.signal(signal.SIGINT, before)
            report.write(out, scale)


if __name__ == "__main__":
    main()
