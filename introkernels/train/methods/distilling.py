"""What the methods that distil soft labels share: the hyperparameters of the loss, and the loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import introkernels as ik
from introkernels import checks
from introkernels.train.methods.base import LossOutput, Method
from introkernels.train.methods.ranges import require_non_negative


def distil(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
) -> LossOutput:
    """`introkernels.distillation_loss` of a batch, with its terms as parts to log.

    Logits and teacher_logits ``[B, C]``, target ``[B]`` int64. Soft labels ``q`` of temperature T
    have the teacher logits ``T * log(q)``, -inf where there is none.
    """
    parts = ik.distillation_loss(
        logits,
        teacher_logits,
        target,
        temperature=temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        return_parts=True,
    )
    return LossOutput(parts.loss, logits, {"ce": parts.ce, "kl": parts.kl})


@dataclass(frozen=True)
class Distilling(Method):
    """Hyperparameters of ``ce_weight * CE + kl_weight * T**2 * KL(teacher || student)``.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """

    temperature: float = 4.0
    """Softens the teacher's and the student's predictions alike before they are compared."""
    ce_weight: float = 0.1
    """Weight of the cross entropy with the true class."""
    kl_weight: float = 0.9
    """Weight of the divergence from the teacher."""

    def __post_init__(self) -> None:
        checks.temperature(f"{self.name}.temperature", self.temperature)
        require_non_negative(f"{self.name}.ce_weight", self.ce_weight)
        require_non_negative(f"{self.name}.kl_weight", self.kl_weight)

    def distil(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LossOutput:
        """The loss of logits and teacher_logits ``[B, C]`` with classes ``target [B]``."""
        return distil(
            logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kl_weight=self.kl_weight,
        )
