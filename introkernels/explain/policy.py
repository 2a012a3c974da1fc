"""In which state a model is explained, and how it comes out of it unchanged.

Explaining a model means running it once more than training does. Such an extra pass would move
BatchNorm's running statistics, draw random numbers, fill autocast's cache of weights and start a
distributed wrapper's bookkeeping; here is what keeps all of that from happening.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def is_training(model: nn.Module) -> bool:
    """Whether any module of the model is in training mode."""
    return any(module.training for module in model.modules())


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model inside a DistributedDataParallel, whose own forward would broadcast buffers."""
    return model.module if isinstance(model, DistributedDataParallel) else model


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
def evaluation_mode(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Put every module into eval mode, and everything back on the way out, also after an error.

    Restored are each module's attributes with its own training flag, its buffers (the pass works
    on copies, the originals are never written), the random number generators of the CPU and of
    the CUDA devices in use, and autocast's weight cache. Inference mode is off inside.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(_cuda_devices(model, inputs)))
        stack.enter_context(_without_autocast_cache())
        # Inference tensors can't be saved for a backward pass.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_unchanged_modules(model))
        # Flags are set one by one because train() and eval() may be overridden, for example to
        # merge weights, and their effect could not be undone by restoring the flags.
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def _unchanged_modules(model: nn.Module) -> Iterator[None]:
    """Let the modules work on copies of their buffers; restore attributes, flags and buffers."""
    before = [
        (module, module.training, dict(vars(module)), dict(module._buffers.items()))
        for module in model.modules()
    ]
    copies: dict[int, Tensor] = {}
    try:
        for module, _, _, buffers in before:
            for name, buffer in buffers.items():
                if buffer is not None:
                    # A buffer shared by two modules stays shared.
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.clone()
                    module._buffers[name] = copies[id(buffer)]
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


def _cuda_devices(model: nn.Module, inputs: Tensor) -> list[int]:
    devices = {tensor.device for tensor in (inputs, *model.parameters(), *model.buffers())}
    return sorted(device.index for device in devices if device.type == "cuda")
