"""`introkernels bench`: from the command line to results, tables and the README."""

from __future__ import annotations

import fnmatch
import importlib
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from introkernels import checkout
from introkernels.bench import display, environment, records, stale, tables
from introkernels.bench.against import Comparison, WorkerError, compare
from introkernels.bench.against_tree import Process, TreeError, check_library, commit_of, tree_of
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


class RefusedError(RuntimeError):
    """Contenders were refused for a wrong result."""


EXIT_STATUS: dict[type[Exception], int] = {
    UsageError: 2,
    ResultsError: 2,
    TableError: 2,
    TreeError: 2,
    RefusedError: 1,
    WorkerError: 1,
    OSError: 1,
}
"""The errors that a user is told in one line, and how the command then ends."""


@dataclass(frozen=True)
class Options:
    """What to measure, and where the results go."""

    suite: str = "cpu"
    """Which suite: cpu; gpu, which measures on the current GPU and needs one; sweep, times against
    numbers of classes and dimensions; memory, peak memory against numbers of classes; step, whole
    training steps; first-call, what a fresh process needs before it computes."""
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
    plot: Path | None = None
    """A folder for plots of the results as SVG; needs matplotlib."""
    from_: Annotated[tuple[Path, ...] | None, tyro.conf.arg(name="from")] = None
    """Show results of these files, and use them for --table and --plot, instead of measuring."""
    against: str | None = None
    """Compare our kernels as they are here with those of this commit, and keep no results."""


def main(arguments: Sequence[str]) -> int:
    """Run `introkernels bench`; returns the exit status.

    0: done; 1: a contender was refused for a wrong result, or measuring failed; 2: the call was
    wrong; 130: interrupted. What isn't 0 is an error that this raises and `introkernels.cli` tells.
    """
    console = Console()
    options = tyro.cli(
        Options, prog="introkernels bench", description=DESCRIPTION, args=list(arguments)
    )
    if options.from_ is not None:
        return _show(options, options.from_, console)
    if options.against is not None:
        return _compare(options, options.against, console)
    return _run(options, console)


def _show(options: Options, sources: Sequence[Path], console: Console) -> int:
    if not sources:
        raise UsageError("--from: got no file, expected one or more")
    _refuse(options, "--from measures nothing", ("only", "dtype", "threads", "budget", "out"))
    _refuse(options, "--from measures nothing", ("against",))
    plots = _plots(options)
    found = [(source, records.read(source)) for source in sources]
    for source, stored in found:
        if not stored:
            raise ResultsError(f"{source} holds no results")
    age_of = stale.ages(checkout.root())
    for _, stored in found:
        for case in tables.cases(stored):
            display.show_case(case, console, age_of)
        display.show_notes(stored, console, age_of)
    _update_table(options, found, console)
    _update_plots(options, found, plots, console)
    return 0


def _run(options: Options, console: Console) -> int:
    suite = _suite(options.suite)
    chosen = _cases(suite, options.only, options.dtype)
    settings = _settings(options)
    _need_device(suite)
    machine = environment.machine(suite.device)
    name = f"{suite.name}-{environment.slug(machine)}.jsonl"
    out = options.out or Path("benchmarks/results") / name
    # Better to fail now than after minutes.
    _need_room(out)
    stored = records.read(out) if out.exists() else []
    if options.table is not None:
        _document(options.table, [suite.name])
    plots = _plots(options)
    _warn_if_busy(machine, console)
    refused = 0
    try:
        with _progress(suite.name, chosen, console) as on_progress:
            for found in run_suite(suite, chosen, settings, on_progress):
                display.show_case(found, console)
                stored = records.merge(stored, found)
                records.write(out, stored)
                refused += sum(record["status"] == "refused" for record in found)
    except KeyboardInterrupt as error:
        error.add_note(f"the cases measured so far are in {out}")
        raise
    console.print(f"Results: {out}", soft_wrap=True)
    _update_table(options, [(out, stored)], console)
    _update_plots(options, [(out, stored)], plots, console)
    if refused:
        raise RefusedError(f"{refused} refused for a wrong result, see above")
    return 0


