"""How alike a model finds its classes: the similarities that soft labels are made of."""

from __future__ import annotations

from torch import Tensor

from introkernels import checks, reference
from introkernels.types import SIMILARITIES, ExplanationStats, Similarity


def similarities(
    stats: ExplanationStats, target: Tensor, *, similarity: Similarity = "cosine"
) -> Tensor:
    """The similarity of each class's explanation to that of the target, within [-1, 1].

    ``"cosine"``: ``dots_c / sqrt(sq_norms_c * sq_norms_y)``; ``"projection"``:
    ``dots_c / sq_norms_y``. It is 1 for the target, and 0 where a norm is zero.

    Args:
        stats: statistics ``[B, K]``.
        target: ``[B]`` int64.
        similarity: which of the two.

    Returns:
        ``[B, K]`` of the dtype of the statistics; ``stats.class_index`` tells the classes.

    Raises:
        TypeError, ValueError: for arguments of the wrong type, shape, dtype or value.
    """
    checks.stats_and_target(stats, target)
    name = SIMILARITIES[checks.choice("similarity", similarity, SIMILARITIES)]
    is_target = reference.target_columns(target, stats.dots.shape[1], stats.class_index)
    return reference.similarities(stats, is_target, name).to(stats.dots.dtype)
