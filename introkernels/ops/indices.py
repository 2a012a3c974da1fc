"""Checks of indices by their values, before any kernel reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from introkernels import checks


def check_explained(
    gradients: Tensor, target: Tensor, class_index: Tensor | None, ignore_index: int
) -> None:
    """:func:`check_indices` of explanations ``[B, K, *S]`` alone.

    With ``class_index`` nobody says how many classes there are.
    """
    if target.is_meta or target.is_floating_point():
        return
    classes = gradients.shape[1] if class_index is None else torch.iinfo(torch.int64).max
    checks.target_in_range(target, classes, ignore_index)
    checks.class_index_values(class_index, target, None, ignore_index)


def check_indices(
    target: Tensor, num_classes: int, ignore_index: int, class_index: Tensor | None = None
) -> None:
    """Raise for indices of tensors whose values can be read: in the interpreter, and on request."""
    if target.is_meta:
        return
    checks.target_in_range(target, num_classes, ignore_index)
    checks.class_index_values(class_index, target, num_classes, ignore_index)
