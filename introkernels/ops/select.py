"""The choice of a backend: automatic, or forced by :class:`use_backend`."""

from __future__ import annotations

from types import SimpleNamespace, TracebackType

import torch

from introkernels.ops import loader, reference_kernels, schema

_NATIVE = schema.define("introkernels", reference_kernels)
_REFERENCE = schema.define("introkernels_reference", reference_kernels)

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

_chosen = "auto"


def operators(device: torch.device) -> SimpleNamespace:
    """The operators that serve tensors on ``device`` under the chosen backend.

    Raises:
        ValueError: the chosen backend does not serve this device.
    """
    if _chosen == "reference":
        return _REFERENCE
    if _chosen != "auto" and _chosen != device.type:
        raise ValueError(
            f"backend {_chosen!r} serves tensors on {_chosen!r} only, got a tensor on {device}; "
            "choose another with introkernels.use_backend"
        )
    return _NATIVE


class use_backend:  # noqa: N801 - a function to its users, like torch.no_grad
    """Choose the backend of all losses of this process, as a setter or as a context manager.

    ``use_backend("reference")`` holds until the next choice; ``with use_backend("reference"):``
    restores the earlier choice at its end. A backward pass uses the backend of its forward.

    Args:
        name: ``"auto"`` (the fastest that is loaded for the tensors' device, the definition where
            there is none), ``"reference"`` (the definition in plain PyTorch, with the gradient
            written out and a linear head's statistics in closed form), ``"cpu"`` (C++),
            ``"cuda"`` or ``"triton"``.

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
