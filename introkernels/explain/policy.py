"""In which state a model is explained, and how it comes out of it unchanged.

Explaining a model means running it once more than training does. Such an extra pass would move
BatchNorm's running statistics, draw random numbers, fill autocast's cache of weights and start a
distributed wrapper's bookkeeping; here is what keeps all of that from happening.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def row_mixer(model: nn.Module, mode: str) -> str | None:
    """A module of the model, by name, that computes with the statistics of the batch; or None."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            uses_batch = module.running_mean is None or (mode == "train" and module.training)
            if uses_batch:
                return f"{type(module).__name__} {name!r}"
    return None


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel, whose own forward would broadcast buffers."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model whose modules have the names that its author gave them."""
    inner = without_wrapper(model)
    # What torch.compile returns, without importing dynamo to know its class.
    compiled = getattr(inner, "_orig_mod", None)
    return without_wrappers(compiled) if isinstance(compiled, nn.Module) else inner


def reject_lazy(model: nn.Module) -> None:
    """Raise ValueError if a parameter or buffer has no shape yet.

    A first forward pass creates those, so it can't be one that leaves the model unchanged.
    """
    for kind, tensors in (
        ("parameter", model.named_parameters()),
        ("buffer", model.named_buffers()),
    ):
        for name, tensor in tensors:
            if nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"model must be initialized, got the lazy {kind} {name!r}: "
                    "run one forward pass before explaining the model"
                )


NOT_TRACED = (
    "Explaining a model differentiates it by its inputs under hooks and on copies of its buffers, "
    "which torch.compile can't trace: leave fullgraph=True out, or compile the model alone."
)


def untraced(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """``torch.compiler.disable(function)``, made only where something may be compiled.

    Making it imports dynamo, which takes a second.
    """
    disabled: Callable[_Parameters, _Result] | None = None

    @wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        nonlocal disabled
        if torch.compiler.is_compiling():
            # The graph ends before this call; where it has to be whole, this is the error.
            torch._dynamo.skip_frame(msg=NOT_TRACED)
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function, reason=NOT_TRACED)
        return disabled(*args, **kwargs)

    return call


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled parts of a model eagerly.

    The backward pass of compiled code can't run for a batch of cotangents, and where it reuses the
    memory of what it saved it can run only once.
    """
    # Nothing can be compiled before dynamo is imported, and importing it takes a second.
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def evaluation_mode(model: nn.Module, inputs: Iterable[object]) -> Iterator[None]:
    """Put every module into eval mode, and everything back on the way out, also after an error.

    Restored are what each module's attributes refer to (not what is in a list or a dict among
    them), its own training flag, its buffers (the pass works on copies, the originals are never
    written), PyTorch's random number generators of the CPU and of the CUDA devices in use, and
    autocast's weight cache. Inference mode is off inside.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(cuda_devices(model, inputs)))
        # Inference tensors can't be saved for a backward pass.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(extra_pass(model))
        # Flags are set one by one because train() and eval() may be overridden, for example to
        # merge weights, and their effect could not be undone by restoring the flags.
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def extra_pass(model: nn.Module, buffers: Buffers | None = None) -> Iterator[None]:
    """A forward pass that the training knows nothing of, in the state that the model is in.

    Random number generators are not part of it; see `RandomState`.

    Args:
        model: the model.
        buffers: what its modules' buffers are in this pass; by default what they are now.
    """
    with _without_autocast_cache(), _unchanged_modules(model, buffers or _buffers_of(model)):
        yield


Buffers = dict[nn.Module, dict[str, Tensor | None]]
"""The buffers of each module of a model."""


def _buffers_of(model: nn.Module) -> Buffers:
    return {module: dict(module._buffers.items()) for module in model.modules()}


def copied_buffers(model: nn.Module) -> Buffers:
    """Copies of the buffers of a model."""
    return _copies(_buffers_of(model))


def _copies(buffers: Buffers) -> Buffers:
    """Copies in which a buffer shared by two modules is shared too."""
    copies = {
        id(buffer): buffer.clone()
        for some in buffers.values()
        for buffer in some.values()
        if buffer is not None
    }
    return {
        module: {name: copies.get(id(buffer)) for name, buffer in some.items()}
        for module, some in buffers.items()
    }


@contextmanager
def _unchanged_modules(model: nn.Module, start: Buffers) -> Iterator[None]:
    """Let the modules work on copies of these buffers; restore attributes, flags and buffers."""
    before = [
        (module, module.training, dict(vars(module)), dict(module._buffers.items()))
        for module in model.modules()
    ]
    try:
        for module, buffers in _copies(start).items():
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer
        yield
    finally:
        for module, training, attributes, buffers in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            for name in module._buffers.keys() - buffers.keys():
                del module._buffers[name]
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
            # A scripted module keeps its flag elsewhere than among its attributes.
            module.training = training


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Keep weights cast here from being used by the training forward.

    They may lack a graph; torch 2.10 would then train without the gradients of these weights.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def copied_inputs(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an extra pass: a model may write to what it gets."""
    return tuple(value.detach().clone() if isinstance(value, Tensor) else value for value in inputs)


def cuda_devices(model: nn.Module, inputs: Iterable[object]) -> list[int]:
    """The CUDA devices that hold the model or its inputs."""
    tensors = (tensor for tensor in inputs if isinstance(tensor, Tensor))
    devices = {tensor.device for tensor in chain(tensors, model.parameters(), model.buffers())}
    return sorted(device.index for device in devices if device.type == "cuda")


class RandomState:
    """The random number generators of the CPU and of CUDA devices as they stand now."""

    def __init__(self, cuda: list[int]) -> None:
        self._cuda = cuda
        self._states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers once more, and then go on as if they had not been drawn."""
        with torch.random.fork_rng(self._cuda):
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._cuda, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
