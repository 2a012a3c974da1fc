"""The two directions of a row loss, each alone: what a kernel reaches, not what a step takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Generator, Tensor
from torch.utils.weak import WeakIdKeyDictionary

from introkernels.bench.model import Operator, Sizes, Tensors
from introkernels.bench.operators.constants import INDEX_BYTES, LOSS_BYTES, STATISTIC_BYTES
from introkernels.bench.operators.distillation import DISTILLATION, SIMILARITY
from introkernels.ops import choice

# What the largest logit of a confident row has of all.
TOP_PROBABILITY = 0.99

# The losses that backwards start from, by the tensor of the logits.
_forwards = WeakIdKeyDictionary()


def _backward(compute: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """The gradient in the logits ``[B, C]`` of the sum over rows.

    The forward is made once for each tensor of logits and each backend.
    """
    made = _forwards.setdefault(logits, {})
    key = compute, choice.current()
    if key not in made:
        leaf = logits.detach().requires_grad_()
        loss = compute(leaf, *others)
        # By which the gradient of the mean becomes that of the sum.
        made[key] = loss, leaf, torch.full_like(loss, len(logits))
    loss, leaf, rows = made[key]
    gradient: Tensor = torch.autograd.grad(loss, leaf, rows, retain_graph=True)[0]
    return gradient


def _gradient(definition: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(definition(leaf, *others), leaf)
    return gradient


def _forward_bytes(operator: Operator, sizes: Sizes, element: int) -> int:
    """Those of both directions, without the gradient."""
    return operator.bytes_moved(sizes, element) - sizes["B"] * sizes["C"] * element


def _distillation_backward_bytes(sizes: Sizes, element: int) -> int:
    """Logits, teacher's logits and targets in; the gradient of the logits out."""
    return DISTILLATION.bytes_moved(sizes, element) - LOSS_BYTES


def _similarity_backward_bytes(sizes: Sizes, element: int) -> int:
    """Logits, the teacher's made of statistics, and targets in; the gradient of the logits out."""
    B, C = sizes["B"], sizes["C"]
    return B * C * (2 * element + STATISTIC_BYTES) + B * INDEX_BYTES


def _forward_of(operator: Operator) -> Operator:
    return replace(
        operator,
        name=f"{operator.name}-forward",
        differentiable=(),
        bytes_moved=partial(_forward_bytes, operator),
        contenders=(),
    )


def _backward_of(operator: Operator, bytes_moved: Callable[[Sizes, int], int]) -> Operator:
    assert operator.compute is not None
    assert operator.eager is not None
    assert operator.definition is not None
    return replace(
        operator,
        name=f"{operator.name}-backward",
        outputs=("gradient",),
        differentiable=(),
        compute=partial(_backward, operator.compute),
        eager=partial(_backward, operator.eager),
        definition=partial(_gradient, operator.definition),
        bytes_moved=bytes_moved,
        contenders=(),
    )


def _draw_confident(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    """Student and teacher are as sure of the target, wherever in its row that lies."""
    B, C = sizes["B"], sizes["C"]
    target = torch.randint(C, (B,), generator=generator)

    def logits() -> Tensor:
        drawn = torch.randn(B, C, generator=generator)
        others = drawn.scatter(1, target[:, None], -math.inf).logsumexp(1, keepdim=True)
        odds = TOP_PROBABILITY / (1 - TOP_PROBABILITY)
        return drawn.scatter_(1, target[:, None], others + math.log(odds)).to(dtype)

    return {"logits": logits(), "teacher_logits": logits(), "target": target}


DISTILLATION_FORWARD = _forward_of(DISTILLATION)
DISTILLATION_BACKWARD = _backward_of(DISTILLATION, _distillation_backward_bytes)
SIMILARITY_FORWARD = _forward_of(SIMILARITY)
SIMILARITY_BACKWARD = _backward_of(SIMILARITY, _similarity_backward_bytes)
CONFIDENT_FORWARD = replace(DISTILLATION_FORWARD, name="confident-forward", draw=_draw_confident)
