"""The loss from explanations given as gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from introkernels import checks
from introkernels.autograd import IntrospectiveFunction, constant, loss_parts
from introkernels.functional.rows import (
    RowCall,
    as_row_weight,
    logits_of_stats,
    row_loss,
    weigh_rows,
)
from introkernels.ops.select import for_target, operators, serves_in_one_pass
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

    from introkernels.functional.keywords import IntrospectiveKeywords


@overload
def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[IntrospectiveKeywords],
) -> LossParts: ...


@overload
def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[IntrospectiveKeywords],
) -> Tensor: ...


@overload
def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    return_parts: bool,
    **keywords: Unpack[IntrospectiveKeywords],
) -> Tensor | LossParts: ...


def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
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
    center: bool = False,
    weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    class_index: Tensor | None = None,
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The introspective loss from explanations given as gradients, in one pass over them.

    ``ce_weight * CE(z, y) + kl_weight * T**2 * KL(q || softmax(z / T))``, where the soft labels
    ``q`` come from the similarity ``s_c`` of each class's explanation ``E_c = g_c * x`` to that of
    the target: ``q = softmax(s / (tau * T))``. They are constants: only ``logits`` has a gradient,
    ``ce_weight * dCE/dz + kl_weight * T * (p - q)``. The idea is that of Gu, Wu, Tresp (ACCV 2020,
    arXiv:2009.09140); similarity, weights and temperatures are our reading of it.

    Args:
        logits: ``[B, C]``. A class of logit -inf does not exist in its row: no probability, no
            soft label (those of the others are renormalised), no gradient. A target that does not
            exist costs +inf.
        target: ``[B]`` int64 class indices, or ``ignore_index``; or class probabilities ``y``
            ``[B, C]`` (mixup, cutmix), whose explanation is ``sum_k y_k E_k``.
        gradients: ``[B, C, *S]``, ``g_c = d z_c / d x``; with ``class_index``, ``[B, K, *S]``.
        inputs: ``[B, *S]``, the ``x`` that was explained (an image, an embedding, a feature).
        temperature: ``T`` in [0.05, 100], of both sides of the divergence.
        similarity_temperature: ``tau`` in [0.01, 100], of the similarities alone.
        ce_weight: factor of the cross entropy, >= 0.
        kl_weight: factor of ``T**2 * KL``, >= 0.
        divergence: ``"forward_kl"``, ``KL(q || p)``; ``"reverse_kl"``, ``KL(p || q)``, which is
            infinite where a class has no soft label; or ``"js"``,
            ``beta * KL(q || m) + (1 - beta) * KL(p || m)`` with ``m = beta * q + (1 - beta) * p``.
        beta: in (0, 1), read by ``divergence="js"``.
        similarity: ``"cosine"``, or ``"projection"`` (``<E_c, E_y> / <E_y, E_y>``), both clamped to
            [-1, 1]; 0 where a norm is zero, and 1 for the target by definition.
        label_mode: ``"softmax"``, or ``"split"``: the target gets ``1 - non_target_mass`` and the
            other classes share the rest by similarity.
        non_target_mass: in [0, 1], read by ``label_mode="split"``.
        center: explain ``z_c - mean_k z_k`` instead of ``z_c`` (the mean over the classes given):
            softmax can't see a shift common to all logits.
        weight: ``[C]`` class weights of the cross entropy, as in ``F.cross_entropy``.
        row_weight: ``[B]``, >= 0: a factor of each row's loss. A mean divides by the sum of those
            of rows not ignored.
        ignore_index: a target of this value takes its row out of the loss.
        label_smoothing: in [0, 1], of the cross entropy, spread over the classes that exist.
        reduction: ``"mean"`` (the cross entropy weighted as torch does it, KL over the rows not
            ignored; NaN where all are), ``"sum"``, or ``"none"`` (0 at ignored rows).
        class_index: ``[B, K]`` int64, the classes that ``gradients`` explain, each once and the
            target among them. The soft labels live on these; CE and ``p`` on all ``C``.
        return_parts: return :class:`LossParts` instead of the loss alone.

    Returns:
        The loss: a scalar, or ``[B]`` for ``"none"``; float64 for float64 logits, else float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        IndexError: a target or a ``class_index`` outside ``[0, C)`` (on a GPU the row is NaN
            instead, unless ``INTROKERNELS_CHECK=1``).
    """
    checks.flag("return_parts", return_parts)
    checks.matrix("logits", logits)
    checks.logits_and_target(logits, target)
    checks.label_mode_of(target, label_mode)
    num_classes = logits.shape[1]
    checks.class_index(class_index, logits.shape[0], logits)
    checks.gradients_and_inputs(gradients, inputs, class_index, num_classes)
    checks.rows_of("logits", logits, "gradients", gradients)
    checks.mixable_dtypes("logits", logits, "gradients", gradients)
    checks.same_device("logits", logits, "gradients", gradients)
    checks.class_weight(weight, num_classes, logits)
    checks.row_weight(row_weight, logits.shape[:1], logits)
    checks.in_memory(
        {
            "logits": logits,
            "target": target,
            "gradients": gradients,
            "inputs": inputs,
            "class_index": class_index,
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
        center=checks.flag("center", center),
    )
    chosen = operators(logits.device)
    gradients, inputs, weight = gradients.detach(), inputs.detach(), constant(weight)
    row_weight = as_row_weight(row_weight, logits)
    if not serves_in_one_pass(chosen, target, options):
        explaining = for_target(chosen, target)
        dots, sq_norms = explaining.explanation_stats(
            gradients, inputs, target, class_index, options.center, options.ignore_index
        )
        call = RowCall(logits, target, weight, row_weight, options)
        stats = ExplanationStats(dots, sq_norms, class_index)
        parts = row_loss(chosen, call, logits_of_stats(chosen, call, stats))
        return parts if return_parts else parts.loss

    def lose(weight: Tensor | None, options: Options) -> LossParts:
        return loss_parts(
            IntrospectiveFunction,
            chosen,
            logits,
            target,
            gradients,
            inputs,
            class_index,
            weight,
            options,
        )

    parts = weigh_rows(lose, target, weight, row_weight, options)
    return parts if return_parts else parts.loss
