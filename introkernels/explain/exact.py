"""Gradient x input of every class, by one vector-Jacobian product each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from introkernels.explain.classes import ExplainedClasses, explained_classes, statistics
from introkernels.explain.request import Request, logits_of
from introkernels.types import ExplanationStats

# Batched products keep an accelerator busy; on the CPU a loop was measured up to 5x faster.
_CHUNK_ON_CPU = 1
_CHUNK_ON_ACCELERATOR = 8


def exact(model: nn.Module, inputs: Tensor, request: Request) -> tuple[Tensor, ExplanationStats]:
    """Logits of one forward pass and the statistics of that pass's gradients.

    The logits carry the graph to parameters and inputs where gradient mode is on.
    """
    grad_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        point = _differentiable(inputs, grad_enabled)
        # The model gets a copy, which it may change in place.
        logits = logits_of(model(point.clone()), inputs)
        # Outside autocast, which is for forward passes only.
        with torch.autocast(inputs.device.type, enabled=False), torch.no_grad():
            classes = explained_classes(logits, request.target, request.top_k, request.ignore_index)
            stats = statistics(
                _gradients(logits, point, classes.target[None], classes, request.center)[0],
                _streamed_gradients(logits, point, classes, request),
                point.detach(),
                classes,
            )
    return (logits if grad_enabled else logits.detach()), stats


def _differentiable(inputs: Tensor, keep_graph: bool) -> Tensor:
    """The inputs as a tensor to differentiate by, which is not the caller's own."""
    if keep_graph and inputs.requires_grad:
        return inputs.view_as(inputs)
    values = inputs.clone() if inputs.is_inference() else inputs
    return values.detach().requires_grad_()


def _streamed_gradients(
    logits: Tensor, point: Tensor, classes: ExplainedClasses, request: Request
) -> Iterator[Tensor]:
    """Gradients ``[n, B, *S]`` for up to ``chunk`` of the explained classes at a time."""
    chunk = request.chunk
    if chunk is None:
        chunk = _CHUNK_ON_CPU if point.device.type == "cpu" else _CHUNK_ON_ACCELERATOR
    columns = classes.index[:, 1:] if classes.chosen else classes.index
    for some in torch.split(columns.t(), chunk):
        yield _gradients(logits, point, some, classes, request.center)


def _gradients(
    logits: Tensor, point: Tensor, index: Tensor, classes: ExplainedClasses, center: bool
) -> Tensor:
    """Gradients ``[n, B, *S]`` of the logits of classes ``index [n, B]``.

    Centering is linear, so ``z_c - mean_k z_k`` is differentiated in one go. Ignored rows have no
    part in it, which matters where the rows of a batch are coupled.
    """
    if not logits.requires_grad:
        return point.new_zeros(len(index), *point.shape)
    cotangents = logits.new_zeros(len(index), *logits.shape)
    cotangents.scatter_(2, index[:, :, None], 1)
    if center:
        explained = torch.zeros_like(logits).scatter_(1, classes.index, 1)
        cotangents -= explained / classes.index.shape[1]
    cotangents.mul_(classes.live[:, None])
    batched = len(index) > 1
    (gradients,) = torch.autograd.grad(
        logits,
        point,
        cotangents if batched else cotangents[0],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    if gradients is None:
        return point.new_zeros(len(index), *point.shape)
    return gradients if batched else gradients[None]
