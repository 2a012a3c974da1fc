"""An experiment: methods × seeds in one directory that can always be resumed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import introkernels as ik
from introkernels.checkout import commit
from introkernels.train import files, summary, workers
from introkernels.train.config import TrainConfig, differences
from introkernels.train.distributed import Processes
from introkernels.train.engine import split_for
from introkernels.train.runs import epochs_of, train_run

CONFIG = "config.json"
SUMMARY = "summary.json"


def run_directory(out: Path, method: str, seed: int) -> Path:
    return out / "runs" / method / f"seed{seed}"


def epochs_in_all(config: TrainConfig) -> int:
    """What `run_experiment` tells `on_epoch` by and by."""
    return config.seeds * sum(epochs_of(config, method) for method in config.methods)


def run_experiment(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    worker_count: int | None = None,
    checkpoint_every: int = 10,
    tensorboard: bool = True,
    on_epoch: Callable[[int], None] = lambda epochs: None,
) -> dict[str, Any]:
    """Train every method with every seed and write everything but the report.

    Results don't depend on `worker_count` (default: one process for each usable core; one process
    if not on the CPU); under `torchrun` its processes train each run together. `on_epoch` is called
    with numbers of epochs done. Returns the content of `summary.json`. A resumed experiment ends
    with the bits of an undisturbed one on the same machine, torch and backend of introkernels.

    Raises:
        DirectoryError: `out` holds runs and `resume` is False, they are of another experiment, or
            it can't be written to.
        CheckpointError: a checkpoint is damaged.
        OSError: a file can't be written; what was written before continues.
        DirectoryBusyError: another process is training in `out`.
        DataError: the data set is too small for the split.
        DivergedError: a loss is not finite.
    """
    split_for(config, config.first_seed)
    first = Processes().first
    with files.only_writer(out) if first else nullcontext():
        if first:
            files.claim(
                out,
                CONFIG,
                config.to_dict(),
                kind="an experiment",
                resume=resume,
                problems=_problems,
            )
            files.remove_leftovers(out)
        Processes().wait()
        jobs = [(method, seed) for seed in config.seed_list for method in config.methods]
        if Processes().count > 1:
            worker_count = 1
        elif worker_count is None:
            worker_count = workers.usable_cores() if config.device == "cpu" else 1
        records = list(
            workers.run_all(
                partial(_run, config, out, checkpoint_every, tensorboard),
                jobs,
                workers=min(worker_count, len(jobs)),
                on_progress=on_epoch,
            )
        )
        result = {
            "config": config.to_dict(),
            "environment": environment(),
            **summary.summarise(records, list(config.methods)),
        }
        if first:
            files.write_json(out / SUMMARY, result)
            files.write_text(out / "summary.csv", summary.table_csv(result))
        return result


def environment() -> dict[str, Any]:
    """Versions and machine that the numbers come from."""
    return {
        "introkernels": ik.__version__,
        "commit": commit(),
        "backends": ik.backends.status(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": workers.usable_cores(),
    }


def stored_config(out: Path) -> TrainConfig | None:
    """The experiment that `out` holds; None where there is none.

    Raises:
        DirectoryError: what stands there is no experiment that this version can continue.
    """
    found = files.stored(out, CONFIG)
    if found is None:
        return None
    try:
        return TrainConfig.from_dict(found)
    except (KeyError, TypeError, ValueError) as error:
        raise files.DirectoryError(
            f"{out / CONFIG} does not describe an experiment of this version ({error}). Choose "
            "another --out, or delete the directory."
        ) from error


def _run(
    config: TrainConfig,
    out: Path,
    checkpoint_every: int,
    tensorboard: bool,
    job: tuple[str, int],
    report: Callable[[int], None],
) -> dict[str, Any]:
    method, seed = job
    return train_run(
        config,
        method,
        seed,
        run_directory(out, method, seed),
        teachers=out / "teachers",
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        on_epoch=report,
    )


def _problems(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Why an experiment can't continue another.

    More methods and more seeds are fine: runs are independent. Fewer are not: the summary would
    leave out runs that exist.
    """
    problems = []
    found, wanted = dict(found), dict(wanted)
    for name in ("methods", "seeds"):
        dropped = [value for value in found.pop(name, []) if value not in wanted[name]]
        del wanted[name]
        if dropped:
            listed = " ".join(str(value) for value in dropped)
            problems.append(f"{name}: {listed} there, not asked for")
    settings = wanted["hyperparameters"]
    wanted["hyperparameters"] = {
        name: value for name, value in settings.items() if name in found.get("hyperparameters", {})
    }
    found["hyperparameters"] = {
        name: value for name, value in found.get("hyperparameters", {}).items() if name in settings
    }
    return problems + differences(found, wanted)
