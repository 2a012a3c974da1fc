"""The values that travel between explainers, losses and their users."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Similarity = Literal["cosine", "projection"]
LabelMode = Literal["softmax", "split"]
Reduction = Literal["mean", "sum", "none"]

SIMILARITIES: tuple[Similarity, ...] = ("cosine", "projection")
LABEL_MODES: tuple[LabelMode, ...] = ("softmax", "split")
REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "sum")


class ExplanationStats(NamedTuple):
    """All that the losses need of the explanations ``E_c`` of a row: two numbers for each class.

    Attributes:
        dots: ``[B, K]``, ``<E_c, E_y>``, the inner product with the target's explanation.
        sq_norms: ``[B, K]``, ``<E_c, E_c>``.
        class_index: ``[B, K]`` int64, the explained classes of each row, or None when all
            ``C`` classes are explained in order (then ``K = C``).

    ``dots`` and ``sq_norms`` are float64 for float64 explanations and float32 for all others, and
    zero in ignored rows.
    """

    dots: Tensor
    sq_norms: Tensor
    class_index: Tensor | None = None


class LossParts(NamedTuple):
    """A loss with its two terms, as ``return_parts=True`` gives them.

    Attributes:
        loss: ``ce_weight * ce + kl_weight * T**2 * kl``; carries the graph.
        ce: the cross entropy, detached and unweighted.
        kl: the divergence ``KL(q || p)``, detached and without its weight and its ``T**2``.

    All three are reduced alike: scalars, or ``[B]`` with ``reduction="none"``.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
