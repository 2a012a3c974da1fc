"""Plain cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, Method, register


@register("standard")
@dataclass(frozen=True)
class Standard(Method):
    """Plain cross entropy; no hyperparameters."""

    summary: ClassVar[str] = "cross entropy with the true class alone"

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        logits = model(inputs)
        return LossOutput(F.cross_entropy(logits, target), logits)
