"""Knowledge distillation: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network",
NIPS Deep Learning Workshop 2014, arXiv:1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from introkernels.train.methods.base import register
from introkernels.train.methods.teaching import TaughtByNetwork


@register("kd")
@dataclass(frozen=True)
class KnowledgeDistillation(TaughtByNetwork):
    """Cross entropy, plus the divergence from a trained teacher's softened predictions."""

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from the softened predictions of a trained network"
    )
    source: ClassVar[str] = (
        "Hinton, Vinyals, Dean, “Distilling the Knowledge in a Neural Network”, NIPS Deep Learning "
        "Workshop 2014, arXiv:1503.02531"
    )
