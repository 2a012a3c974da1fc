"""The choice of a backend: automatic, or forced by :class:`use_backend`; what serves a call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from introkernels.ops import choice, composite, in_double, loader, schema
from introkernels.ops.head.operators import register_head
from introkernels.options import Options
from introkernels.types import DIVERGENCES, LABEL_MODES

_NATIVE = schema.define("introkernels", composite)
_COMPOSITE = schema.define("introkernels_composite", composite, of_torch=True)
_REFERENCE = schema.define("introkernels_reference", in_double.KERNELS, of_torch=True)
# Defined here, and not at first use: a first use may lie inside torch.compile, which can trace a
# call of an operator but not its definition. Where Triton is not usable this costs nothing.
_TRITON = (
    schema.define("introkernels_triton", loader.TRITON_KERNELS) if loader.TRITON_KERNELS else None
)
if loader.STATUS["cuda"] == loader.LOADED:
    # The CUDA library has what is made of kernels; a head is made of matrix products as well.
    register_head("introkernels", "CUDA")
if loader.STATUS["cpu"] == loader.LOADED:
    # The C++ library has the head that explains itself.
    register_head("introkernels", "CPU", names=["linear_distillation"])


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

BACKENDS = ("auto", "reference", "composite", "cpu", "cuda", "triton")


class Preference(NamedTuple):
    """Backends that may serve an operator, the first loaded one does, and why they stand so.

    Without any it is the composite.
    """

    backends: tuple[str, ...]
    ground: str


def _predicted(first: str, second: str) -> Preference:
    ground = (
        f"predicted ahead of {second} from machine code, benchmarks/predicted.toml; not measured"
    )
    return Preference((first, second), ground)


_ROW_LOSS = _predicted("triton", "cuda")
_HEAD = _ROW_LOSS._replace(ground="PyTorch's products around this row loss")

# What `auto` takes, by the type of the device. A backward reads what its forward kept, so that
# those of the row loss come from one backend.
AUTO = {
    "cpu": dict.fromkeys(schema.SCHEMAS, Preference(("cpu",), "C++")),
    "cuda": {
        "row_loss_forward": _ROW_LOSS,
        "row_loss_backward": _ROW_LOSS,
        "explanation_stats": _predicted("triton", "cuda"),
        "teacher_logits": Preference((), "has no kernels on a GPU"),
        "introspective_forward": _ROW_LOSS,
        "linear": _HEAD,
        "linear_distillation": _HEAD,
    },
}


def automatic(device: str) -> dict[str, tuple[str, str]]:
    """For each operator on a device of this type: the backend that `auto` takes, and why."""
    return {name: _first_loaded(preference) for name, preference in AUTO[device].items()}


def _first_loaded(preference: Preference) -> tuple[str, str]:
    missing: list[str] = []
    for name in preference.backends:
        if loader.STATUS[name] == loader.LOADED:
            return name, "; ".join(missing) or preference.ground
        missing.append(f"{name}: {loader.STATUS[name]}")
    return "composite", "; ".join(missing) or preference.ground


_OPERATORS = {"composite": _COMPOSITE} | {name: of.operators for name, of in SERVING.items()}
_AUTOMATIC = {
    device: SimpleNamespace(
        **{
            name: getattr(_OPERATORS[backend], name)
            for name, (backend, _) in automatic(device).items()
        }
    )
    for device in AUTO
}

# The kernels whose absence is told at first use, by the type of the device that they serve.
_missing = {
    device: preferences["row_loss_forward"].backends
    for device, preferences in AUTO.items()
    if automatic(device)["row_loss_forward"][0] == "composite"
}


def _tell_missing(device: str) -> None:
    names = _missing.pop(device)
    reasons = "; ".join(f"{name}: {loader.STATUS[name]}" for name in names)
    warnings.warn(
        f"introkernels has no kernels for tensors on {device!r} here and computes its losses with "
        f"PyTorch's own operations, slower ({reasons}). `introkernels doctor` says "
        "how to mend it; introkernels.use_backend('composite') chooses this on purpose.",
        stacklevel=4,
    )


def for_label_mode(operators: SimpleNamespace, label_mode: int) -> SimpleNamespace:
    """``operators`` if they make teacher logits of this label mode, else the composite's.

    Kernels serve the common one, introkernels/teachers.py all of them.
    """
    serves = LABEL_MODES[label_mode] == "softmax" or operators is _REFERENCE
    return operators if serves else _COMPOSITE


def for_divergence(operators: SimpleNamespace, options: Options) -> SimpleNamespace:
    """``operators`` if their row loss has this divergence, else the composite's."""
    serves = DIVERGENCES[options.divergence] == "forward_kl" or operators is _REFERENCE
    return operators if serves else _COMPOSITE


