"""Introspective learning that begins as plain cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import introkernels as ik
from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import Learner, LossOutput, Setting, register
from introkernels.train.methods.introspective import Introspective
from introkernels.train.methods.ranges import require_at_least


@register("introspective_ramp")
@dataclass(frozen=True)
class IntrospectiveRamp(Introspective):
    """`introspective_input` whose divergence gains its weight little by little.

    Step i, counted from 0, weighs it by ``kl_weight * min(1, i / warmup_steps)``, as
    `introkernels.IntrospectiveObjective` does: the explanations of a network that has learnt
    nothing tell nothing. Each part of a batch that is passed in parts counts as a step.
    """

    summary: ClassVar[str] = (
        "as introspective input, but with a divergence that gains its weight over the first steps"
    )

    warmup_steps: int = 50
    """Steps until the divergence has its whole weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("introspective_ramp.warmup_steps", self.warmup_steps, 1)

    def learner(self, setting: Setting) -> Learner:
        return _Ramped(self, setting.new_model())


class _Ramped(Learner):
    """A network, and how many steps it has been trained for."""

    def __init__(self, method: IntrospectiveRamp, model: Classifier) -> None:
        super().__init__()
        self.method = method
        self.model = model
        self.step = 0

    def forward(self, inputs: Tensor, target: Tensor) -> LossOutput:
        logits, stats = ik.explain.class_explanation_stats(
            self.model, inputs, target, method="exact", center=self.method.center
        )
        share = min(1.0, self.step / self.method.warmup_steps)
        keywords = self.method.keywords | {"kl_weight": share * self.method.kl_weight}
        parts = ik.similarity_loss(logits, target, stats, return_parts=True, **keywords)
        self.step += 1
        return LossOutput(parts.loss, logits, {"ce": parts.ce, "kl": parts.kl})

    def get_extra_state(self) -> dict[str, Any]:
        """How far the ramp is; no buffer, as reading one would wait for a GPU."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
