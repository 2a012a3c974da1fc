"""Losses of a linear head that other packages fuse with it: cross entropy, and KL divergence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import introkernels as ik
from introkernels.bench.model import Contender, Operator, Sizes, Tensors
from introkernels.bench.operators.constants import INDEX_BYTES, LOSS_BYTES, TEMPERATURE
from introkernels.bench.operators.head import draw_head
from introkernels.bench.peers.cut_cross_entropy import CUT_CROSS_ENTROPY
from introkernels.bench.peers.flash_linear_attention import FLASH_LINEAR_ATTENTION
from introkernels.bench.peers.liger import LIGER_CROSS_ENTROPY, LIGER_DIVERGENCE
from introkernels.bench.peers.linear_cross_entropy import (
    CHUNKED_CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
)
from introkernels.bench.peers.orda import ORDA

# Logits forward, the gradients of features and weight backward; KL takes the teacher's logits too.
CROSS_ENTROPY_PRODUCTS = 3
DIVERGENCE_PRODUCTS = 4


def cross_entropy_eager(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Half inputs in float32: products rounded to a half type miss the tolerance."""
    return F.cross_entropy(F.linear(features.float(), weight.float()), target)


def divergence_eager(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher_features: Tensor,
    teacher_weight: Tensor,
) -> Tensor:
    """``T**2 * KL`` of two heads, the teacher's a constant; half inputs in float32."""
    logits = F.linear(features.float(), weight.float())
    with torch.no_grad():
        teacher_logits = F.linear(teacher_features.float(), teacher_weight.float())
    kl = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.softmax(teacher_logits / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return TEMPERATURE**2 * kl


def _cross_entropy(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The introspective head whose soft labels have no weight; it makes its statistics still."""
    return ik.linear_introspective_loss(features, weight, target, ce_weight=1.0, kl_weight=0.0)


def _divergence(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher_features: Tensor,
    teacher_weight: Tensor,
) -> Tensor:
    teacher = ik.LinearTeacher(teacher_features, teacher_weight)
    return ik.linear_distillation_loss(
        features, weight, teacher, target, ce_weight=0.0, kl_weight=1.0
    )


def divergence_matmuls(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher_features: Tensor,
    teacher_weight: Tensor,
) -> Tensor:
    """The floor: the same products with a plain cross entropy in the place of the loss."""
    with torch.no_grad():
        F.linear(teacher_features, teacher_weight)
    return F.cross_entropy(F.linear(features, weight), target)


def _matmuls(operator: Operator) -> Callable[..., Tensor]:
    return divergence_matmuls


def _cross_entropy_definition(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = features @ weight.T
    return (torch.logsumexp(logits, 1) - logits.gather(1, target[:, None])[:, 0]).sum()


def _divergence_definition(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher_features: Tensor,
    teacher_weight: Tensor,
) -> Tensor:
    student = (features @ weight.T / TEMPERATURE).log_softmax(1)
    teacher = (teacher_features @ teacher_weight.T / TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * (teacher.exp() * (teacher - student)).sum()


def _draw_divergence(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    """A student and a teacher of the same width, each with features and weight of its own."""
    teacher = draw_head(sizes, dtype, generator)
    return {
        **draw_head(sizes, dtype, generator),
        "teacher_features": teacher["features"],
        "teacher_weight": teacher["weight"],
    }


def _cross_entropy_bytes(sizes: Sizes, element: int) -> int:
    """Features, weight and targets in; the gradients of features and weight and the loss out."""
    B, C, D = sizes["B"], sizes["C"], sizes["D"]
    return 2 * (B * D + C * D) * element + B * INDEX_BYTES + LOSS_BYTES


def _divergence_bytes(sizes: Sizes, element: int) -> int:
    """As for the cross entropy, and the teacher's features and weight in."""
    B, C, D = sizes["B"], sizes["C"], sizes["D"]
    return 3 * (B * D + C * D) * element + B * INDEX_BYTES + LOSS_BYTES


def _cross_entropy_flops(sizes: Sizes) -> int:
    return CROSS_ENTROPY_PRODUCTS * 2 * sizes["B"] * sizes["C"] * sizes["D"]


def _divergence_flops(sizes: Sizes) -> int:
    return DIVERGENCE_PRODUCTS * 2 * sizes["B"] * sizes["C"] * sizes["D"]


HEAD_CROSS_ENTROPY = Operator(
    name="head-ce",
    dims=("B", "C", "D"),
    draw=draw_head,
    outputs=("loss",),
    differentiable=("features", "weight"),
    largest="weight",
    compute=_cross_entropy,
    eager=cross_entropy_eager,
    definition=_cross_entropy_definition,
    bytes_moved=_cross_entropy_bytes,
    flops=_cross_entropy_flops,
    shared=("weight",),
    contenders=(
        LINEAR_CROSS_ENTROPY,
        CHUNKED_CROSS_ENTROPY,
        LIGER_CROSS_ENTROPY,
        CUT_CROSS_ENTROPY,
    ),
)

HEAD_DIVERGENCE = Operator(
    name="head-kl",
    dims=("B", "C", "D"),
    draw=_draw_divergence,
    outputs=("loss",),
    differentiable=("features", "weight"),
    largest="weight",
    compute=_divergence,
    eager=divergence_eager,
    definition=_divergence_definition,
    bytes_moved=_divergence_bytes,
    flops=_divergence_flops,
    shared=("weight", "teacher_weight"),
    contenders=(
        Contender("matmuls", _matmuls, role="floor"),
        ORDA,
        LIGER_DIVERGENCE,
        FLASH_LINEAR_ATTENTION,
    ),
)
