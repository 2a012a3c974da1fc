"""`introkernels bench`: from the command line to results, tables and the README."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from introkernels.bench import display, environment, records, tables
from introkernels.bench.model import DTYPES, Case, Suite
from introkernels.bench.records import Record, ResultsError
from introkernels.bench.runner import Settings, run_suite
from introkernels.bench.suites import SUITES
from introkernels.bench.tables import TableError

DESCRIPTION = """Time every operator against what one would use instead of it.

Each contender is first checked against the float64 definition; a wrong one is refused, not timed.
Contenders of a case take turns, and medians are compared within a run only. Leave the machine alone
meanwhile: a busy one makes all figures worse."""


class UsageError(ValueError):
    """A wrong call; the message says what is allowed."""


@dataclass(frozen=True)
class Options:
    """What to measure, and where the results go."""

    suite: str = "cpu"
    """Which suite: cpu, or gpu, which measures on the current GPU and needs one."""
    only: str | None = None
    """Only the cases whose name matches: a part of it, or a pattern with * and ?."""
    dtype: str | None = None
    """Only the cases of this dtype."""
    threads: int | None = None
    """Threads to compute with on the CPU. None: as many as torch uses by itself."""
    budget: float | None = None
    """Seconds of timing for each case; checks and compilation come on top. None: eight."""
    memory: bool = True
    """Measure peak memory too; on the CPU in a process of its own."""
    out: Path | None = None
    """File of JSON lines for the results; cases that it already holds are replaced.
    None: benchmarks/results/<suite>-<machine>.jsonl."""
    table: Path | None = None
    """A document whose table is made anew from the results, between its marker lines."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Show results of this file, and use them for --table, instead of measuring."""


def main(arguments: Sequence[str]) -> int:
    """Run `introkernels bench`; returns the exit status.

    0: done; 1: a contender was refused for a wrong result, or the run was interrupted; 2: the call
    was wrong.
    """
    console = Console()
    options = tyro.cli(
        Options, prog="introkernels bench", description=DESCRIPTION, args=list(arguments)
    )
    try:
        if options.from_ is not None:
            return _show(options, options.from_, console)
        return _run(options, console)
    except (UsageError, ResultsError, TableError) as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)


def _show(options: Options, source: Path, console: Console) -> int:
    ignored = [
        f"--{name}"
        for name in ("only", "dtype", "threads", "budget", "out")
        if getattr(options, name) is not None
    ]
    if ignored:
        raise UsageError(f"--from measures nothing: leave out {', '.join(ignored)}")
    found = records.read(source)
    if not found:
        raise ResultsError(f"{source} holds no results")
    for case in tables.cases(found):
        display.show_case(case, console)
    _update_table(options, source, found, console)
    return 0


def _run(options: Options, console: Console) -> int:
    suite = _suite(options.suite)
    chosen = _cases(suite, options.only, options.dtype)
    settings = _settings(options)
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--suite {suite.name} measures on a GPU, and torch {torch.__version__} sees none "
            f"(its CUDA: {torch.version.cuda}, its ROCm: {torch.version.hip})"
        )
    machine = environment.machine(suite.device)
    name = f"{suite.name}-{environment.slug(machine)}.jsonl"
    out = options.out or Path("benchmarks/results") / name
    stored = records.read(out) if out.exists() else []
    if options.table is not None:
        # Better to fail now than after minutes.
        _document(options.table, [suite.name])

    if environment.is_busy(machine):
        console.print(
            f"This machine is busy (load {machine['load']:.1f} on {machine['cores']} cores): "
            "times will be too long, and ratios uncertain."
        )
    refused = 0
    try:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress:
            task = progress.add_task(suite.name, total=len(chosen))
            numbers = {case.name: number for number, case in enumerate(chosen)}

            def on_progress(case: Case, stage: str, share: float) -> None:
                progress.update(
                    task,
                    description=f"{case.name}: {stage}",
                    completed=numbers[case.name] + share,
                )

            for found in run_suite(suite, chosen, settings, on_progress):
                display.show_case(found, progress.console)
                stored = records.merge(stored, found)
                records.write(out, stored)
                refused += sum(record["status"] == "refused" for record in found)
    except KeyboardInterrupt:
        return _fail(f"interrupted; the cases measured so far are in {out}", 1)
    console.print(f"Results: {out}", soft_wrap=True)
    _update_table(options, out, stored, console)
    if refused:
        return _fail(f"{refused} refused for a wrong result, see above", 1)
    return 0


def _suite(name: str) -> Suite:
    if name not in SUITES:
        raise UsageError(f"--suite: got {name!r}, expected one of {', '.join(SUITES)}")
    return SUITES[name]


def _cases(suite: Suite, only: str | None, dtype: str | None) -> list[Case]:
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    chosen = [case for case in suite.cases if dtype in (None, case.dtype)]
    if only is not None:
        pattern = only if any(character in only for character in "*?[") else f"*{only}*"
        chosen = [case for case in chosen if fnmatch.fnmatch(case.name, pattern)]
    if not chosen:
        asked = [f"--only {only}"] if only is not None else []
        asked += [f"--dtype {dtype}"] if dtype is not None else []
        names = "\n  ".join(case.name for case in suite.cases)
        raise UsageError(f"no case fits {' '.join(asked)}; suite {suite.name} has\n  {names}")
    return chosen


def _settings(options: Options) -> Settings:
    cores = environment.usable_cores()
    if options.threads is not None and not 1 <= options.threads <= cores:
        raise UsageError(
            f"--threads: got {options.threads}, expected 1 to {cores}, the cores usable here"
        )
    if options.budget is not None and not 0 < options.budget < float("inf"):
        raise UsageError(f"--budget: got {options.budget}, expected a positive number of seconds")
    settings = Settings(options.threads or torch.get_num_threads(), memory=options.memory)
    return settings if options.budget is None else replace(settings, budget=options.budget)


def _document(path: Path, suites: Sequence[str]) -> str:
    """The document that gets the tables of these suites.

    Raises:
        UsageError: it can't be read, or has no place for them.
    """
    try:
        document = path.read_text(encoding="utf-8")
        for suite in suites:
            tables.check_markers(document, suite)
    except (OSError, UnicodeDecodeError, TableError) as error:
        raise UsageError(f"--table: {path}: {error}") from error
    return document


def _update_table(
    options: Options, source: Path, found: Sequence[Record], console: Console
) -> None:
    if options.table is None:
        return
    suites = list(dict.fromkeys(record["suite"] for record in found))
    document = _document(options.table, suites)
    link = tables.relative_link(source, options.table)
    records.write_text(options.table, tables.put_into(document, found, link))
    console.print(f"Table: {options.table}", soft_wrap=True)


def _fail(message: object, status: int) -> int:
    print(f"introkernels bench: {message}", file=sys.stderr)
    return status
