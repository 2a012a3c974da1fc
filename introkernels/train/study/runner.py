"""Carries a study out: tuning on validation images, then fresh seeds; resumable at any moment."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from introkernels.train import files, workers
from introkernels.train.config import TrainConfig, differences
from introkernels.train.engine import DivergedError, dataset_of, split_for
from introkernels.train.experiment import environment
from introkernels.train.methods import METHODS
from introkernels.train.runs import CHECKPOINT, epochs_of, fingerprint, train_run
from introkernels.train.study.plan import GROUPS, Plan

PLAN = "plan.json"
STUDY = "study.json"
# Seeds of trials, which no fresh run has.
FIRST_TUNING_SEED = 1000
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A run: an experiment of one method, and one of its seeds."""

    config: TrainConfig
    seed: int

    @property
    def method(self) -> str:
        return self.config.methods[0]

    @property
    def hash(self) -> str:
        """Of all that decides the numbers, but the seed."""
        identity = self.config.run_identity(self.method, self.seed)
        return fingerprint({name: value for name, value in identity.items() if name != "seed"})

    @property
    def epochs(self) -> int:
        """Epochs to train, with those of teachers."""
        return epochs_of(self.config, self.method)


def run_study(
    plan: Plan,
    out: Path,
    *,
    command: str,
    resume: bool = False,
    worker_count: int | None = None,
    device: str = "cpu",
    data_dir: str = "data",
    on_start: Callable[[str, int], None] = lambda stage, epochs: None,
    on_epoch: Callable[[int], None] = lambda epochs: None,
) -> dict[str, Any]:
    """Carry a plan out, and write `study.json`.

    Everything but times is decided by the plan and the machine: a study that was killed and
    resumed comes to the same results as one that was not. `on_start` is called with the name of a
    stage and its number of epochs, `on_epoch` with numbers of epochs done.

    Returns:
        The content of `study.json`: `plan`, `cells`, `methods`, `trials` (each with its mean
        validation metrics, or None where training diverged), `chosen` settings, and `runs`, one for
        each fresh seed.

    Raises:
        DirectoryError: `out` holds a study and `resume` is False, another study, or can't be
            written to.
        DirectoryBusyError: another process is at work in `out`.
        DataError: the data set is missing or too small.
    """
    cells = plan.list_cells()
    tuning = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + plan.tuning_seeds)
    fresh = range(plan.seeds)

    def config(cell: int, method: str, settings: dict[str, Any], seeds: range) -> TrainConfig:
        return plan.config(
            cells[cell],
            method,
            settings,
            device=device,
            data_dir=data_dir,
            first_seed=seeds[0],
            seeds=len(seeds),
        )

    first = config(0, next(iter(plan.methods)), plan.settings(next(iter(plan.methods)))[0], fresh)
    dataset = dataset_of(first)
    with files.only_writer(out):
        files.claim(out, PLAN, plan.to_dict(), kind="a study", resume=resume, problems=differences)
        files.remove_leftovers(out)
        carry_out = partial(
            _carry_out, out=out, worker_count=worker_count, device=device, on_epoch=on_epoch
        )

        tried = [
            {"cell": cell, "method": method, "trial": trial, "settings": settings}
            for cell, method in itertools.product(range(len(cells)), plan.methods)
            for trial, settings in enumerate(plan.settings(method))
        ]
        configs = [config(t["cell"], t["method"], t["settings"], tuning) for t in tried]
        for one in configs:
            split_for(one, tuning[0])
        jobs = [Job(one, seed) for one in configs for seed in tuning]
        on_start("tuning", sum(job.epochs for job in jobs))
        records = carry_out(jobs)
        for number, trial in enumerate(tried):
            group = records[number * len(tuning) : (number + 1) * len(tuning)]
            trial["validation"] = _mean_validation(group)
            trial["hash"] = jobs[number * len(tuning)].hash

        chosen = [
            _best([t for t in tried if (t["cell"], t["method"]) == (cell, method)])
            for cell, method in itertools.product(range(len(cells)), plan.methods)
        ]
        jobs = [
            Job(config(c["cell"], c["method"], c["settings"], fresh), seed)
            for c in chosen
            for seed in fresh
        ]
        on_start("fresh seeds", sum(job.epochs for job in jobs))
        records = carry_out(jobs)
        runs = [
            {
                **{name: c[name] for name in ("cell", "method", "hash")},
                "seed": job.seed,
                **_told(record),
            }
            for (c, _), job, record in zip(
                itertools.product(chosen, fresh), jobs, records, strict=True
            )
        ]
        study = {
            "name": plan.name,
            "command": command,
            "plan_hash": plan.hash,
            "plan": plan.to_dict(),
            "environment": environment(),
            "synthetic": dataset.synthetic,
            "dataset_description": dataset.description,
            "representative": plan.representative,
            "margin": plan.margin,
            "trials_per_method": plan.trials,
            "tuning_seeds": list(tuning),
            "seeds": list(fresh),
            "cells": [
                {"name": cell.name}
                | {
                    name: getattr(config(number, next(iter(plan.methods)), {}, fresh), name)
                    for name in ("dataset", "train_size", "label_noise", "model")
                }
                for number, cell in enumerate(cells)
            ],
            "methods": [
                {
                    "name": name,
                    "group": group_of(plan.registered(name)),
                    "summary": METHODS[plan.registered(name)].summary,
                    "source": METHODS[plan.registered(name)].source,
                    "space": plan.searched(name),
                }
                for name in plan.methods
            ],
            "trials": tried,
            "chosen": [
                {name: c[name] for name in ("cell", "method", "settings", "hash")} for c in chosen
            ],
            "runs": runs,
        }
        files.write_json(out / STUDY, study)
        return study


