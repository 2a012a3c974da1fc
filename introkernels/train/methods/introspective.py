"""What the introspective methods share: the hyperparameters of the loss, and its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import introkernels as ik
from introkernels.train.classifier import Classifier
from introkernels.train.methods.base import LossOutput, Method
from introkernels.train.methods.distilling import distil
from introkernels.types import LabelMode, Similarity


@dataclass(frozen=True)
class Introspective(Method):
    """Hyperparameters of the introspective loss, with the library's defaults."""

    introspective: ClassVar[bool] = True
    source: ClassVar[str] = (
        "idea: Gu, Wu, Tresp, “Introspective Learning by Distilling Knowledge from Online "
        "Self-explanation”, ACCV 2020, arXiv:2009.09140; similarity, weights and temperatures: ours"
    )

    # Validation accuracy % and NLL, at the input / at the head (by the rule of `TrainConfig`):
    # these defaults 93.8, 0.47 / 93.9, 0.47; temperature 2: 93.9, 0.52 / 94.2, 0.51;
    # weights 0.9 and 0.1: 93.4, 0.33 / 93.8, 0.33; weights 0.5 and 0.5: 93.6, 0.63 / 93.5, 0.62;
    # similarity temperature 0.3: 92.3, 0.46 / 91.7, 0.44; centred: 93.8, 0.48 / 93.6, 0.47.
    temperature: float = 4.0
    """Softens soft labels and predictions alike before they are compared."""
    similarity_temperature: float = 1.0
    """Divides the similarities: smaller makes soft labels sharper."""
    ce_weight: float = 0.7
    """Weight of the cross entropy with the true class."""
    kl_weight: float = 0.3
    """Weight of the divergence from the soft labels."""
    similarity: Similarity = "cosine"
    """How alike two explanations are: their cosine, or the projection on the true class's."""
    label_mode: LabelMode = "softmax"
    """Soft labels by one softmax over all classes, or with a fixed mass for the other classes."""
    non_target_mass: float = 0.1
    """The mass of the other classes; only used by label mode split."""
    center: bool = False
    """Explain each logit minus the mean logit."""

    def __post_init__(self) -> None:
        try:
            ik.SimilarityLoss(**self.keywords)
        except (TypeError, ValueError) as error:
            # The library's messages begin with the name of the keyword, which is the field's.
            raise ValueError(f"{self.name}.{error}") from error

    @property
    def label_keywords(self) -> dict[str, Any]:
        """Keyword arguments of `introkernels.teacher_logits`."""
        return {
            "temperature": self.temperature,
            "similarity_temperature": self.similarity_temperature,
            "similarity": self.similarity,
            "label_mode": self.label_mode,
            "non_target_mass": self.non_target_mass,
        }

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of the loss functions, `center` left out."""
        return self.label_keywords | {"ce_weight": self.ce_weight, "kl_weight": self.kl_weight}

    def distil(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LossOutput:
        """The loss with the soft labels of teacher logits ``[B, C]``."""
        return distil(
            logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kl_weight=self.kl_weight,
        )

    def explained_loss(
        self, model: Classifier, inputs: Tensor, target: Tensor, **how: Any
    ) -> LossOutput:
        """The loss with soft labels from the explanations of the whole model.

        ``how`` are the keyword arguments of ``class_explanation_stats``, `center` left out.
        """
        logits, stats = ik.explain.class_explanation_stats(
            model, inputs, target, center=self.center, **how
        )
        parts = ik.similarity_loss(logits, target, stats, return_parts=True, **self.keywords)
        return LossOutput(parts.loss, logits, {"ce": parts.ce, "kl": parts.kl})
