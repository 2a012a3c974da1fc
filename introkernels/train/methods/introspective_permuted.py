"""Control of introspective learning: soft labels of the wrong classes in random order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from introkernels.train.methods.base import register
from introkernels.train.methods.introspective_controls import IntrospectiveControl
from introkernels.train.methods.responses import permute_others


@register("introspective_permuted")
@dataclass(frozen=True)
class IntrospectivePermuted(IntrospectiveControl):
    """Soft labels as sharp as those of `introspective_input`, but blind to which classes are alike.

    The order of the wrong classes is drawn anew for each image at each step.
    """

    summary: ClassVar[str] = (
        "as introspective input, but with the soft labels of the wrong classes dealt out among "
        "them at random, anew each time"
    )

    def changed(self, log_q: Tensor, is_target: Tensor, similarity: Tensor) -> Tensor:
        return permute_others(log_q, is_target)
