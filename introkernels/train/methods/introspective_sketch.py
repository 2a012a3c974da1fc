"""Introspective learning with explanations at the input, their lengths estimated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.introspective import Introspective


@register("introspective_sketch")
@dataclass(frozen=True)
class IntrospectiveSketch(Introspective):
    """Soft labels from gradient×input at the input; costs the same for any number of classes."""

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from soft labels made of the likeness of the "
        "explanations at the input pixels, their lengths estimated from random probes"
    )

    probes: int = 8
    """Random vectors; the error of a cosine falls as one over the root of their number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1:
            raise ValueError(f"introspective_sketch.probes: got {self.probes}, expected at least 1")

    def loss(self, model: Classifier, inputs: Tensor, target: Tensor) -> LossOutput:
        # A checkpoint holds the state of torch's own generator, and of no other.
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        generator = torch.Generator(inputs.device).manual_seed(seed)
        return self.explained_loss(
            model, inputs, target, method="sketch", probes=self.probes, generator=generator
        )
