"""Distillation, and the same loss from explanation statistics: forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import introkernels as ik
from introkernels.bench.model import Operator, Sizes, Tensors
from introkernels.bench.operators.constants import (
    CE_WEIGHT,
    INDEX_BYTES,
    KL_WEIGHT,
    LOSS_BYTES,
    STATISTIC_BYTES,
    TEMPERATURE,
)
from introkernels.bench.peers.liger import LIGER_DISTILLATION
from introkernels.bench.peers.torchdistill import TORCHDISTILL


def distillation_eager(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Hinton's distillation as one finds it written; half inputs in float32, as under autocast."""
    logits, teacher_logits = logits.float(), teacher_logits.float()
    ce = F.cross_entropy(logits, target)
    kl = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.softmax(teacher_logits / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return CE_WEIGHT * ce + KL_WEIGHT * TEMPERATURE**2 * kl


def similarity_eager(logits: Tensor, target: Tensor, dots: Tensor, sq_norms: Tensor) -> Tensor:
    """Cosines are the teacher's logits."""
    norms = sq_norms.sqrt()
    norm_of_target = norms.gather(1, target[:, None])
    cosine = dots / (norms * norm_of_target).clamp_min(torch.finfo(norms.dtype).tiny)
    return distillation_eager(logits, cosine.clamp(-1, 1), target)


def draw_logits(B: int, C: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Logits of a half-trained network, which prefers the target, and targets."""
    target = torch.randint(C, (B,), generator=generator)
    logits = 3 * torch.randn(B, C, generator=generator)
    logits[torch.arange(B), target] += 3
    return logits, target


def _draw_distillation(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    logits, target = draw_logits(sizes["B"], sizes["C"], generator)
    teacher_logits = 0.5 * logits + 2 * torch.randn(logits.shape, generator=generator)
    return {
        "logits": logits.to(dtype),
        "teacher_logits": teacher_logits.to(dtype),
        "target": target,
    }


def _draw_similarity(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    logits, target = draw_logits(sizes["B"], sizes["C"], generator)
    norms = torch.rand(logits.shape, generator=generator) + 0.5
    norm_of_target = norms.gather(1, target[:, None])
    cosine = torch.randn(logits.shape, generator=generator).mul_(0.3).clamp_(-1, 1)
    cosine.scatter_(1, target[:, None], 1.0)
    return {
        "logits": logits.to(dtype),
        "target": target,
        "dots": cosine * norms * norm_of_target,
        "sq_norms": norms.square(),
    }


def _similarity_loss(logits: Tensor, target: Tensor, dots: Tensor, sq_norms: Tensor) -> Tensor:
    return ik.similarity_loss(logits, target, ik.ExplanationStats(dots, sq_norms))


def _distillation_definition(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> object:
    return ik.reference.distillation_loss(logits, teacher_logits, target, reduction="sum")


def _similarity_definition(
    logits: Tensor, target: Tensor, dots: Tensor, sq_norms: Tensor
) -> object:
    stats = ik.ExplanationStats(dots, sq_norms)
    return ik.reference.similarity_loss(logits, target, stats, reduction="sum")


def _distillation_bytes(sizes: Sizes, element: int) -> int:
    """Logits, teacher's logits and targets in; the gradient of the logits and the loss out."""
    B, C = sizes["B"], sizes["C"]
    return 3 * B * C * element + B * INDEX_BYTES + LOSS_BYTES


def _similarity_bytes(sizes: Sizes, element: int) -> int:
    """Logits, two statistics and targets in; the gradient of the logits and the loss out."""
    B, C = sizes["B"], sizes["C"]
    return B * C * (2 * element + 2 * STATISTIC_BYTES) + B * INDEX_BYTES + LOSS_BYTES


DISTILLATION = Operator(
    name="distillation",
    dims=("B", "C"),
    draw=_draw_distillation,
    outputs=("loss",),
    differentiable=("logits",),
    largest="teacher_logits",
    compute=ik.distillation_loss,
    eager=distillation_eager,
    definition=_distillation_definition,
    bytes_moved=_distillation_bytes,
    contenders=(TORCHDISTILL, LIGER_DISTILLATION),
)

SIMILARITY = Operator(
    name="similarity",
    dims=("B", "C"),
    draw=_draw_similarity,
    outputs=("loss",),
    differentiable=("logits",),
    largest="dots",
    compute=_similarity_loss,
    eager=similarity_eager,
    definition=_similarity_definition,
    bytes_moved=_similarity_bytes,
)
