"""`introkernels train`: from the command line to the table and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from introkernels.explain import MethodComparison
from introkernels.train import audit, report
from introkernels.train.checkpoint import CheckpointError
from introkernels.train.config import ConfigError, TrainConfig
from introkernels.train.data import DataError
from introkernels.train.distributed import Processes, started_by_torchrun
from introkernels.train.engine import DivergedError
from introkernels.train.experiment import epochs_in_all, run_experiment, stored_config
from introkernels.train.files import DirectoryError
from introkernels.train.findings import readable
from introkernels.train.progress import progress_bar
from introkernels.train.workers import WorkerLostError

DESCRIPTION = """Train a small network by several methods over several seeds, and write a report.

Without options: seven methods, twelve seeds, one hundred handwritten digits to learn from; about
two minutes on two cores. Results do not depend on the number of workers.

`torchrun --nproc-per-node N -m introkernels train ...` trains each run by N processes together."""

EXIT_STATUS: dict[type[Exception], int] = {
    ConfigError: 2,
    DataError: 2,
    DirectoryError: 2,
    CheckpointError: 1,
    DivergedError: 1,
    WorkerLostError: 1,
    OSError: 1,
}
"""The errors that a user is told in one line, and how the command then ends."""


@dataclass(frozen=True)
class Options:
    """Where to, and how to get there. Only `explain` is a choice of what to train."""

    out: Path = Path("runs/digits")
    """Directory for everything that is written."""
    resume: bool = False
    """Continue what is in that directory, if anything. Its settings are the defaults then; more
    seeds and methods may be asked for."""
    workers: int | None = None
    """Runs trained side by side. None: one for each CPU core, but only one on other devices."""
    checkpoint_every: int = 10
    """Epochs between two checkpoints."""
    tensorboard: bool = True
    """Write TensorBoard files too, if that is installed."""
    progress: bool = True
    """Show a progress bar."""
    explain: tuple[str, ...] | None = None
    """How to explain: exact, sketch, projection, head, one or several. The methods that do so take
    the place of the introspective ones among --methods. None: --methods are trained as they are."""
    explain_audit: bool = False
    """After training, compare these explanations with the exact ones on validation images: how
    alike they are, and what they cost. Written to explain_audit.json too."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    """The experiment."""

    def __post_init__(self) -> None:
        for name in ("workers", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        self.experiment()

    def experiment(self) -> TrainConfig:
        """What to train: the configuration, with the explanations asked for."""
        return self.config if self.explain is None else self.config.explained_by(self.explain)


def main(arguments: Sequence[str]) -> int:
    """Run `introkernels train`; returns the exit status.

    0: done; 1: training failed; 2: the call was wrong; 130: interrupted. What isn't 0 is an error
    that this raises and `introkernels.cli` tells.
    """
    console = Console()
    options = _parse(arguments, Options())
    if options.resume and (stored := stored_config(options.out)) is not None:
        options = _parse(arguments, Options(config=stored))
    with resumable():
        with started_by_torchrun(options.config.device) as device:
            config = dataclasses.replace(options.config, device=device)
            summary = _train(dataclasses.replace(options, config=config), console)
            if not Processes().first:
                return 0
        path = _report(options, console)
        audited = audit.write(options.experiment(), options.out) if options.explain_audit else None
    console.print(_table(summary))
    if audited is not None:
        for state in ("untrained", "trained"):
            console.print(_audit_table(audited, state))
    console.print(f"Report: {path}", soft_wrap=True)
    return 0


@contextmanager
def resumable() -> Iterator[None]:
    """Add to an interruption and to errors of the file system how to go on after them."""
    again = "the same command with --resume continues"
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(again)
        raise
    except OSError as error:
        error.add_note(f"when that is mended, {again}")
        raise


def say_afresh(console: Console, out: Path) -> None:
    """Tell a user who wants to resume that nothing is there."""
    console.print(f"{out} holds nothing to resume: starting afresh", soft_wrap=True, markup=False)


def _parse(arguments: Sequence[str], default: Options) -> Options:
    return tyro.cli(
        Options,
        prog="introkernels train",
        description=DESCRIPTION,
        args=list(arguments),
        default=default,
    )


def _train(options: Options, console: Console) -> dict[str, Any]:
    config = options.experiment()
    runs = len(config.methods) * config.seeds
    if options.resume and Processes().first and stored_config(options.out) is None:
        say_afresh(console, options.out)
    with progress_bar(console, shown=options.progress and Processes().first) as progress:
        task = progress.add_task(f"{runs} runs, epochs", total=epochs_in_all(config))
        return run_experiment(
            config,
            options.out,
            resume=options.resume,
            worker_count=options.workers,
            checkpoint_every=options.checkpoint_every,
            tensorboard=options.tensorboard,
            on_epoch=lambda epochs: progress.advance(task, epochs),
        )


def _report(options: Options, console: Console) -> Path:
    with progress_bar(console, shown=options.progress) as progress:
        task = progress.add_task("report, explanations", total=None)
        return report.write(
            options.experiment(),
            options.out,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _table(summary: dict[str, Any]) -> Table:
    title = "Test images: mean ± standard deviation over seeds"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("accuracy %", "NLL", "ECE %", "s per run", "runs"):
        table.add_column(name, justify="right", no_wrap=True)
    for method, row in summary["methods"].items():
        cells = report.cells(row)
        shown = [cells[name] for name in ("accuracy", "nll", "ece")]
        # Without its spread, so that the table fits into 80 columns.
        seconds = f"{row['wall_seconds']['mean']:.1f}"
        table.add_row(method, *shown, seconds, str(row["runs"]))
    return table


def _audit_table(audited: audit.Audit, state: str) -> Table:
    comparison: MethodComparison = getattr(audited, state)
    title = (
        f"Explanations, {state} ({readable(audited.method)}, seed {audited.seed}, "
        f"{audited.images} validation images)"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("correlation", "mean error", "same top", "ms", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in comparison.rows:
        table.add_row(*comparison.cells(row))
    table.caption = f"Recommended: {comparison.recommended}"
    table.caption_justify = "left"
    return table
