"""The explanation of every class, by one vector-Jacobian product each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from introkernels.explain.classes import ExplainedClasses, statistics
from introkernels.explain.explainers import Tensors
from introkernels.explain.network import Network, Trace
from introkernels.explain.request import Request
from introkernels.types import ExplanationStats

# Batched products keep an accelerator busy; on the CPU a loop was measured up to 5x faster.
_CHUNK_ON_CPU = 1
_CHUNK_ON_ACCELERATOR = 8


def exact(
    network: Network, trace: Trace, classes: ExplainedClasses, request: Request
) -> ExplanationStats:
    """The statistics of the gradients of the traced pass."""
    return statistics(
        _first(target_gradient(trace, classes, request)),
        _streamed_gradients(trace, classes, request),
        trace.factor,
        classes,
    )


def target_gradient(trace: Trace, classes: ExplainedClasses, request: Request) -> Tensors:
    """Gradients ``[1, B, *S]`` of the targets' logits, or of mixtures of the logits."""
    if classes.target_is_mixed:
        cotangents = classes.target[None].to(trace.logits.dtype, copy=True)
    else:
        cotangents = _one_hot(classes.target[None], trace.logits)
    return _gradients(trace, cotangents, classes, request.center)


def _one_hot(index: Tensor, logits: Tensor) -> Tensor:
    """Cotangents ``[n, B, C]`` of the logits of classes ``index [n, B]``."""
    return logits.new_zeros(len(index), *logits.shape).scatter_(2, index[:, :, None], 1)


def _first(tensors: Tensors) -> Tensors:
    return tuple(tensor[0] for tensor in tensors)


def _streamed_gradients(
    trace: Trace, classes: ExplainedClasses, request: Request
) -> Iterator[Tensors]:
    """Gradients ``[n, B, *S]`` for up to ``chunk`` of the explained classes at a time."""
    chunk = request.chunk
    if chunk is None:
        on_cpu = trace.logits.device.type == "cpu"
        chunk = _CHUNK_ON_CPU if on_cpu else _CHUNK_ON_ACCELERATOR
    columns = classes.index[:, 1:] if classes.chosen else classes.index
    for some in torch.split(columns.t(), chunk):
        yield _gradients(trace, _one_hot(some, trace.logits), classes, request.center)


def _gradients(
    trace: Trace, cotangents: Tensor, classes: ExplainedClasses, center: bool
) -> Tensors:
    """Gradients ``[n, B, *S]`` of ``sum_c cotangents_c z_c``, whose ``[n, B, C]`` are written to.

    Centering is linear, so ``z_c - mean_k z_k`` is differentiated in one go. Ignored rows have no
    part in it, which matters where the rows of a batch are coupled.
    """
    logits = trace.logits
    count = len(cotangents)
    if not logits.requires_grad:
        return tuple(v.new_zeros(count, *v.shape) for v in trace.values)
    if center:
        explained = torch.zeros_like(logits).scatter_(1, classes.index, 1)
        cotangents -= cotangents.sum(2, keepdim=True) * (explained / classes.index.shape[1])
    cotangents.mul_(classes.live[:, None])
    batched = count > 1
    # Autocast is for forward passes only.
    with torch.autocast(logits.device.type, enabled=False):
        gradients = torch.autograd.grad(
            logits,
            trace.variables,
            cotangents if batched else cotangents[0],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )
    return tuple(
        value.new_zeros(count, *value.shape)
        if gradient is None
        else (gradient if batched else gradient[None])
        for gradient, value in zip(gradients, trace.values, strict=True)
    )
