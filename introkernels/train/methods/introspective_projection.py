"""Introspective learning with explanations at the input, compared by projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.introspective import Introspective
from introkernels.types import Similarity


@register("introspective_projection")
@dataclass(frozen=True)
class IntrospectiveProjection(Introspective):
    """Soft labels from gradient×input at the input; costs the same for any number of classes."""

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from soft labels made of the projections of the "
        "explanations at the input pixels on the true class's"
    )

    similarity: Similarity = "projection"
    """How alike two explanations are; only the projection on the true class's can be had."""

    def __post_init__(self) -> None:
        if self.similarity == "cosine":
            raise ValueError(
                "introspective_projection.similarity: got 'cosine', expected 'projection': the "
                "lengths of the other classes' explanations, which a cosine needs, are not computed"
            )
        super().__post_init__()

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        return self.explained_loss(model, inputs, target, method="projection")
