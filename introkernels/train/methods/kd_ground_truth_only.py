"""Distillation of the teacher's response to the true class alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.responses import marked, share_among_others
from introkernels.train.methods.teaching import TaughtByNetwork


@register("kd_ground_truth_only")
@dataclass(frozen=True)
class KdGroundTruthOnly(TaughtByNetwork):
    """Distillation without similarities: the other classes share the teacher's mass evenly.

    What is left is the teacher's (softened) probability of the true class: how hard it finds each
    image.
    """

    summary: ClassVar[str] = (
        "distillation where the teacher's probabilities of the wrong classes are spread evenly "
        "over them, so that only its probability of the true class is left"
    )

    def taught_loss(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LossOutput:
        log_q = F.log_softmax(teacher_logits / self.temperature, dim=1)
        even = share_among_others(log_q, marked(target, log_q), torch.zeros_like(log_q))
        return self.distil(logits, self.temperature * even, target)
