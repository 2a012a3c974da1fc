"""Liger-Kernel's Triton kernels: KL divergence, and linear heads fused with a loss.

Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, arXiv:2410.10989.
Not run: no GPU was at hand. The calls are those of version 0.8.5, whose fused heads were checked in
Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from introkernels.bench.model import Contender, Operator
from introkernels.bench.operators.constants import CE_WEIGHT, KL_WEIGHT, TEMPERATURE
from introkernels.bench.peers.installed import needs

_MODULE = "liger_kernel.transformers"
# Of the generalised Jensen-Shannon divergence, which is KL(teacher || student) there.
_FORWARD_KL = 0.0


def prepare_distillation(operator: Operator) -> Callable[..., Tensor]:
    """LigerKLDIVLoss on ``logits, teacher_logits [B, C]``, and a cross entropy beside it."""
    divergence = import_module(_MODULE).LigerKLDIVLoss(reduction="batchmean")

    def call(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
        logits, teacher_logits = logits.float(), teacher_logits.float()
        kl: Tensor = divergence(
            F.log_softmax(logits / TEMPERATURE, 1), F.softmax(teacher_logits / TEMPERATURE, 1)
        )
        # Not LigerCrossEntropyLoss, which writes the gradient over the logits.
        return CE_WEIGHT * F.cross_entropy(logits, target) + KL_WEIGHT * TEMPERATURE**2 * kl

    return call


def prepare_cross_entropy(operator: Operator) -> Callable[..., Tensor]:
    """LigerFusedLinearCrossEntropyLoss of ``features [B, D]`` and ``weight [C, D]``."""
    loss = import_module(_MODULE).LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

    def call(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        result: Tensor = loss(weight, features, target)
        return result

    return call


def prepare_divergence(operator: Operator) -> Callable[..., Tensor]:
    """LigerFusedLinearJSD at its end where it is the KL divergence."""
    divergence = import_module(_MODULE).LigerFusedLinearJSD(
        jsd_beta=_FORWARD_KL, temperature=TEMPERATURE, accum_dtype=torch.float32
    )

    def call(
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        teacher_features: Tensor,
        teacher_weight: Tensor,
    ) -> Tensor:
        kl: Tensor = divergence(features, weight, teacher_features, teacher_weight, None)
        return TEMPERATURE**2 * kl

    return call


def _liger(prepare: Callable[[Operator], Callable[..., Tensor]], made_equal: str) -> Contender:
    return Contender(
        "liger",
        prepare,
        missing=needs("liger_kernel"),
        devices=("cuda",),
        distribution="liger-kernel",
        made_equal=made_equal,
    )


LIGER_DISTILLATION = _liger(
    prepare_distillation,
    "KL by LigerKLDIVLoss; softmax, log-softmax and cross entropy by PyTorch; T² and weights "
    "outside",
)
LIGER_CROSS_ENTROPY = _liger(prepare_cross_entropy, "weight gradient summed in float32")
LIGER_DIVERGENCE = _liger(
    prepare_divergence,
    "generalised Jensen-Shannon divergence at beta 0, which is KL; T² outside; weight gradient "
    "summed in float32",
)
