"""Distillation of the teacher's average prediction for each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from introkernels.train.data import LabelledImages
from introkernels.train.methods.base import Learner, LossOutput, Setting, TaughtLearner, register
from introkernels.train.methods.responses import marked
from introkernels.train.methods.teaching import TaughtByNetwork

_CHUNK = 256


@register("kd_class_average")
@dataclass(frozen=True)
class KdClassAverage(TaughtByNetwork):
    """Distillation of what the teacher says of a class, and nothing of the single image.

    The soft labels of a class are the mean of the teacher's softened probabilities over the
    training images of that class, found once before training.
    """

    summary: ClassVar[str] = (
        "distillation where every image of a class has the same soft labels: the teacher's mean "
        "softened prediction for that class"
    )

    def learner(self, setting: Setting) -> Learner:
        return _ClassAverageStudent(self, setting)


class _ClassAverageStudent(TaughtLearner):
    """A network that learns one row of soft labels for each class."""

    soft_labels: Tensor

    def __init__(self, method: KdClassAverage, setting: Setting) -> None:
        super().__init__(setting)
        self.method = method
        # Row = true class.
        self.register_buffer("soft_labels", torch.zeros(setting.classes, setting.classes))

    def prepare(self, data: LabelledImages) -> None:
        total = torch.zeros_like(self.soft_labels)
        for start in range(0, len(data), _CHUNK):
            part = data[start : start + _CHUNK].to(total.device)
            responses = self.teacher_logits(part.images)
            probabilities = F.softmax(responses / self.method.temperature, dim=1)
            total += marked(part.labels, probabilities).to(total.dtype).T @ probabilities
        # A class without images has no soft labels, and none of its images ask for them.
        self.soft_labels.copy_(total / total.sum(dim=1, keepdim=True).clamp(min=1))

    def forward(self, inputs: Tensor, target: Tensor) -> LossOutput:
        teacher_logits = self.method.temperature * self.soft_labels[target].log()
        return self.method.distil(self.model(inputs), teacher_logits, target)