def _compare(options: Options, revision: str, console: Console) -> int:
    _refuse(options, "--against keeps no results", ("out", "table", "plot"))
    if not options.memory:
        raise UsageError("--against measures times only: leave out --no-memory")
    suite = _suite(options.suite)
    chosen = _cases(suite, options.only, options.dtype)
    settings = _settings(options)
    _need_device(suite)
    root = checkout.root()
    if root is None:
        raise UsageError(
            "--against compares commits of a checkout, and introkernels is not run from one here"
        )
    commit = commit_of(root, revision)
    check_library(root, suite.device)
    _warn_if_busy(environment.machine(suite.device), console)
    found: list[Comparison] = []
    worker = suite.name, settings.threads
    try:
        with (
            _ended_by_signals(),
            _progress(suite.name, chosen, console) as on_progress,
            tree_of(root, commit, suite.device, lambda s: on_progress(chosen[0], s, 0)) as tree,
            Process(tree, *worker, f"{revision} ({commit[:10]})") as before,
            Process(root, *worker, "this tree") as after,
        ):
            for case in chosen:

                def on_share(share: float, case: Case = case) -> None:
                    on_progress(case, "comparing", share)

                found += compare(before, after, case.name, settings.budget, on_share)
    finally:
        if found:
            display.show_comparisons(found, revision, commit, console)
    return 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A request to terminate ends this process as an interruption does, and all is cleared up."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


@contextmanager
def _progress(
    title: str, chosen: Sequence[Case], console: Console
) -> Iterator[Callable[[Case, str, float], None]]:
    """A bar over the chosen cases, and what moves it: case, stage and share of the case."""
    numbers = {case.name: number for number, case in enumerate(chosen)}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(title, total=len(chosen))

        def on_progress(case: Case, stage: str, share: float) -> None:
            progress.update(
                task, description=f"{case.name}: {stage}", completed=numbers[case.name] + share
            )

        yield on_progress


def _warn_if_busy(machine: dict[str, Any], console: Console) -> None:
    if environment.is_busy(machine):
        console.print(
            f"This machine is busy (load {machine['load']:.1f} on {machine['cores']} cores): "
            "times will be too long, and ratios uncertain."
        )


def _refuse(options: Options, because: str, names: Sequence[str]) -> None:
    """Raise UsageError if an option was given that means nothing here."""
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if given:
        raise UsageError(f"{because}: leave out {', '.join(given)}")


def _need_device(suite: Suite) -> None:
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--suite {suite.name} measures on a GPU, and torch {torch.__version__} sees none "
            f"(its CUDA: {torch.version.cuda}, its ROCm: {torch.version.hip})"
        )


def _need_room(out: Path) -> None:
    """Raise UsageError if a file can't be written where this one is to be."""
    if out.exists() and not out.is_file():
        raise UsageError(f"--out: {out} is no file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"--out: {out} can't be written: {error}") from error


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
    options: Options, found: Sequence[tuple[Path, Sequence[Record]]], console: Console
) -> None:
    """Make the tables of these files of records anew.

    Raises:
        UsageError: two files have results of the same suite, or the document no place for them.
    """
    if options.table is None:
        return
    sources: dict[str, Path] = {}
    for source, stored in found:
        for suite in dict.fromkeys(record["suite"] for record in stored):
            if sources.setdefault(suite, source) != source:
                raise UsageError(
                    f"--table: {sources[suite]} and {source} both have results of suite {suite}, "
                    "and a table is made from one file"
                )
    document = _document(options.table, list(sources))
    age_of = stale.ages(checkout.root())
    for source, stored in found:
        link = tables.relative_link(source, options.table)
        document = tables.put_into(document, stored, link, age_of)
    records.write_text(options.table, document)
    console.print(f"Table: {options.table}", soft_wrap=True)


def _plots(options: Options) -> Any:
    """The module that makes plots, where plots are wanted: it needs what others don't."""
    if options.plot is None:
        return None
    try:
        return importlib.import_module("introkernels.bench.plots")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise UsageError(
            "--plot needs matplotlib, which is not installed: pip install 'introkernels[bench]'"
        ) from error


def _update_plots(
    options: Options,
    found: Sequence[tuple[Path, Sequence[Record]]],
    plots: Any,
    console: Console,
) -> None:
    if options.plot is None:
        return
    together = [record for _, stored in found for record in stored]
    try:
        made = plots.plots(together, stale.ages(checkout.root()))
    except plots.PlotError as error:
        raise UsageError(f"--plot: {error}") from error
    for name, text in made.made.items():
        records.write_text(options.plot / name, text)
        console.print(f"Plot: {options.plot / name}", soft_wrap=True)
    for reason in made.skipped:
        console.print(f"No plot {reason}", soft_wrap=True)
