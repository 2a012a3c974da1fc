"""The choice of a backend: automatic, or forced by :class:`use_backend`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import torch

from introkernels.ops import loader, reference_kernels, schema
from introkernels.ops.cuda import head as cuda_head

_NATIVE = schema.define("introkernels", reference_kernels)
_REFERENCE = schema.define("introkernels_reference", reference_kernels)
# Defined here, and not at first use: a first use may lie inside torch.compile, which can trace a
# call of an operator but not its definition. Where Triton is not usable this costs nothing.
_TRITON = (
    schema.define("introkernels_triton", loader.TRITON_KERNELS) if loader.TRITON_KERNELS else None
)
if loader.STATUS["cuda"] == loader.LOADED:
    # The CUDA library has what is made of kernels; a head is made of matrix products as well.
    cuda_head.register("introkernels", "CUDA")


class Serving(NamedTuple):
    """The operators of a backend, and the types of the devices whose tensors they serve."""

    operators: SimpleNamespace
    devices: tuple[str, ...]


# What serves where a backend is chosen by its name; choosing one that is not loaded raises. Tests
# of a backend's sources where its device is missing put another device here.
SERVING = {
    "cpu": Serving(_NATIVE, ("cpu",)),
    "cuda": Serving(_NATIVE, ("cuda",)),
    # PyTorch calls AMD's GPUs "cuda" too.
    "triton": Serving(_TRITON or _NATIVE, ("cuda", "cpu") if loader.INTERPRETED else ("cuda",)),
}

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

_chosen = "auto"

# The choice while `served_by` holds, which no user can name.
_GIVEN = "given"
_given: Any = None


def operators(device: torch.device) -> SimpleNamespace:
    """The operators that serve tensors on ``device`` under the chosen backend.

    Raises:
        ValueError: the chosen backend does not serve this device.
    """
    if _chosen == "auto":
        return _TRITON if _TRITON is not None and device.type == "cuda" else _NATIVE
    if _chosen == "reference":
        return _REFERENCE
    if _chosen == _GIVEN:
        given: SimpleNamespace = _given
        return given
    serving = SERVING[_chosen]
    if device.type not in serving.devices:
        raise ValueError(
            f"backend {_chosen!r} serves tensors on {' and '.join(map(repr, serving.devices))} "
            f"only, got a tensor on {device}; choose another with introkernels.use_backend"
        )
    return serving.operators


@contextmanager
def served_by(kernels: Any) -> Iterator[None]:
    """Serve tensors on any device by the functions of ``kernels``, past PyTorch's dispatcher.

    On tensors without data the dispatcher answers with shapes alone; this is how the functions
    themselves see such tensors, and tell what they would launch.
    """
    global _chosen, _given
    previous = _chosen, _given
    _chosen, _given = _GIVEN, kernels
    try:
        yield
    finally:
        _chosen, _given = previous


class use_backend:  # noqa: N801 - a function to its users, like torch.no_grad
    """Choose the backend of all losses of this process, as a setter or as a context manager.

    ``use_backend("reference")`` holds until the next choice; ``with use_backend("reference"):``
    restores the earlier choice at its end. A backward pass uses the backend of its forward.

    Args:
        name: ``"auto"`` (the fastest that is loaded for the tensors' device, the definition where
            there is none), ``"reference"`` (the definition in plain PyTorch, with the gradient
            written out and a linear head's statistics in closed form), ``"cpu"`` (C++),
            ``"cuda"`` (CUDA C++), or ``"triton"`` (GPU tensors; with ``TRITON_INTERPRET=1`` in the
            environment CPU tensors too, slowly, for tests). Automatic on a GPU is Triton, or CUDA
            C++ where Triton can't be used.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it can't be used here; the message says why.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        if name not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}"
            )
        status = loader.STATUS.get(name, loader.LOADED)
        if status != loader.LOADED:
            raise RuntimeError(f"backend {name!r} can't be used: {status}")
        self._name = name
        # What to go back to, for each context entered; the first entry is the choice just made.
        self._previous: list[str] = []
        self._before: str | None = _chosen
        _chosen = name

    def __enter__(self) -> use_backend:
        global _chosen
        self._previous.append(_chosen if self._before is None else self._before)
        self._before = None
        _chosen = self._name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._previous.pop()
