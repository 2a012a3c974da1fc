"""What the controls of introspective learning share: soft labels of which something is taken."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

import introkernels as ik
from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput
from introkernels.train.methods.introspective import Introspective
from introkernels.train.methods.responses import marked


@dataclass(frozen=True)
class IntrospectiveControl(Introspective):
    """`introspective_input` with other soft labels for the wrong classes; their mass stays."""

    @abstractmethod
    def changed(self, log_q: Tensor, is_target: Tensor, similarity: Tensor) -> Tensor:
        """Logarithms of the soft labels that are distilled, ``[B, C]``.

        Args:
            log_q: ``[B, C]``, logarithms of those that the explanations give.
            is_target: ``[B, C]`` bool, the true classes.
            similarity: ``[B, C]``, of each class's explanation to the true class's.
        """

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        logits, stats = ik.explain.class_explanation_stats(
            model, inputs, target, method="exact", center=self.center
        )
        teacher = ik.teacher_logits(stats, target, **self.label_keywords)
        log_q = (teacher / self.temperature).log_softmax(dim=1)
        similarity = ik.explain.similarities(stats, target, similarity=self.similarity)
        changed = self.changed(log_q, marked(target, log_q), similarity)
        return self.distil(logits, self.temperature * changed, target)
