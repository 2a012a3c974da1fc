"""The command `introkernels`; each subcommand is imported only when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from introkernels._version import __version__

TRAIN_EXTRA = (
    *("filelock", "jinja2", "matplotlib", "numpy", "pandas", "rich"),
    *("scipy", "sklearn", "torchmetrics", "tyro"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status: 0 done, 1 failed, 2 wrong call."""
    parser = argparse.ArgumentParser(
        prog="introkernels",
        description="Introspective-learning losses for PyTorch.",
        epilog="`introkernels COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"introkernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "train", help="train methods over seeds on real data and write a report", add_help=False
    )
    commands.add_parser("doctor", help="say what is installed, what works and what does not")

    arguments = list(sys.argv[1:] if argv is None else argv)
    # Everything after `train` is its own: argparse would refuse the options it doesn't know.
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    if parser.parse_args(arguments).command == "doctor":
        from introkernels import doctor

        return doctor.main()
    parser.print_help()
    return 0


def _train(arguments: Sequence[str]) -> int:
    try:
        from introkernels.train import cli
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in TRAIN_EXTRA:
            raise
        print(
            f"introkernels train needs {missing}, which is not installed: "
            "pip install 'introkernels[train]'",
            file=sys.stderr,
        )
        return 2
    return cli.main(arguments)