def for_target(operators: SimpleNamespace, target: Tensor) -> SimpleNamespace:
    """``operators`` if they explain such targets, else the composite's: class probabilities."""
    serves = not target.is_floating_point() or operators is _REFERENCE
    return operators if serves else _COMPOSITE


def serves_in_one_pass(operators: SimpleNamespace, target: Tensor, options: Options) -> bool:
    """Whether ``operators`` go from explanations to the loss in a single pass."""
    return not target.is_floating_point() and (
        for_label_mode(operators, options.label_mode) is operators
        and for_divergence(operators, options) is operators
    )


def operators(device: torch.device) -> SimpleNamespace:
    """The operators that serve tensors on ``device`` under the chosen backend.

    Where the automatic choice finds no kernels for the device, it warns once.

    Raises:
        ValueError: the chosen backend does not serve this device.
    """
    # They are the same; the function is the faster of the two.
    chosen = choice.chosen if is_dynamo_compiling() else choice.current()
    if not isinstance(chosen, str):
        given: SimpleNamespace = chosen
        return given
    if chosen == "auto":
        if device.type in _missing and not is_dynamo_compiling():
            _tell_missing(device.type)
        return _AUTOMATIC.get(device.type, _COMPOSITE)
    if chosen == "reference":
        return _REFERENCE
    if chosen == "composite":
        return _COMPOSITE
    serving = SERVING[chosen]
    if device.type not in serving.devices:
        raise ValueError(
            f"backend {chosen!r} serves tensors on {' and '.join(map(repr, serving.devices))} "
            f"only, got a tensor on {device}; choose another with introkernels.use_backend"
        )
    return serving.operators


@contextmanager
def served_by(kernels: Any) -> Iterator[None]:
    """Serve tensors on any device by the functions of ``kernels``, past PyTorch's dispatcher.

    On tensors without data the dispatcher answers with shapes alone; this is how the functions
    themselves see such tensors, and tell what they would launch.
    """
    block = choice.enter(kernels)
    try:
        yield
    finally:
        choice.leave(block)


class use_backend:  # noqa: N801 - a function to its users, like torch.no_grad
    """Choose the backend of the losses, as a setter or as a context manager.

    ``use_backend("reference")`` holds until the next choice, at most to the end of the block around
    it; ``with use_backend("reference"):`` holds in its block, and ends without a trace in whatever
    order generators and tasks leave theirs. A backward pass uses the backend of its forward.

    Like ``torch.set_grad_enabled``, a choice holds for the thread that makes it, and further like
    all context variables: an ``asyncio`` task starts with the choice where it is created, and its
    own is seen by no other. A new thread starts with ``"auto"``. So does autograd's thread for a
    GPU, where ``torch.utils.checkpoint`` computes a forward again: name the backend there too, with
    ``context_fn``.

    Compiled code follows the choice in force where it is called. A choice within it breaks the
    graph.

    Args:
        name: ``"auto"`` (the fastest that is loaded for the tensors' device, the composite where
            there is none), ``"composite"`` (PyTorch's own operations, on any device),
            ``"reference"`` (the same in float64), ``"cpu"`` (C++),
            ``"cuda"`` (CUDA C++), or ``"triton"`` (GPU tensors; with ``TRITON_INTERPRET=1`` in the
            environment CPU tensors too, slowly, for tests). Automatic on a GPU is Triton, which is
            predicted to be faster, or CUDA C++ where Triton can't be used; ``introkernels doctor``
            tells what it is here, operator by operator, and why.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it can't be used here; the message says why.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}"
            )
        status = loader.STATUS.get(name, loader.LOADED)
        if status != loader.LOADED:
            raise RuntimeError(f"backend {name!r} can't be used: {status}")
        self._name = name
        self._blocks: list[choice.Block] = []
        # The choice of a setter, which is taken back where this turns out to be a context manager.
        self._set: tuple[choice.Entry, choice.Entry] | None = choice.replace(name)

    def __enter__(self) -> use_backend:
        if self._set is not None:
            choice.undo(*self._set)
            self._set = None
        self._blocks.append(choice.enter(self._name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Several threads or tasks may have entered the same object.
        block = choice.innermost(self._blocks)
        self._blocks.remove(block)
        choice.leave(block)
