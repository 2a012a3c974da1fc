"""Introspective learning with explanations at the input, computed exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.introspective import Introspective


@register("introspective_input")
@dataclass(frozen=True)
class IntrospectiveInput(Introspective):
    """Soft labels from gradient×input at the input, one backward pass for each class."""

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from soft labels made of the likeness of the "
        "explanations at the input pixels"
    )

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        return self.explained_loss(model, inputs, target, method="exact")
