"""What lies between explanations and losses: statistics, and the soft labels made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from introkernels import checks, reference
from introkernels.ops.select import operators
from introkernels.types import ExplanationStats, LabelMode, Similarity


def explanation_stats(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    *,
    center: bool = False,
    class_index: Tensor | None = None,
    ignore_index: int = -100,
) -> ExplanationStats:
    """Statistics of the explanations ``E_c = g_c * x``: all that the losses need of them.

    ``E_c`` is gradient times input (Captum's ``InputXGradient``), flattened to ``D`` numbers; none
    of it is stored.

    Args:
        gradients: ``[B, C, *S]``; with ``class_index``, ``[B, K, *S]``.
        inputs: ``[B, *S]``.
        target: ``[B]`` int64 class indices, or ``ignore_index``.
        center: take the mean explanation of the classes given away from each.
        class_index: ``[B, K]`` int64, the classes explained, each once and the target among them.
        ignore_index: a target of this value leaves zeros in its row.

    Returns:
        ``dots`` and ``sq_norms`` ``[B, C or K]``, float64 for float64 arguments, else float32;
        they carry no graph.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        IndexError: a target outside ``[0, C)``, or a ``class_index`` below 0.
    """
    checks.floating_tensor("gradients", gradients)
    if gradients.dim() < 2:
        raise ValueError(f"gradients must have shape [B, C, *S], got {checks.describe(gradients)}")
    checks.target_of_rows(target, "gradients", gradients)
    checks.class_index(class_index, gradients.shape[0], gradients)
    checks.gradients_and_inputs(gradients, inputs, class_index, None)
    checks.in_memory(
        {"gradients": gradients, "inputs": inputs, "target": target, "class_index": class_index}
    )
    dots, sq_norms = operators(gradients.device).explanation_stats(
        gradients.detach(),
        inputs.detach(),
        target,
        class_index,
        checks.flag("center", center),
        checks.integer("ignore_index", ignore_index),
    )
    return ExplanationStats(dots, sq_norms, class_index)


def soft_labels(
    stats: ExplanationStats,
    target: Tensor,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    ignore_index: int = -100,
) -> Tensor:
    """The soft labels ``q`` of explanation statistics, to look at.

    They are those that :func:`similarity_loss` distils in rows where no logit is -inf.

    Args:
        stats: an :class:`ExplanationStats` of ``K`` explained classes.
        target: ``[B]`` int64 class indices, or ``ignore_index``.
        ignore_index: a target of this value leaves NaN in its row.

    Returns:
        ``[B, K]`` in the dtype of the statistics; each row sums to one.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        IndexError: a target outside ``[0, C)`` (not checked in compiled or transformed code, where
            its row is NaN).
    """
    checks.stats_and_target(stats, target)
    checks.in_memory(
        {
            "stats.dots": stats.dots,
            "stats.sq_norms": stats.sq_norms,
            "stats.class_index": stats.class_index,
            "target": target,
        }
    )
    checks.temperature("temperature", temperature)
    checks.integer("ignore_index", ignore_index)
    checks.label_keywords(similarity_temperature, similarity, label_mode, non_target_mass)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if not traced and stats.class_index is None:
        checks.target_in_range(target, stats.dots.shape[1], ignore_index)
    return reference.soft_labels(
        stats,
        target,
        temperature=temperature,
        similarity_temperature=similarity_temperature,
        similarity=similarity,
        label_mode=label_mode,
        non_target_mass=non_target_mass,
    )
