"""What a run leaves to read: JSON, CSV and, where it is installed, TensorBoard."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from introkernels.train import files


def write_run(directory: Path, record: dict[str, Any]) -> None:
    """Write `metrics.json` (the whole record) and `metrics.csv` (a row for each epoch)."""
    files.write_json(directory / "metrics.json", record)
    files.write_text(directory / "metrics.csv", pd.DataFrame(record["history"]).to_csv(index=False))


class TensorBoard:
    """Writes scalars of a run for TensorBoard; does nothing if that isn't installed or wanted."""

    def __init__(self, directory: Path, *, wanted: bool, first_epoch: int) -> None:
        self._writer: Any = None
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        # Epochs after the checkpoint that a killed process has logged are trained again.
        self._writer = SummaryWriter(directory / "tensorboard", purge_step=first_epoch)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def log(self, epoch: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name.replace("_", "/", 1), value, epoch)
