"""The command line: `python -m muon_kernels COMMAND`.

A command is a module of this package with `add_arguments(parser)` and `run(args) -> exit status`. Its docstring is its
help, the first line the help in short.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

COMMANDS = ("demo", "doctor", "ledger", "tune", "verify")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; by default the process's arguments.

    Returns:
        The exit status: 0 for success.
    """
    parser = argparse.ArgumentParser(prog="python -m muon_kernels", description="A fused Muon optimizer for PyTorch.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f"{__name__}.{name}")
        description = command.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    return int(args.run(args))
