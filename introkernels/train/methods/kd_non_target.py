"""Non-target-class distillation: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation",
CVPR 2022, arXiv:2203.08679.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.distilling import distil
from introkernels.train.methods.responses import marked
from introkernels.train.methods.teaching import TaughtByNetwork


@register("kd_non_target")
@dataclass(frozen=True)
class KdNonTarget(TaughtByNetwork):
    """Distillation of the similarities alone: how the wrong classes relate to one another.

    ``KL`` is taken between teacher and student renormalised over the classes other than the true
    one, the NCKD of the paper.
    """

    summary: ClassVar[str] = (
        "distillation among the wrong classes only, whatever probability they have together"
    )
    source: ClassVar[str] = (
        "Zhao, Cui, Song, Qiu, Liang, “Decoupled Knowledge Distillation”, CVPR 2022, "
        "arXiv:2203.08679 (NCKD)"
    )

    def taught_loss(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LossOutput:
        is_target = marked(target, logits)
        # A class of logit -inf does not exist. The cross entropy, infinite without the true class,
        # has no part in a loss that gives it no weight; it is that of all classes.
        others = distil(
            logits.masked_fill(is_target, float("-inf")),
            teacher_logits.masked_fill(is_target, float("-inf")),
            target,
            temperature=self.temperature,
            ce_weight=0.0,
            kl_weight=self.kl_weight,
        )
        ce = F.cross_entropy(logits, target)
        return LossOutput(
            self.ce_weight * ce + others.loss,
            logits,
            {"ce": ce.detach(), "kl": others.parts["kl"]},
        )
