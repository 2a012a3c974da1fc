"""Control of introspective learning: the classes least alike get the largest soft labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from introkernels.train.methods.base import register
from introkernels.train.methods.introspective_controls import IntrospectiveControl
from introkernels.train.methods.responses import share_among_others


@register("introspective_inverted")
@dataclass(frozen=True)
class IntrospectiveInverted(IntrospectiveControl):
    """Soft labels of the wrong classes from their similarities with the opposite sign.

    With the mass that they have in `introspective_input`, their shares are
    ``softmax(-s_c / (tau * T))`` over the wrong classes.
    """

    summary: ClassVar[str] = (
        "as introspective input, but with the larger soft labels for wrong classes whose "
        "explanations are less alike the true class's"
    )

    def changed(self, log_q: Tensor, is_target: Tensor, similarity: Tensor) -> Tensor:
        scores = -similarity / (self.similarity_temperature * self.temperature)
        return share_among_others(log_q, is_target, scores)
