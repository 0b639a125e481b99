"""The command line, ``python -m cugn``: argument parsing only; each command is a module of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import command


def report(options: argparse.Namespace) -> int:
    """Run `cugn.report`."""
    from .report import report

    return report()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command and its options; those of the process by default.

    Returns
    -------
    int
        0, or 1 if anything is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m cugn", description="Group normalization for plain arrays.")
    parser.set_defaults(run=report)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("report", help="what can run here, is it right, how fast (the default)").set_defaults(
        run=report
    )
    normalize = commands.add_parser("normalize", help="normalize a .npy file or a Zarr array larger than memory")
    command.add_arguments(normalize)
    normalize.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
