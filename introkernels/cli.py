"""The command `introkernels`; each subcommand is imported only when it is called.

The module of a subcommand has a function `main`, which returns the exit status, and the table
`EXIT_STATUS` of the errors that a user is told in one line.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from introkernels._version import __version__

# The modules that the extra of a subcommand installs.
TRAIN_EXTRA = (
    *("PIL", "filelock", "jinja2", "matplotlib", "numpy", "pandas", "rich"),
    *("scipy", "sklearn", "torchmetrics", "tyro"),
)
BENCH_EXTRA = ("rich", "tyro")
EXTRAS = {"train": TRAIN_EXTRA, "bench": BENCH_EXTRA}
# Where the commands that need an extra are, and which one.
COMMANDS = {
    "train": ("introkernels.train.cli", "train"),
    "study": ("introkernels.train.study.cli", "train"),
    "bench": ("introkernels.bench.cli", "bench"),
}
INTERRUPTED = 130
"""The exit status after Ctrl-C, by the custom of shells: 128 and the signal's number."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status.

    0: done; 1: failed; 2: the call was wrong; 130: interrupted, as by Ctrl-C.
    """
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
    commands.add_parser(
        "study", help="tune every method with one budget, compare on fresh seeds", add_help=False
    )
    commands.add_parser(
        "bench", help="time every operator against its rivals; check it first", add_help=False
    )
    commands.add_parser("doctor", help="say what is installed, what works and what does not")

    arguments = list(sys.argv[1:] if argv is None else argv)
    # Everything after these is their own: argparse would refuse the options it doesn't know.
    if arguments and arguments[0] in COMMANDS:
        try:
            return _with_extra(arguments[0], arguments[1:])
        except KeyboardInterrupt as error:
            return _fail(arguments[0], error, INTERRUPTED)
    if parser.parse_args(arguments).command == "doctor":
        from introkernels import doctor

        return doctor.main()
    parser.print_help()
    return 0


def _with_extra(command: str, arguments: Sequence[str]) -> int:
    """Run a subcommand that is a package of its own and needs an extra."""
    module, extra = COMMANDS[command]
    try:
        cli = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS[extra]:
            raise
        print(
            f"introkernels {command} needs {missing}, which is not installed: "
            f"pip install 'introkernels[{extra}]'",
            file=sys.stderr,
        )
        return 2
    expected: dict[type[Exception], int] = cli.EXIT_STATUS
    try:
        status: int = cli.main(arguments)
    except tuple(expected) as error:
        status = next(status for kind, status in expected.items() if isinstance(error, kind))
        return _fail(command, error, status)
    return status


def _fail(command: str, error: BaseException, status: int) -> int:
    """Say in one line what ended a subcommand, with the error's notes; returns the status."""
    reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    line = "; ".join([reason, *getattr(error, "__notes__", [])])
    print(f"introkernels {command}: {line}", file=sys.stderr)
    return status
