"""Confidence weighted by teacher max: Furlanello, Lipton, Tschannen, Itti, Anandkumar, "Born-Again
Neural Networks", ICML 2018, arXiv:1805.04770.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.teaching import TaughtByNetwork


@register("kd_cwtm")
@dataclass(frozen=True)
class KdCwtm(TaughtByNetwork):
    """Cross entropy where images count by how certain the teacher is of them; no soft labels.

    ``ce_weight * mean_b CE_b + kl_weight * sum_b w_b CE_b`` with ``w_b`` the teacher's largest
    softened probability, divided by its sum over the batch. The paper has the second term alone,
    unsoftened.
    """

    summary: ClassVar[str] = (
        "cross entropy where an image counts by the teacher's largest probability of a class"
    )
    source: ClassVar[str] = (
        "Furlanello, Lipton, Tschannen, Itti, Anandkumar, “Born-Again Neural Networks”, ICML 2018, "
        "arXiv:1805.04770 (CWTM)"
    )

    temperature: float = 1.0
    """Softens the teacher's predictions: higher makes the images count more alike."""
    ce_weight: float = 0.1
    """Weight of the cross entropy in which all images count alike."""
    kl_weight: float = 0.9
    """Weight of the cross entropy in which images count by the teacher's certainty, which stands
    in the place of the divergence."""

    def taught_loss(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LossOutput:
        certainty = F.softmax(teacher_logits / self.temperature, dim=1).amax(dim=1)
        each = F.cross_entropy(logits, target, reduction="none")
        ce = each.mean()
        weighted = (certainty / certainty.sum() * each).sum()
        return LossOutput(
            self.ce_weight * ce + self.kl_weight * weighted,
            logits,
            {"ce": ce.detach(), "weighted_ce": weighted.detach()},
        )
