"""The numbers of a call, as the operators take them: a list of floats and one of integers."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """The numbers of any loss, with defaults for those that not every operator reads.

    ``floats`` and ``ints`` pack them for an operator and ``Options.of`` unpacks them;
    csrc/common/options.h does so in C++.
    """

    # In the order of checks.loss_keywords.
    temperature: float
    ce_weight: float
    kl_weight: float
    label_smoothing: float
    ignore_index: int
    reduction: int
    divergence: int = 0
    beta: float = 0.5
    # Of teacher logits of explanations.
    similarity_temperature: float = 1.0
    similarity: int = 0
    label_mode: int = 0
    non_target_mass: float = 0.0
    center: bool = False
    # Which gradients are wanted along with the loss: of the logits of a row loss, or of a head's
    # tensors.
    need_logits: bool = True
    need_features: bool = False
    need_weight: bool = False
    need_bias: bool = False
    # What a head's teacher is: see introkernels/ops/head/teachers.py.
    teacher: int = 0

    @property
    def floats(self) -> list[float]:
        return [
            self.temperature,
            self.ce_weight,
            self.kl_weight,
            self.label_smoothing,
            self.similarity_temperature,
            self.non_target_mass,
            self.beta,
        ]

    @property
    def ints(self) -> list[int]:
        return [
            self.ignore_index,
            self.reduction,
            self.similarity,
            int(self.center),
            int(self.need_features),
            int(self.need_weight),
            int(self.need_bias),
            int(self.need_logits),
            self.label_mode,
            self.divergence,
            self.teacher,
        ]

    @classmethod
    def of(cls, floats: list[float], ints: list[int]) -> Options:
        """The options that were packed into these lists."""
        temperature, ce_weight, kl_weight, label_smoothing, *labels, beta = floats
        similarity_temperature, mass = labels
        ignore_index, reduction, similarity, center, *needs, label_mode, divergence, teacher = ints
        features, weight, bias, logits = needs
        return cls(
            temperature,
            ce_weight,
            kl_weight,
            label_smoothing,
            ignore_index,
            reduction,
            divergence=divergence,
            beta=beta,
            similarity_temperature=similarity_temperature,
            similarity=similarity,
            label_mode=label_mode,
            non_target_mass=mass,
            center=bool(center),
            need_logits=bool(logits),
            need_features=bool(features),
            need_weight=bool(weight),
            need_bias=bool(bias),
            teacher=teacher,
        )
