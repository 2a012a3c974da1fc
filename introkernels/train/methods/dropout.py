"""Dropout before the last layer: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov,
"Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, Method, register, require_fraction


@register("dropout")
@dataclass(frozen=True)
class Dropout(Method):
    """Cross entropy with features of the last layer dropped at random."""

    summary: ClassVar[str] = "cross entropy where features of the last layer are dropped at random"
    source: ClassVar[str] = (
        "Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, “Dropout: A Simple Way to "
        "Prevent Neural Networks from Overfitting”, JMLR 15, 2014"
    )

    probability: float = 0.3
    """Chance of a feature to be dropped."""

    def __post_init__(self) -> None:
        require_fraction("dropout.probability", self.probability)

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        features = F.dropout(model.features(inputs), self.probability, model.training)
        logits = model.head(features)
        return LossOutput(F.cross_entropy(logits, target), logits)
