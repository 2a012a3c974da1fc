"""Class-wise self-knowledge distillation: Yun, Park, Lee, Shin, "Regularizing Class-wise
Predictions via Self-knowledge Distillation", CVPR 2020, arXiv:2003.13964.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.distilling import Distilling


@register("cs_kd")
@dataclass(frozen=True)
class CsKd(Distilling):
    """Cross entropy of an image, plus the divergence from what is predicted for another of its
    class.
    """

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from the network's own softened prediction for another "
        "image of the same class"
    )
    source: ClassVar[str] = (
        "Yun, Park, Lee, Shin, “Regularizing Class-wise Predictions via Self-knowledge "
        "Distillation”, CVPR 2020, arXiv:2003.13964"
    )

    temperature: float = 4.0
    """Softens both predictions before they are compared."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the true class."""
    kl_weight: float = 1.0
    """Weight of the divergence between the two predictions."""

    def batches(
        self, labels: Tensor, batch_size: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Pairs ``[B, 2]``: every image once, with a random other one of its class.

        An image that is alone in its class is its own partner.
        """
        partners = _partners(labels, generator)
        for index in super().batches(labels, batch_size, generator):
            yield torch.stack([index, partners[index]], dim=1)

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        """Loss of pairs, one after the other: inputs ``[2·B, *S]``, classes ``target [2·B]``."""
        logits = model(inputs[0::2])
        # Apart from the first images, as they are in the authors' code, also in BatchNorm.
        with torch.no_grad():
            partner_logits = model(inputs[1::2])
        output = self.distil(logits, partner_logits, target[0::2])
        both = torch.stack([logits.detach(), partner_logits], dim=1).flatten(0, 1)
        return LossOutput(output.loss, both, output.parts)


def _partners(labels: Tensor, generator: torch.Generator) -> Tensor:
    """For each image the index of another of its class, all with the same chance; ``[N]``."""
    by_class = labels.argsort(stable=True)
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    size, start = sizes[labels], starts[labels]
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels))
    rank -= start
    draws = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    # From 1 to size - 1 places further on, around the end of the class.
    step = 1 + (draws * (size - 1)).long()
    return by_class[start + (rank + step) % size]
