"""Distillation with the teacher's responses to the wrong classes in random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.responses import marked, permute_others
from introkernels.train.methods.teaching import TaughtByNetwork


@register("kd_permuted")
@dataclass(frozen=True)
class KdPermuted(TaughtByNetwork):
    """Distillation of true-class probability and of the shape of the rest, not of similarities.

    The order of the wrong classes is drawn anew for each image at each step.
    """

    summary: ClassVar[str] = (
        "distillation where the teacher's probabilities of the wrong classes are dealt out among "
        "them at random, anew each time"
    )

    def taught_loss(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LossOutput:
        kept = marked(target, teacher_logits)
        return self.distil(logits, permute_others(teacher_logits, kept), target)
