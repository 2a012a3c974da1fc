"""Teacher-free distillation by self-training: Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge
Distillation via Label Smoothing Regularization", CVPR 2020, arXiv:1909.11723.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from introkernels.train.methods.base import register
from introkernels.train.methods.teaching import Taught


@register("tf_kd_self")
@dataclass(frozen=True)
class TfKdSelf(Taught):
    """Distillation from the same network, trained alone before."""

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from the softened predictions of the same network "
        "trained alone before"
    )
    source: ClassVar[str] = (
        "Yuan, Tay, Li, Wang, Feng, “Revisiting Knowledge Distillation via Label Smoothing "
        "Regularization”, CVPR 2020, arXiv:1909.11723 (Tf-KD_self)"
    )

    # The authors' settings for ResNet18 on CIFAR-100, but for a common factor of the loss.
    temperature: float = 6.0
    """Softens the predictions of teacher and student alike before they are compared."""
