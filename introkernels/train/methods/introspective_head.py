"""Introspective learning with explanations at the features of the last layer, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import introkernels as ik
from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.introspective import Introspective


@register("introspective_head")
@dataclass(frozen=True)
class IntrospectiveHead(Introspective):
    """Soft labels from gradient×input at the last layer's features; needs no extra passes."""

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from soft labels made of the likeness of the "
        "explanations at the features of the last layer"
    )

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        features = model.features(inputs)
        parts = ik.linear_introspective_loss(
            features,
            model.head.weight,
            target,
            model.head.bias,
            center=self.center,
            return_parts=True,
            **self.keywords,
        )
        # The loss need not form logits; metrics of ten classes can afford to.
        with torch.no_grad():
            logits = model.head(features)
        return LossOutput(parts.loss, logits, {"ce": parts.ce, "kl": parts.kl})
