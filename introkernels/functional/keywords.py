"""The keywords of the losses, as type checkers see them."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from introkernels.types import Divergence, LabelMode, Reduction, Similarity


class LossKeywords(TypedDict, total=False):
    temperature: float
    ce_weight: float
    kl_weight: float
    divergence: Divergence
    beta: float
    row_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: Reduction


class DistillationKeywords(LossKeywords, total=False):
    weight: Tensor | None


class LabelKeywords(LossKeywords, total=False):
    similarity_temperature: float
    similarity: Similarity
    label_mode: LabelMode
    non_target_mass: float


class SimilarityKeywords(LabelKeywords, total=False):
    weight: Tensor | None


class IntrospectiveKeywords(SimilarityKeywords, total=False):
    center: bool
    class_index: Tensor | None


class LinearDistillationKeywords(LossKeywords, total=False):
    class_weight: Tensor | None


class LinearKeywords(LabelKeywords, total=False):
    center: bool
    class_weight: Tensor | None
