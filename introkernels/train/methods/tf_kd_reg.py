"""Teacher-free distillation by a made-up teacher: Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge
Distillation via Label Smoothing Regularization", CVPR 2020, arXiv:1909.11723.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from introkernels import checks
from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, Method, register
from introkernels.train.methods.distilling import distil
from introkernels.train.methods.ranges import (
    require_non_negative,
    require_share,
)
from introkernels.train.methods.responses import marked


@register("tf_kd_reg")
@dataclass(frozen=True)
class TfKdReg(Method):
    """Distillation from a virtual teacher that is always right and finds all other classes alike.

    ``ce_weight * CE(z, y) + kl_weight * KL(softmax(u / T) || softmax(z))`` with ``u_y = a`` and
    ``u_c = (1 - a) / (C - 1)``. This is the form of the authors' published code, which takes the
    softmax of the teacher's probabilities and leaves the student's prediction unsoftened.
    """

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from the softened predictions of a made-up teacher "
        "that is always right"
    )
    source: ClassVar[str] = (
        "Yuan, Tay, Li, Wang, Feng, “Revisiting Knowledge Distillation via Label Smoothing "
        "Regularization”, CVPR 2020, arXiv:1909.11723 (Tf-KD_reg)"
    )

    correct_probability: float = 0.99
    """The virtual teacher's probability a of the true class."""
    temperature: float = 20.0
    """Softens the virtual teacher alone."""
    ce_weight: float = 0.9
    """Weight of the cross entropy with the true class."""
    kl_weight: float = 0.1
    """Weight of the divergence from the virtual teacher."""

    def __post_init__(self) -> None:
        require_share("tf_kd_reg.correct_probability", self.correct_probability)
        checks.temperature("tf_kd_reg.temperature", self.temperature)
        require_non_negative("tf_kd_reg.ce_weight", self.ce_weight)
        require_non_negative("tf_kd_reg.kl_weight", self.kl_weight)

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        logits = model(inputs)
        others = (1 - self.correct_probability) / max(logits.shape[1] - 1, 1)
        is_target = marked(target, logits)
        teacher = torch.full_like(logits, others).masked_fill(is_target, self.correct_probability)
        return distil(
            logits,
            teacher / self.temperature,
            target,
            temperature=1.0,
            ce_weight=self.ce_weight,
            kl_weight=self.kl_weight,
        )
