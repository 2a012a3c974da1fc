"""What serves the losses here: the compiled backends, their state and their build."""

from __future__ import annotations

from typing import Any

import torch

from introkernels._version import __version__
from introkernels.ops import loader


def status() -> dict[str, str]:
    """For each of ``"cpu"``, ``"cuda"`` and ``"triton"``: ``"loaded"``, or the reason why not."""
    return dict(loader.STATUS)


def build_info() -> dict[str, Any]:
    """What this install was built with.

    Always ``version``, ``torch`` (the one running) and ``backends`` (as :func:`status`). A compiled
    install adds what its build recorded: compiler, flags, the torch it was built against, the
    stable ABI it targets, the libraries built and their architectures.
    """
    try:
        from introkernels import _C
    except ImportError:
        recorded: dict[str, Any] = {}
    else:
        recorded = dict(_C.build_info())
    return {
        **recorded,
        "version": __version__,
        "torch": str(torch.__version__),
        "backends": status(),
    }
