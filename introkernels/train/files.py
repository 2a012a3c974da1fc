"""Files that are always whole, and directories that only one process writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_TEMPORARY = ".tmp"


class DirectoryError(RuntimeError):
    """A directory can't take what is to be written: the message says why and what to do."""


class DirectoryBusyError(DirectoryError):
    """Another process holds the directory."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that after a crash at any moment it is the old one or the new one.

    Raises:
        OSError: it can't be written, and is what it was; the error names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in errors of the system: a full disk is noticed by a write, which names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        DirectoryError: it can't be read; the message ends with the remedy.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, expected an object")
    except (OSError, ValueError) as error:
        raise DirectoryError(f"{path} can't be read ({error}). {remedy}") from error
    return found


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed process left of half-written files."""
    for leftover in directory.rglob(f".*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def stored(directory: Path, name: str) -> dict[str, Any] | None:
    """The JSON file that describes what a directory holds; None where nothing is there yet.

    Raises:
        DirectoryError: it can't be read, or there are runs without it.
    """
    path = directory / name
    if path.exists():
        return read_json(path, remedy="Choose another --out, or delete the directory.")
    if (directory / "runs").exists():
        raise DirectoryError(
            f"{directory} holds runs but no {name}. Choose another --out, or delete the directory."
        )
    return None


def claim(
    directory: Path,
    name: str,
    content: dict[str, Any],
    *,
    kind: str,
    resume: bool,
    problems: Callable[[dict[str, Any], dict[str, Any]], list[str]],
) -> None:
    """Write the JSON file that describes what a directory holds, if that continues what is there.

    Args:
        directory: where to.
        name: of the file.
        content: the description.
        kind: what is described: "an experiment" or "a study".
        resume: whether anything may be there.
        problems: why a description, the first, can't be continued as another.

    Raises:
        DirectoryError: something is there and `resume` is False, or it can't be continued.
    """
    found = stored(directory, name)
    if found is not None:
        if not resume:
            raise DirectoryError(
                f"{directory} already holds {kind}. Continue it with --resume, choose another "
                "--out, or delete the directory."
            )
        if reasons := problems(found, content):
            raise DirectoryError(
                f"{directory} holds {kind} of other settings: {'; '.join(reasons)}. Ask for the "
                "same, or choose another --out."
            )
    write_json(directory / name, content)


def only_writer(directory: Path) -> AbstractContextManager[Any]:
    """Hold a directory; the hold ends with the process, however that ends.

    Raises:
        DirectoryBusyError: another process holds it.
        DirectoryError: it can't be made, or written to.
    """
    try:
        return _hold(directory, timeout=0)
    except Timeout as error:
        raise DirectoryBusyError(
            f"{directory}: another process is training there. Wait for it, or choose another --out."
        ) from error
    except OSError as error:
        raise DirectoryError(
            f"{directory} can't be written to ({error}). Choose another --out."
        ) from error


def one_at_a_time(directory: Path) -> AbstractContextManager[Any]:
    """Hold a directory, after waiting for whoever holds it."""
    return _hold(directory, timeout=-1)


def _hold(directory: Path, timeout: float) -> AbstractContextManager[Any]:
    directory.mkdir(parents=True, exist_ok=True)
    return FileLock(directory / ".lock").acquire(timeout)


def _sync_directory(directory: Path) -> None:
    """Make a rename last through a power failure, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
