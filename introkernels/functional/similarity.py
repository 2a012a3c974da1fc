"""The loss from explanation statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from introkernels import checks
from introkernels.autograd import constant
from introkernels.functional.rows import RowCall, as_row_weight, logits_of_stats, row_loss
from introkernels.ops.select import operators
from introkernels.options import Options
from introkernels.types import (
    Divergence,
    ExplanationStats,
    LabelMode,
    LossParts,
    Reduction,
    Similarity,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from introkernels.functional.keywords import SimilarityKeywords


@overload
def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[SimilarityKeywords],
) -> LossParts: ...


@overload
def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[SimilarityKeywords],
) -> Tensor: ...


@overload
def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    return_parts: bool,
    **keywords: Unpack[SimilarityKeywords],
) -> Tensor | LossParts: ...


def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The introspective loss from explanation statistics, however they were obtained.

    Args:
        logits: ``[B, C]``.
        target: ``[B]`` int64 class indices, or ``ignore_index``; or class probabilities ``[B, C]``.
        stats: an :class:`ExplanationStats` of these rows, from :func:`explanation_stats` or
            :func:`introkernels.explain.class_explanation_stats`; no gradient flows to it.

    The keywords, the result and the errors are those of :func:`introspective_loss`.
    """
    checks.flag("return_parts", return_parts)
    checks.matrix("logits", logits)
    checks.logits_and_target(logits, target)
    num_classes = logits.shape[1]
    checks.stats(stats, "logits", logits, num_classes)
    checks.label_mode_of(target, label_mode)
    checks.class_weight(weight, num_classes, logits)
    checks.row_weight(row_weight, logits.shape[:1], logits)
    checks.in_memory(
        {
            "logits": logits,
            "target": target,
            "stats.dots": stats.dots,
            "stats.sq_norms": stats.sq_norms,
            "stats.class_index": stats.class_index,
            "weight": weight,
        }
    )
    options = Options(
        *checks.loss_keywords(
            temperature,
            ce_weight,
            kl_weight,
            label_smoothing,
            ignore_index,
            reduction,
            divergence,
            beta,
        ),
        *checks.label_keywords(similarity_temperature, similarity, label_mode, non_target_mass),
    )
    chosen = operators(logits.device)
    call = RowCall(logits, target, constant(weight), as_row_weight(row_weight, logits), options)
    parts = row_loss(chosen, call, logits_of_stats(chosen, call, stats))
    return parts if return_parts else parts.loss
