"""Runs in directories: trained to the end, from a checkpoint where there is one, teachers first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from introkernels.train import checkpoint, files, records
from introkernels.train.classifier import Classifier
from introkernels.train.config import TrainConfig
from introkernels.train.distributed import Processes
from introkernels.train.engine import Run, image_shape_and_classes, reproducible
from introkernels.train.models import make_model

CHECKPOINT = "checkpoint.pt"


def train_run(
    config: TrainConfig,
    method: str,
    seed: int,
    directory: Path,
    *,
    teachers: Path,
    checkpoint_every: int = 10,
    tensorboard: bool = False,
    on_epoch: Callable[[int], None] = lambda epochs: None,
) -> dict[str, Any]:
    """Train one run to its end, from its checkpoint in `directory` if there is one.

    Everything written is a function of the last checkpoint: it is saved first, so a process killed
    at any moment leaves a directory that continues to the same result. A method's teacher is
    trained before, in a directory below `teachers` that is named by what decides its weights: runs
    that ask for the same one share it, also at the same time. `on_epoch` is called with the number
    of epochs done since it was called last, those of teachers among them. Returns the record in
    `metrics.json`.

    Raises:
        CheckpointError: a checkpoint is damaged, or doesn't fit the run.
        DivergedError: a loss is not finite.
    """
    processes = Processes()
    teacher, teacher_seconds = _taught_by(
        config,
        method,
        seed,
        teachers,
        checkpoint_every=checkpoint_every,
        on_epoch=on_epoch,
    )
    with reproducible(config):
        run = Run(config, method, seed, teacher)
        path = directory / CHECKPOINT
        resumed = checkpoint.restore(path, run.identity, run.restore)
        # The first may write a newer one before others have read this one.
        processes.wait()
        if resumed:
            on_epoch(run.epoch)

        def record() -> dict[str, Any]:
            return run.record() | {"teacher_seconds": teacher_seconds}

        with records.tensorboard(
            directory,
            wanted=tensorboard and not run.finished and processes.first,
            first_epoch=run.epoch + 1,
        ) as log:
            while not run.finished:
                run.train_epoch()
                log(run.epoch, run.history[-1])
                due = run.finished or run.epoch % checkpoint_every == 0
                if due and processes.first:
                    checkpoint.save(path, run.state())
                    if not run.finished:
                        records.write_run(directory, record())
                on_epoch(1)
        if processes.first:
            records.write_run(directory, record())
        return record()


def epochs_of(config: TrainConfig, method: str) -> int:
    """Epochs of a run with those of its teachers, which is what `on_epoch` counts."""
    taught_by = config.teacher_of(method)
    return config.epochs + (0 if taught_by is None else epochs_of(*taught_by))


def fingerprint(identity: Any) -> str:
    """Twelve hexadecimal digits that tell plain values apart."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def load_model(config: TrainConfig, method: str, seed: int, directory: Path) -> Classifier:
    """The trained model of a run, in evaluation mode on the CPU.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or not one of this run.
    """
    path = directory / CHECKPOINT
    model = make_model(config.model, *image_shape_and_classes(config))

    def take(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])

    if not checkpoint.restore(path, config.run_identity(method, seed), take):
        raise checkpoint.CheckpointError(
            f"{path} does not exist. Resume the experiment: this run is then trained."
        )
    return model.eval()


def _taught_by(
    config: TrainConfig,
    method: str,
    seed: int,
    teachers: Path,
    *,
    checkpoint_every: int,
    on_epoch: Callable[[int], None],
) -> tuple[Classifier | None, float]:
    """The trained teacher of a method, and what it took with the teachers of its own; or None."""
    taught_by = config.teacher_of(method)
    if taught_by is None:
        return None, 0.0
    config, method = taught_by
    directory = teachers / fingerprint(config.run_identity(method, seed))
    with files.one_at_a_time(directory) if Processes().first else nullcontext():
        record = train_run(
            config,
            method,
            seed,
            directory,
            teachers=teachers,
            checkpoint_every=checkpoint_every,
            on_epoch=on_epoch,
        )
        Processes().wait()
        model = load_model(config, method, seed, directory)
    return model, record["wall_seconds"] + record["teacher_seconds"]
