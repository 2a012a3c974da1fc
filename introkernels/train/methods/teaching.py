"""What the methods with a trained teacher share: who teaches, and how its responses are used."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from introkernels.train.methods.base import Learner, LossOutput, Setting, TaughtLearner, Teacher
from introkernels.train.methods.distilling import Distilling
from introkernels.train.methods.standard import Standard
from introkernels.train.models import check_model


@dataclass(frozen=True)
class Taught(Distilling):
    """A method whose teacher is a trained network, by default the same one trained alone."""

    def teacher(self) -> Teacher:
        return Teacher(Standard())

    def learner(self, setting: Setting) -> Learner:
        return Student(self, setting)

    def taught_loss(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LossOutput:
        """The loss of a batch: logits and teacher_logits ``[B, C]``, target ``[B]`` int64."""
        return self.distil(logits, teacher_logits, target)


@dataclass(frozen=True)
class TaughtByNetwork(Taught):
    """A method whose teacher may be another network than the student."""

    teacher_model: str | None = None
    """Network of the teacher, trained with cross entropy; None: the same as the student's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_model is not None:
            try:
                check_model(self.teacher_model)
            except ValueError as error:
                # The message begins with "model: ".
                raise ValueError(f"{self.name}.teacher_{error}") from error

    def teacher(self) -> Teacher:
        return Teacher(Standard(), self.teacher_model)


class Student(TaughtLearner):
    """A network that learns from a teacher's responses by the loss of a method."""

    def __init__(self, method: Taught, setting: Setting) -> None:
        super().__init__(setting)
        self.method = method

    def forward(self, inputs: Tensor, target: Tensor) -> LossOutput:
        return self.method.taught_loss(self.model(inputs), self.teacher_logits(inputs), target)
