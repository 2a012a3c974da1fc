"""The CUDA backend on CPU tensors: its sources, compiled for the CPU, run under the emulation."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from helpers import emulation
from introkernels.ops import composite, loader, schema, select
from introkernels.ops.head.operators import register_head

NAMESPACE = "introkernels_emulated"
# A library to load instead, which was made of other sources.
LIBRARY_VARIABLE = "INTROKERNELS_EMULATED_LIBRARY"


def sources() -> list[Path]:
    """The files that are compiled."""
    folder = emulation.ROOT / "csrc" / "cuda"
    return sorted((*folder.glob("*.cu"), *folder.glob("*.cpp")))


def library() -> Path:
    """What is loaded.

    Raises:
        RuntimeError: its sources do not compile.
    """
    given = os.environ.get(LIBRARY_VARIABLE)
    return Path(given) if given else emulation.build("cuda", sources(), torch_library=True)


@functools.cache
def serve() -> None:
    """Let backend ``"cuda"`` of this process serve CPU tensors, and no others.

    Raises:
        RuntimeError: its sources do not compile.
    """
    operators = schema.define(NAMESPACE, composite)
    torch.ops.load_library(library())
    register_head(NAMESPACE, "CPU")
    select.SERVING["cuda"] = select.Serving(operators, ("cpu",))
    loader.STATUS["cuda"] = loader.LOADED
