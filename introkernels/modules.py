"""The losses as ``nn.Module``s: keywords in the constructor, tensors in the call.

The keywords stay attributes, so a schedule may change them between steps
(``loss.kl_weight = 0.5``). Compiled code specialises on their values: change them by the epoch
rather than by the step there, or leave the call of the loss out of the compiled function. Class
weights are a buffer and move with the module. Keywords, results and errors are those of the
functions of the same name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from introkernels import checks, functional
from introkernels.types import (
    Divergence,
    ExplanationStats,
    LabelMode,
    LossParts,
    Reduction,
    Similarity,
    Teacher,
)


class _Loss(nn.Module):
    """A loss that remembers its keywords; ``buffers`` are tensors or None."""

    temperature: float
    ce_weight: float
    kl_weight: float
    divergence: Divergence
    beta: float
    ignore_index: int
    label_smoothing: float
    reduction: Reduction
    return_parts: bool

    def __init__(self, buffers: dict[str, Tensor | None], **keywords: Any) -> None:
        super().__init__()
        checks.loss_keywords(
            keywords["temperature"],
            keywords["ce_weight"],
            keywords["kl_weight"],
            keywords["label_smoothing"],
            keywords["ignore_index"],
            keywords["reduction"],
            keywords["divergence"],
            keywords["beta"],
        )
        if "similarity" in keywords:
            checks.label_keywords(
                keywords["similarity_temperature"],
                keywords["similarity"],
                keywords["label_mode"],
                keywords["non_target_mass"],
            )
        if "center" in keywords:
            checks.flag("center", keywords["center"])
        checks.flag("return_parts", keywords["return_parts"])
        for name, tensor in buffers.items():
            if tensor is not None:
                checks.floating_tensor(name, tensor)
            self.register_buffer(name, tensor)
        for name, value in keywords.items():
            setattr(self, name, value)
        self._plain_names = tuple(keywords)
        self._names = (*keywords, *buffers)

    def keywords(self) -> dict[str, Any]:
        """The keywords of the function behind this module, as they stand now."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._plain_names)


class IntrospectiveLoss(_Loss):
    """Module form of :func:`introkernels.introspective_loss`."""

    similarity_temperature: float
    similarity: Similarity
    label_mode: LabelMode
    non_target_mass: float
    center: bool

    def __init__(
        self,
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
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            {"weight": weight},
            temperature=temperature,
            similarity_temperature=similarity_temperature,
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            divergence=divergence,
            beta=beta,
            similarity=similarity,
            label_mode=label_mode,
            non_target_mass=non_target_mass,
            center=center,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_parts=return_parts,
        )

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        gradients: Tensor,
        inputs: Tensor,
        class_index: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor | LossParts:
        """Logits ``[B, C]``, target ``[B]``, gradients ``[B, C or K, *S]``, inputs ``[B, *S]``."""
        result: Tensor | LossParts = functional.introspective_loss(
            logits,
            target,
            gradients,
            inputs,
            class_index=class_index,
            row_weight=row_weight,
            **self.keywords(),
        )
        return result


class LinearIntrospectiveLoss(_Loss):
    """Module form of :func:`introkernels.linear_introspective_loss`.

    It owns no head: features, weight and bias come with each call, so that the head stays where
    the model's other code expects it.
    """

    similarity_temperature: float
    similarity: Similarity
    label_mode: LabelMode
    non_target_mass: float
    center: bool

    def __init__(
        self,
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
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            {"class_weight": class_weight},
            temperature=temperature,
            similarity_temperature=similarity_temperature,
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            divergence=divergence,
            beta=beta,
            similarity=similarity,
            label_mode=label_mode,
            non_target_mass=non_target_mass,
            center=center,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_parts=return_parts,
        )

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor | LossParts:
        """Features ``[..., D]``, weight ``[C, D]``, target ``[...]``, bias ``[C]`` or None."""
        result: Tensor | LossParts = functional.linear_introspective_loss(
            features, weight, target, bias, row_weight=row_weight, **self.keywords()
        )
        return result


class SimilarityLoss(_Loss):
    """Module form of :func:`introkernels.similarity_loss`."""

    similarity_temperature: float
    similarity: Similarity
    label_mode: LabelMode
    non_target_mass: float

    def __init__(
        self,
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
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            {"weight": weight},
            temperature=temperature,
            similarity_temperature=similarity_temperature,
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            divergence=divergence,
            beta=beta,
            similarity=similarity,
            label_mode=label_mode,
            non_target_mass=non_target_mass,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_parts=return_parts,
        )

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        stats: ExplanationStats,
        row_weight: Tensor | None = None,
    ) -> Tensor | LossParts:
        """Logits ``[B, C]``, target ``[B]``, statistics ``[B, C or K]``."""
        result: Tensor | LossParts = functional.similarity_loss(
            logits, target, stats, row_weight=row_weight, **self.keywords()
        )
        return result


class DistillationLoss(_Loss):
    """Module form of :func:`introkernels.distillation_loss`."""

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        ce_weight: float = 0.7,
        kl_weight: float = 0.3,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            {"weight": weight},
            temperature=temperature,
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            divergence=divergence,
            beta=beta,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_parts=return_parts,
        )

    def forward(
        self,
        logits: Tensor,
        teacher: Teacher,
        target: Tensor | None,
        row_weight: Tensor | None = None,
    ) -> Tensor | LossParts:
        """Logits ``[B, C, d1, ...]``, any teacher of them, target ``[B, d1, ...]``."""
        result: Tensor | LossParts = functional.distillation_loss(
            logits, teacher, target, row_weight=row_weight, **self.keywords()
        )
        return result


class LinearDistillationLoss(_Loss):
    """Module form of :func:`introkernels.linear_distillation_loss`.

    It owns no head, as :class:`LinearIntrospectiveLoss` owns none.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        ce_weight: float = 0.7,
        kl_weight: float = 0.3,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__(
            {"class_weight": class_weight},
            temperature=temperature,
            ce_weight=ce_weight,
            kl_weight=kl_weight,
            divergence=divergence,
            beta=beta,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            return_parts=return_parts,
        )

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        teacher: Teacher,
        target: Tensor | None,
        bias: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor | LossParts:
        """Features ``[..., D]``, weight ``[C, D]``, any teacher, target ``[...]``, bias ``[C]``."""
        result: Tensor | LossParts = functional.linear_distillation_loss(
            features, weight, teacher, target, bias, row_weight=row_weight, **self.keywords()
        )
        return result
