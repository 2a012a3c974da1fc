"""Files that are always whole, and directories that only one process writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_TEMPORARY = ".tmp"


class DirectoryBusyError(RuntimeError):
    """Another process holds the directory."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that after a crash at any moment it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed process left of half-written files."""
    for leftover in directory.rglob(f".*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold a directory; the hold ends with the process, however that ends.

    Raises:
        DirectoryBusyError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise DirectoryBusyError(f"{directory}: another process is training there") from error


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Hold a directory, after waiting for whoever holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):
        yield


def _sync_directory(directory: Path) -> None:
    """Make a rename last through a power failure, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