def group_of(method: str) -> str:
    """What a method is compared as."""
    if method in GROUPS:
        return GROUPS[method]
    return "introspective" if METHODS[method].introspective else "component"


def _carry_out(
    jobs: Sequence[Job],
    *,
    out: Path,
    worker_count: int | None,
    device: str,
    on_epoch: Callable[[int], None],
) -> list[Record]:
    """The record of each job, in their order."""
    if worker_count is None:
        worker_count = workers.usable_cores() if device == "cpu" else 1
    numbered = workers.run_all(
        partial(_run, out),
        list(enumerate(jobs)),
        workers=min(worker_count, len(jobs)),
        on_progress=on_epoch,
    )
    found = dict(numbered)
    return [found[number] for number in range(len(jobs))]


def _run(out: Path, numbered: tuple[int, Job], report: Callable[[int], None]) -> tuple[int, Record]:
    """The record of a job: read, if it is finished or known to diverge, or else made."""
    number, job = numbered
    directory = out / "runs" / job.hash / f"seed{job.seed}"
    finished, failure = directory / "metrics.json", directory / "failure.json"
    for file in (finished, failure):
        if file.exists():
            record: Record = files.read_json(
                file, remedy="Delete it and resume: this run is then trained again."
            )
            if record["finished"] or "failure" in record:
                report(job.epochs)
                return number, record
    try:
        record = train_run(
            job.config,
            job.method,
            job.seed,
            directory,
            teachers=out / "teachers",
            on_epoch=report,
        )
    except DivergedError as error:
        record = {"finished": False, "failure": str(error)}
        files.write_json(failure, record)
    # Thousands of runs are trained, and nobody asks for their weights.
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return number, record


def _mean_validation(records: Sequence[Record]) -> dict[str, float] | None:
    """Mean validation metrics after the last epoch; None if a run diverged."""
    if not all(record["finished"] for record in records):
        return None
    return {
        name: statistics.fmean(record["history"][-1][f"validation_{name}"] for record in records)
        for name in ("accuracy", "nll", "ece")
    }


def _best(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The trial of the best validation accuracy, of the lowest NLL among equals; then the first."""

    def quality(trial: dict[str, Any]) -> tuple[float, float]:
        found = trial["validation"]
        return (-1.0, 0.0) if found is None else (found["accuracy"], -found["nll"])

    return max(trials, key=quality)


def _told(record: Record) -> Record:
    """What a study keeps of a run."""
    if not record["finished"]:
        return {"test": None, "failure": record["failure"]}
    names = ("test", "best", "wall_seconds", "teacher_seconds", "step_milliseconds")
    last = record["history"][-1]
    validation = {name: last[f"validation_{name}"] for name in record["test"]}
    return {name: record[name] for name in names} | {"validation": validation}
