"""Control of introspective learning: soft labels that are the same for all wrong classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from introkernels.train.methods.base import register
from introkernels.train.methods.introspective_controls import IntrospectiveControl
from introkernels.train.methods.responses import share_among_others


@register("introspective_mean")
@dataclass(frozen=True)
class IntrospectiveMean(IntrospectiveControl):
    """Label smoothing by as much, for each image, as `introspective_input` smooths its label."""

    summary: ClassVar[str] = (
        "as introspective input, but with the soft labels of the wrong classes spread evenly over "
        "them"
    )

    def changed(self, log_q: Tensor, is_target: Tensor, similarity: Tensor) -> Tensor:
        return share_among_others(log_q, is_target, torch.zeros_like(log_q))
