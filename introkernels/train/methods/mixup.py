"""Mixup: Zhang, Cissé, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
arXiv:1710.09412.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, Method, register
from introkernels.train.methods.ranges import require_positive


@register("mixup")
@dataclass(frozen=True)
class Mixup(Method):
    """Cross entropy of mixtures of two images with both their classes.

    The share ``λ ~ Beta(concentration, concentration)`` is drawn once for each batch. The logits
    given for metrics are those of the mixtures, so that an accuracy found with the first image's
    classes is too low by far.
    """

    summary: ClassVar[str] = (
        "cross entropy of random mixtures of two images with both classes, in their shares"
    )
    source: ClassVar[str] = (
        "Zhang, Cissé, Dauphin, Lopez-Paz, “mixup: Beyond Empirical Risk Minimization”, ICLR 2018, "
        "arXiv:1710.09412"
    )

    concentration: float = 1.0
    """Of the Beta distribution of the shares: 1 draws all alike, less mostly near 0 and 1."""

    def __post_init__(self) -> None:
        require_positive("mixup.concentration", self.concentration)

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        share = Beta(self.concentration, self.concentration).sample().item()
        partner = torch.randperm(len(inputs), device=inputs.device)
        logits = model(share * inputs + (1 - share) * inputs[partner])
        own, other = F.cross_entropy(logits, target), F.cross_entropy(logits, target[partner])
        return LossOutput(share * own + (1 - share) * other, logits)
