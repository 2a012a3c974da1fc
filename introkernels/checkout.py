"""The git checkout that the package runs from, and questions to git about it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import introkernels as ik

_SECONDS = 60
# What counts as the code of a result; results lie beside it and change with it.
_CODE = ("introkernels", "csrc", "setup.py", "setup_cuda.py", "pyproject.toml")


class GitError(RuntimeError):
    """git is missing or refuses; says what it was asked and what it answered."""


def root() -> Path | None:
    """The project's folder in the checkout; None for an installed package, or without git."""
    package = Path(ik.__file__).resolve().parent
    try:
        git(package, "ls-files", "--error-unmatch", Path(ik.__file__).name)
    except GitError:
        return None
    return package.parent


def commit() -> dict[str, Any] | None:
    """Revision of the checkout that the package runs from, and whether its code was changed.

    None for an installed package, even one installed below some other checkout.
    """
    folder = root()
    if folder is None:
        return None
    try:
        revision = git(folder, "rev-parse", "HEAD")
        changes = git(folder, "status", "--porcelain", "--", *_CODE)
    except GitError:
        return None
    return {"revision": revision, "changed": bool(changes)}


def git(folder: Path, *arguments: str) -> str:
    """What ``git arguments`` answers in ``folder``, without the white space around it.

    Raises:
        GitError: there is no git, or it ends with another status than 0.
    """
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip() or f"status {error.returncode}"
        raise GitError(f"git {' '.join(arguments)}: {said}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise GitError(f"git {' '.join(arguments)}: {error}") from error
    return answer.stdout.strip()
