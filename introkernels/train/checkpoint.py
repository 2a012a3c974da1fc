"""Checkpoints of one run: everything that its future depends on."""

from __future__ import annotations

import hashlib
import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from introkernels.train import files
from introkernels.train.config import differences

FORMAT = 3


class CheckpointError(RuntimeError):
    """A checkpoint that can't be continued: the message names the file and what to do."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values; it is never seen half-written.

    The file is an archive of `torch.save`, which `torch.load` reads, and after it the SHA-256 of
    the archive: `torch.load` looks at none of the archive's own checksums.
    """
    buffer = io.BytesIO()
    torch.save(state | {"format": FORMAT}, buffer)
    buffer.write(_digest(buffer.getbuffer()))
    files.write_bytes(path, buffer.getvalue())


def restore(path: Path, identity: dict[str, Any], take: Callable[[dict[str, Any]], None]) -> bool:
    """Hand the state in a checkpoint to `take`; False where there is no checkpoint yet.

    Args:
        path: the file.
        identity: what tells the run from others.
        take: called with the state; what it raises means that the state doesn't fit.

    Raises:
        CheckpointError: the file is damaged, of another format or of another run, or `take` failed.
    """
    if not path.exists():
        return False
    remedy = f"Delete {path} and resume again: this run then starts from its first epoch."
    # Damage that the digest shows, and a file without one, raise almost anything.
    try:
        content = path.read_bytes()
        size = len(content) - hashlib.sha256().digest_size
        if content[size:] != _digest(memoryview(content)[:size]):
            raise ValueError("it is damaged, or an earlier version wrote it: its SHA-256 is wrong")
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
        found = state["format"]
    except Exception as error:
        raise CheckpointError(f"{path} can't be read ({_reason(error)}). {remedy}") from error
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}, expected {FORMAT}. {remedy}")
    changed = differences(state.get("identity", {}), identity)
    if changed:
        raise CheckpointError(f"{path} is of another run ({'; '.join(changed)}). {remedy}")
    try:
        take(state)
    except Exception as error:
        raise CheckpointError(
            f"{path} doesn't fit this run ({_reason(error)}). {remedy}"
        ) from error
    return True


def check_layout(found: Any, wanted: Any, name: str = "state") -> None:
    """Raise ValueError where a state lacks a field of another, or a tensor has another shape."""
    if isinstance(wanted, Tensor):
        if found.shape != wanted.shape:
            shapes = f"{list(found.shape)}, expected {list(wanted.shape)}"
            raise ValueError(f"{name} has shape {shapes}")
    elif isinstance(wanted, (dict, list)):
        there = _fields(found)
        for field, value in _fields(wanted).items():
            if field not in there:
                raise ValueError(f"{name}.{field} is missing")
            check_layout(there[field], value, f"{name}.{field}")


def _fields(value: Any) -> dict[Any, Any]:
    return dict(value.items() if isinstance(value, dict) else enumerate(value))


def _digest(content: memoryview) -> bytes:
    return hashlib.sha256(content).digest()


def _reason(error: Exception) -> str:
    """One line for what may be a page."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
