"""What a run leaves to read: JSON, CSV and, where it is installed, TensorBoard."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from introkernels.train import files


def write_run(directory: Path, record: dict[str, Any]) -> None:
    """Write `metrics.json` (the whole record) and `metrics.csv` (a row for each epoch)."""
    files.write_json(directory / "metrics.json", record)
    files.write_text(directory / "metrics.csv", pd.DataFrame(record["history"]).to_csv(index=False))


@contextmanager
def tensorboard(
    directory: Path, *, wanted: bool, first_epoch: int
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A function that logs scalars of an epoch; does nothing if TensorBoard isn't there or wanted.

    Raises:
        OSError: the files can't be written; the error names their directory.
    """
    place = directory / "tensorboard"
    with _errors_of_files_end_threads_quietly():
        with files.naming(place):
            writer = _writer(place, first_epoch) if wanted else None

        def log(epoch: int, values: dict[str, float]) -> None:
            if writer is not None:
                with files.naming(place):
                    for name, value in values.items():
                        writer.add_scalar(name.replace("_", "/", 1), value, epoch)

        try:
            yield log
        finally:
            if writer is not None:
                with files.naming(place):
                    writer.close()


def _writer(place: Path, first_epoch: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # Epochs after the checkpoint that a killed process has logged are trained again.
    return SummaryWriter(place, purge_step=first_epoch)


@contextmanager
def _errors_of_files_end_threads_quietly() -> Iterator[None]:
    """TensorBoard's thread prints the traceback of an error that its next caller gets anyway."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            usual(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual
