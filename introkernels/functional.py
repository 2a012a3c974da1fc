"""The public losses: check the call, choose the operators, apply the autograd Function.

All functions take tensors of any strides in float64, float32, bfloat16 or float16, where float32
and the half types mix. They never write to their arguments and accumulate in float32 at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from introkernels import checks, reference
from introkernels.autograd import (
    DistillationFunction,
    IntrospectiveFunction,
    LinearFunction,
    SimilarityFunction,
)
from introkernels.layout import flatten_explanations, flatten_rows
from introkernels.ops.select import operators
from introkernels.types import ExplanationStats, LabelMode, LossParts, Reduction, Similarity

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _LossKeywords(TypedDict, total=False):
    temperature: float
    ce_weight: float
    kl_weight: float
    ignore_index: int
    label_smoothing: float
    reduction: Reduction


class _DistillationKeywords(_LossKeywords, total=False):
    weight: Tensor | None


class _LabelKeywords(_LossKeywords, total=False):
    similarity_temperature: float
    similarity: Similarity
    label_mode: LabelMode
    non_target_mass: float


class _SimilarityKeywords(_LabelKeywords, total=False):
    weight: Tensor | None


class _IntrospectiveKeywords(_SimilarityKeywords, total=False):
    center: bool
    class_index: Tensor | None


class _LinearKeywords(_LabelKeywords, total=False):
    center: bool
    class_weight: Tensor | None


@overload
def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[_IntrospectiveKeywords],
) -> LossParts: ...


@overload
def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[_IntrospectiveKeywords],
) -> Tensor: ...


@overload
def introspective_loss(
    logits: Tensor,
    target: Tensor,
    gradients: Tensor,
    inputs: Tensor,
    *,
    return_parts: bool,
    **keywords: Unpack[_IntrospectiveKeywords],
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
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    center: bool = False,
    weight: Tensor | None = None,
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
            soft label, no gradient. A target that does not exist costs +inf.
        target: ``[B]`` int64 class indices, or ``ignore_index``.
        gradients: ``[B, C, *S]``, ``g_c = d z_c / d x``; with ``class_index``, ``[B, K, *S]``.
        inputs: ``[B, *S]``, the ``x`` that was explained (an image, an embedding, a feature).
        temperature: ``T > 0``, of both sides of the divergence.
        similarity_temperature: ``tau > 0``, of the similarities alone.
        ce_weight: factor of the cross entropy, >= 0.
        kl_weight: factor of ``T**2 * KL``, >= 0.
        similarity: ``"cosine"``, or ``"projection"`` (``<E_c, E_y> / <E_y, E_y>``), both clamped to
            [-1, 1]; 0 where a norm is zero, and 1 for the target by definition.
        label_mode: ``"softmax"``, or ``"split"``: the target gets ``1 - non_target_mass`` and the
            other classes share the rest by similarity.
        non_target_mass: in [0, 1], read by ``label_mode="split"``.
        center: explain ``z_c - mean_k z_k`` instead of ``z_c`` (the mean over the classes given):
            softmax can't see a shift common to all logits.
        weight: ``[C]`` class weights of the cross entropy, as in ``F.cross_entropy``.
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
    checks.logits_and_target(logits, target)
    num_classes = logits.shape[1]
    checks.class_index(class_index, logits.shape[0], logits)
    checks.gradients_and_inputs(gradients, inputs, class_index, num_classes)
    checks.rows_of("logits", logits, gradients=gradients)
    checks.mixable_dtypes("logits", logits, gradients=gradients)
    checks.same_device("logits", logits, gradients=gradients)
    checks.class_weight(weight, num_classes, logits)
    options = (
        *checks.loss_keywords(
            temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
        ),
        *checks.label_keywords(similarity_temperature, similarity, label_mode, non_target_mass),
    )
    parts = _apply(
        IntrospectiveFunction,
        operators(logits.device),
        logits,
        target,
        *flatten_explanations(gradients.detach(), inputs.detach()),
        class_index,
        checks.flag("center", center),
        weight,
        options,
    )
    return parts if return_parts else parts.loss


@overload
def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[_LinearKeywords],
) -> LossParts: ...


@overload
def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[_LinearKeywords],
) -> Tensor: ...


@overload
def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    return_parts: bool,
    **keywords: Unpack[_LinearKeywords],
) -> Tensor | LossParts: ...


def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    center: bool = False,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The introspective loss of a linear head, explained at its features in closed form.

    The logits ``z = features @ weight.T + bias`` are computed inside, in float32 at least; compiled
    backends do so for some rows at a time, and ``[N, C]`` never exists as a whole. The gradient of
    ``z_c`` in the features is row ``c`` of ``weight``, so ``E_c = weight_c * h``, and its
    statistics are matrix products: ``<E_c, E_y> = (h**2 * weight_y) . weight_c`` and
    ``<E_c, E_c> = h**2 . weight_c**2``.
    Explanations are constants; the gradient of ``z`` flows to features, weight and bias.

    Args:
        features: ``[..., D]``, the inputs of the head.
        weight: ``[C, D]``, as in ``nn.Linear``.
        target: ``[...]`` int64 class indices, or ``ignore_index``.
        bias: ``[C]`` or None.
        class_weight: ``[C]`` class weights of the cross entropy.

    The other keywords, the result and the errors are those of :func:`introspective_loss`;
    ``reduction="none"`` gives a loss, and parts, of the shape of ``target``.
    """
    checks.flag("return_parts", return_parts)
    checks.linear_head(features, weight, target, bias)
    checks.class_weight(class_weight, weight.shape[0], features, "class_weight")
    options = (
        *checks.loss_keywords(
            temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
        ),
        *checks.label_keywords(similarity_temperature, similarity, label_mode, non_target_mass),
    )
    parts = _apply(
        LinearFunction,
        operators(features.device),
        flatten_rows(features),
        weight,
        target.reshape(-1),
        bias,
        checks.flag("center", center),
        class_weight,
        options,
    )
    if reduction == "none":
        parts = LossParts(*(part.reshape(target.shape) for part in parts))
    return parts if return_parts else parts.loss


@overload
def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[_SimilarityKeywords],
) -> LossParts: ...


@overload
def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[_SimilarityKeywords],
) -> Tensor: ...


@overload
def similarity_loss(
    logits: Tensor,
    target: Tensor,
    stats: ExplanationStats,
    *,
    return_parts: bool,
    **keywords: Unpack[_SimilarityKeywords],
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
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The introspective loss from explanation statistics, however they were obtained.

    Args:
        logits: ``[B, C]``.
        target: ``[B]`` int64 class indices, or ``ignore_index``.
        stats: an :class:`ExplanationStats` of these rows, from :func:`explanation_stats` or
            :func:`introkernels.explain.class_explanation_stats`; no gradient flows to it.

    The keywords, the result and the errors are those of :func:`introspective_loss`.
    """
    checks.flag("return_parts", return_parts)
    checks.logits_and_target(logits, target)
    num_classes = logits.shape[1]
    checks.stats(stats, "logits", logits, num_classes)
    checks.class_weight(weight, num_classes, logits)
    options = (
        *checks.loss_keywords(
            temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
        ),
        *checks.label_keywords(similarity_temperature, similarity, label_mode, non_target_mass),
    )
    parts = _apply(
        SimilarityFunction,
        operators(logits.device),
        logits,
        target,
        stats.dots.detach(),
        stats.sq_norms.detach(),
        stats.class_index,
        weight,
        options,
    )
    return parts if return_parts else parts.loss


@overload
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[_DistillationKeywords],
) -> LossParts: ...


@overload
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[_DistillationKeywords],
) -> Tensor: ...


@overload
def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    return_parts: bool,
    **keywords: Unpack[_DistillationKeywords],
) -> Tensor | LossParts: ...


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Knowledge distillation from any teacher, in one pass over the logits.

    ``ce_weight * CE(z, y) + kl_weight * T**2 * KL(softmax(t / T) || softmax(z / T))`` (Hinton,
    Vinyals, Dean 2015, arXiv:1503.02531). The teacher gets no gradient.

    Args:
        logits: ``[B, C]``.
        teacher_logits: ``[B, C]``; -inf where a class has no soft label.
        target: ``[B]`` int64 class indices, or ``ignore_index``.

    The keywords, the result and the errors are those of :func:`introspective_loss`.
    """
    checks.flag("return_parts", return_parts)
    checks.logits_and_target(logits, target)
    checks.teacher_logits(teacher_logits, logits)
    checks.class_weight(weight, logits.shape[1], logits)
    options = checks.loss_keywords(
        temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction
    )
    parts = _apply(
        DistillationFunction,
        operators(logits.device),
        logits,
        teacher_logits.detach(),
        target,
        weight,
        options,
    )
    return parts if return_parts else parts.loss


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
    dots, sq_norms = operators(gradients.device).explanation_stats(
        *flatten_explanations(gradients.detach(), inputs.detach()),
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
    checks.positive("temperature", temperature)
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


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> LossParts:
    """Apply a loss's autograd Function, whose outputs begin with loss, ce and kl.

    Raises:
        RuntimeError: inside ``torch.compile`` of a ``torch.func`` transform. Dynamo would
            differentiate the forward operator, which lies below autograd, instead of calling the
            backward, and answer zero. Without ``fullgraph`` it catches this error and runs the
            transform eagerly, which is right.
    """
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "introkernels losses can't be compiled inside a torch.func transform: leave "
            "fullgraph=True out, or use the functions of introkernels.reference there"
        )
    loss, ce, kl, *_ = function.apply(*arguments)
    return LossParts(loss, ce, kl)
