"""Introspective learning from similarities averaged over images and steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, distributed

import introkernels as ik
from introkernels.bank import SimilarityBank
from introkernels.teachers import of_similarities
from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import (
    Learner,
    LossOutput,
    Setting,
    register,
    require_fraction,
)
from introkernels.train.methods.introspective import Introspective


@register("introspective_bank")
@dataclass(frozen=True)
class IntrospectiveBank(Introspective):
    """Soft labels from a class-by-class moving average of the similarities at the input.

    This is the bank of `introkernels.IntrospectiveObjective`, with exact explanations. Processes
    of `torch.distributed` fill one and the same.
    """

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from soft labels made of the likeness of the classes' "
        "explanations at the input pixels, averaged over images and steps"
    )

    bank_momentum: float = 0.9
    """Share of the average that a step keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("introspective_bank.bank_momentum", self.bank_momentum)

    def learner(self, setting: Setting) -> Learner:
        return _BankLearner(self, setting.new_model())


class _BankLearner(Learner):
    """A network, and how alike it has found its classes."""

    def __init__(self, method: IntrospectiveBank, model: Classifier) -> None:
        super().__init__()
        self.method = method
        self.model = model
        self._bank = SimilarityBank(method.bank_momentum)

    @property
    def bank(self) -> Tensor | None:
        """Similarities ``[C, C]``, row = true class; None before the first step."""
        return self._bank.matrix

    def forward(self, inputs: Tensor, target: Tensor) -> LossOutput:
        logits, stats = ik.explain.class_explanation_stats(
            self.model, inputs, target, method="exact", center=self.method.center
        )
        self._bank.update(
            stats,
            target,
            logits.shape[1],
            similarity=self.method.similarity,
            ignore_index=-100,
            group=distributed.group.WORLD if distributed.is_initialized() else None,
        )
        method = self.method
        teacher = of_similarities(
            self._bank.similarities(target),
            target,
            class_index=None,
            temperature=method.temperature,
            similarity_temperature=method.similarity_temperature,
            label_mode=method.label_mode,
            non_target_mass=method.non_target_mass,
        )
        return method.distil(logits, teacher, target)

    def get_extra_state(self) -> dict[str, Any]:
        """The bank, which has no fixed shape before it is first filled."""
        return self._bank.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._bank.restore(state)
