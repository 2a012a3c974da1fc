"""Whether a peer is there, without importing it."""

from __future__ import annotations

from functools import partial
from importlib import metadata
from importlib.util import find_spec

from introkernels.bench.model import Missing


def needs(module: str) -> Missing:
    """What tells why ``module`` can't be used: ``"not installed"``, or None where it is there."""
    return partial(_not_installed, module)


def version_of(distribution: str) -> str | None:
    """``"liger-kernel 0.8.5"``, or None where it is not installed."""
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return None


def _not_installed(module: str) -> str | None:
    return None if find_spec(module) is not None else "not installed"
