"""`introkernels study`: from a plan to verdicts, tables and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from introkernels.train import cli, files
from introkernels.train.progress import progress_bar
from introkernels.train.study import report
from introkernels.train.study.plan import Plan, PlanError, load, load_preset, presets
from introkernels.train.study.runner import PLAN, run_study

DESCRIPTION = f"""Compare training methods on fresh seeds, each tuned with as many trials.

Settings are chosen on validation images alone; test images only tell how good the choice was. The
report gives every difference with its 95 % interval, and says in words what is supported and what
is not. Presets: {", ".join(presets())}."""

EXIT_STATUS = cli.EXIT_STATUS | {PlanError: 2}


@dataclass(frozen=True)
class Options:
    """What to study, and where to write."""

    preset: str | None = None
    """A plan that comes with the package: quick takes minutes on two cores, digits less than an
    hour; cifar100 is for a GPU and wants the data set's files."""
    plan: Path | None = None
    """A plan of your own, a TOML file; see docs/study.md."""
    out: Path | None = None
    """Directory for everything that is written. None: runs/study-NAME."""
    resume: bool = False
    """Continue what is in that directory, if anything."""
    methods: tuple[str, ...] | None = None
    """Only these methods of the plan, and the introspective one that the verdicts are about. Their
    rows are those of the whole study. None: all."""
    workers: int | None = None
    """Runs trained side by side. None: one for each CPU core, but only one on other devices."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, mps, ..."""
    data_dir: str = "data"
    """Folder with the files of data sets that come with no package."""
    progress: bool = True
    """Show a progress bar with an estimate of the time left."""

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.plan is None):
            raise PlanError(
                f"preset, plan: got {'none' if self.plan is None else 'both'}, expected one of them"
            )
        if self.workers is not None and self.workers < 1:
            raise PlanError(f"workers: got {self.workers}, expected at least 1")

    def chosen_plan(self) -> Plan:
        """The plan asked for, with the methods asked for."""
        plan = load(self.plan) if self.plan is not None else load_preset(self.preset or "")
        return plan if self.methods is None else plan.only(self.methods)

    @property
    def command(self) -> str:
        """What makes the same numbers again."""
        words = ["introkernels study"]
        words.append(f"--plan {self.plan.name}" if self.plan else f"--preset {self.preset}")
        if self.methods is not None:
            words.append(f"--methods {' '.join(self.methods)}")
        if self.device != "cpu":
            words.append(f"--device {self.device}")
        return " ".join(words)


def main(arguments: Sequence[str]) -> int:
    """Run `introkernels study`; returns the exit status.

    0: done; 1: a study failed; 2: the call was wrong; 130: interrupted. What isn't 0 is an error
    that this raises and `introkernels.cli` tells.
    """
    console = Console()
    options = tyro.cli(
        Options,
        prog="introkernels study",
        description=DESCRIPTION,
        args=list(arguments),
    )
    plan = options.chosen_plan()
    out = options.out or Path("runs") / f"study-{plan.name}"
    if options.resume and files.stored(out, PLAN) is None:
        cli.say_afresh(console, out)
    with cli.resumable():
        study = _run(plan, out, options, console)
        written = report.write(study, out)
    console.print(report.verdicts(study))
    console.print(f"Report: {written['html']}", soft_wrap=True)
    return 0


def _run(plan: Plan, out: Path, options: Options, console: Console) -> dict[str, object]:
    with progress_bar(console, shown=options.progress) as progress:
        tasks = []

        def start(stage: str, epochs: int) -> None:
            tasks.append(progress.add_task(f"{stage}, epochs", total=epochs))

        return run_study(
            plan,
            out,
            command=options.command,
            resume=options.resume,
            worker_count=options.workers,
            device=options.device,
            data_dir=options.data_dir,
            on_start=start,
            on_epoch=lambda epochs: progress.advance(tasks[-1], epochs),
        )
