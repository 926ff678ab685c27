"""Arguments that run.py and report.py share: what is trained, and the folder that it is in."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from experiments import SCALES, Scale

HERE = Path(__file__).parent


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--size", choices=SCALES, default="laptop", help="models and text (default: laptop)")
    parser.add_argument("--bytes", type=float, help="bytes a parameter (default: 80, about 20 tokens)")
    parser.add_argument("--seeds", type=int, help="number of seeds of all that is reported (default: 4)")
    parser.add_argument("--text", help='train on this file instead of on "both" (the fine-tuning excepted)')
    parser.add_argument("--out", type=Path, help=f"folder for results, report and figures (default: {HERE})")


def scale_and_folder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Scale, Path]:
    """Return what the arguments mean; end with an error where they mean nothing."""
    scale = SCALES[args.size]
    if args.bytes is not None:
        if not 0 < args.bytes < float("inf"):
            parser.error(f"--bytes should be > 0 and finite but is: {args.bytes}")
        scale = replace(scale, bytes=args.bytes)
    if args.seeds is not None:
        if args.seeds < 2:
            parser.error(f"--seeds should be >= 2, or there are no intervals, but is: {args.seeds}")
        scale = replace(scale, seeds=tuple(range(args.seeds)))
    if args.text is not None:
        if not Path(args.text).is_file():
            parser.error(f"--text should be the path of a file but is: {args.text}")
        scale = replace(scale, text=args.text)
    if args.out is None and scale != SCALES["laptop"]:
        parser.error("--size, --bytes, --seeds and --text need --out, or they would replace the report of the whole")
    return scale, args.out or HERE
