"""The values that travel between explainers, losses and their users."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

Similarity = Literal["cosine", "projection"]
LabelMode = Literal["softmax", "split"]
Reduction = Literal["mean", "sum", "none"]
Divergence = Literal["forward_kl", "reverse_kl", "js"]
Tail = Literal["bucket", "renormalize"]

SIMILARITIES: tuple[Similarity, ...] = ("cosine", "projection")
LABEL_MODES: tuple[LabelMode, ...] = ("softmax", "split")
REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "sum")
TAILS: tuple[Tail, ...] = ("bucket", "renormalize")
DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "js")


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


class LinearTeacher(NamedTuple):
    """A teacher that is a linear head: ``features @ weight.T + bias``.

    A head distils from it a chunk of rows at a time, so that ``[N, C]`` never exists as a whole.
    Its features may be wider or narrower than the student's; either network may own the weight.

    Attributes:
        features: ``[..., D]``, of the rows of the student.
        weight: ``[C, D]``.
        bias: ``[C]`` or None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None


class TopKTeacher(NamedTuple):
    """The k strongest classes of a teacher, as they are stored.

    Attributes:
        indices: ``[..., K]`` int64, different classes.
        log_probs: ``[..., K]``, logarithms of their probabilities among all classes, at a
            temperature of 1.
        tail: what becomes of the others. ``"bucket"``: they are one more class on both sides, of
            the probability that is missing, so that the divergence is one of two distributions.
            ``"renormalize"``: they are left out, and both sides are distributions over the K.

    With all classes among them, ``K = C``, either is what the teacher's logits give.
    """

    indices: Tensor
    log_probs: Tensor
    tail: Tail = "bucket"


# Whatever a student can learn from; a tensor holds teacher logits.
Teacher: TypeAlias = Tensor | ExplanationStats | LinearTeacher | TopKTeacher


class LossParts(NamedTuple):
    """A loss with its two terms, as ``return_parts=True`` gives them.

    Attributes:
        loss: ``ce_weight * ce + kl_weight * T**2 * kl``; carries the graph.
        ce: the cross entropy, detached and unweighted.
        kl: the divergence, detached and without its weight and its ``T**2``.

    All three are reduced alike: scalars, or ``[B]`` with ``reduction="none"``.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
