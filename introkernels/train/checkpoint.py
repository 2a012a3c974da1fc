"""Checkpoints of one run: everything that its future depends on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from introkernels.train import files
from introkernels.train.config import differences

FORMAT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that can't be continued: the message names the file and what to do."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values; it is never seen half-written."""
    buffer = io.BytesIO()
    torch.save(state | {"format": FORMAT}, buffer)
    files.write_bytes(path, buffer.getvalue())


def load(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read a checkpoint of the run with that identity; None where there is none yet.

    Raises:
        CheckpointError: the file is damaged, of another format or of another run.
    """
    if not path.exists():
        return None
    remedy = f"Delete {path} and resume again: this run then starts from its first epoch."
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:  # torch.load raises almost anything on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} can't be read ({reason}). {remedy}") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}, expected {FORMAT}. {remedy}")
    changed = differences(state["identity"], identity)
    if changed:
        raise CheckpointError(f"{path} is of another run ({'; '.join(changed)}). {remedy}")
    return state
