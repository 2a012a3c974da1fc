"""Which classes of a row are explained, next to what, and the statistics of that."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from introkernels import checks
from introkernels.explain.explainers import Tensors
from introkernels.types import ExplanationStats


@dataclass(frozen=True)
class ExplainedClasses:
    """The classes to explain, and the target whose explanation is the measure of theirs.

    Attributes:
        index: ``[B, K]`` int64, the classes of each row.
        chosen: whether they were chosen row by row, the target first; else they are all classes.
        target: ``[B]``, the row's target, or class 0 where it has none; or ``[B, C]``, a mixture
            of all classes by their probabilities.
        live: ``[B]``, False in ignored rows.
        known: ``[B]``, False where the target is no class.
    """

    index: Tensor
    chosen: bool
    target: Tensor
    live: Tensor
    known: Tensor

    @property
    def target_is_mixed(self) -> bool:
        """Whether the target is a mixture, and so no class's column is its own."""
        return self.target.is_floating_point()

    def of_target(self, values: Tensor) -> Tensor:
        """The target's ``[B]`` of the classes' ``[B, K]``, numbers linear in the explanation."""
        if self.target_is_mixed:
            return (self.target.to(values.dtype) * values).sum(1)
        return values[:, 0] if self.chosen else values.gather(1, self.target[:, None])[:, 0]


def explained_classes(
    logits: Tensor, target: Tensor, top_k: int | None, ignore_index: int
) -> ExplainedClasses:
    """All classes, or each row's target and its ``top_k`` other classes of highest logits.

    A target ``[B, C]`` of class probabilities goes with all classes.
    """
    rows, num_classes = logits.shape
    every = torch.arange(num_classes, device=target.device).expand(rows, num_classes)
    if target.is_floating_point():
        checks.class_probabilities(target, logits)
        all_rows = torch.ones(rows, dtype=torch.bool, device=target.device)
        return ExplainedClasses(every, False, target, all_rows, all_rows)
    if top_k is not None and not 1 <= top_k < num_classes:
        raise ValueError(
            f"top_k must be in [1, {num_classes - 1}], the number of classes other than the "
            f"target, got {top_k}"
        )
    checks.target_in_range(target, num_classes, ignore_index)
    live = target != ignore_index
    known = (target >= 0) & (target < num_classes)
    target = torch.where(live & known, target, 0)
    if top_k is None:
        index = every
    else:
        # The other classes by name: with the target merely masked to -inf it could come back
        # among classes whose own logit is -inf.
        others = torch.arange(num_classes - 1, device=target.device).expand(rows, -1)
        others = others + (others >= target[:, None])
        best = logits.detach().gather(1, others).topk(top_k, dim=1).indices
        index = torch.cat([target[:, None], others.gather(1, best)], dim=1)
    return ExplainedClasses(index, top_k is not None, target, live, known)


def statistics(
    target_gradient: Tensors,
    gradients: Iterable[Tensors],
    factor: Tensors | None,
    classes: ExplainedClasses,
) -> ExplanationStats:
    """Statistics of the explanations ``gradient * factor``, a few classes at a time.

    Args:
        target_gradient: of the target's logit, or of the mixture of logits, ``[B, *S]`` for each
            explained tensor.
        gradients: tensors ``[n, B, *S]`` for each explained tensor, which together hold the columns
            of ``classes.index`` in order, without the target's if ``classes.chosen``.
        factor: ``[B, *S]`` for each explained tensor, or None for 1.
        classes: which classes these are.
    """
    wide = wide_dtype(*target_gradient, *(factor or ()))
    factors = [None] * len(target_gradient) if factor is None else [f.to(wide) for f in factor]

    def explained(some: Tensors, leading: int) -> list[Tensor]:
        return [
            flat(g.to(wide) if f is None else g.to(wide) * f, leading)
            for g, f in zip(some, factors, strict=True)
        ]

    of_target = explained(target_gradient, 1)
    dots, sq_norms = [], []
    for some in gradients:
        explanations = explained(some, 2)
        dots.append(_added((e * t).sum(-1) for e, t in zip(explanations, of_target, strict=True)))
        sq_norms.append(_added(e.square().sum(-1) for e in explanations))
    target_sq_norm = sq_norm(tuple(of_target))
    if classes.chosen:
        dots.insert(0, target_sq_norm[None])
        sq_norms.insert(0, target_sq_norm[None])
    return finished(torch.cat(dots).t(), torch.cat(sq_norms).t(), target_sq_norm, classes)


def finished(
    dots: Tensor, sq_norms: Tensor, target_sq_norm: Tensor, classes: ExplainedClasses
) -> ExplanationStats:
    """Statistics ``[B, K]`` in which target and ignored rows have their values by definition.

    The target's two numbers are one and the same, so that its similarity to itself is 1 to the
    last bit; a mixture is no class, and has none. Ignored rows are zero; dots with a target that
    is no class are NaN.
    """
    if not classes.target_is_mixed:
        is_target = classes.index == classes.target[:, None]
        dots = torch.where(is_target, target_sq_norm[:, None], dots)
        sq_norms = torch.where(is_target, target_sq_norm[:, None], sq_norms)
    dots = torch.where(classes.known[:, None], dots, float("nan"))
    live = classes.live[:, None]
    return ExplanationStats(
        torch.where(live, dots, 0).contiguous(),
        torch.where(live, sq_norms, 0).contiguous(),
        classes.index if classes.chosen else None,
    )


def sq_norm(explanation: Tensors) -> Tensor:
    """The squared length ``[B]`` of explanations ``[B, *S]``, over all tensors of them."""
    wide = wide_dtype(*explanation)
    return _added(flat(part.to(wide), 1).square().sum(-1) for part in explanation)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def flat(tensor: Tensor, leading: int) -> Tensor:
    """All dimensions after the ``leading`` first ones in one, also if there are none or B = 0."""
    return tensor.reshape(*tensor.shape[:leading], math.prod(tensor.shape[leading:]))


def _added(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)
