"""Checks of indices by their values, before any kernel reads them."""

from __future__ import annotations

from torch import Tensor

from introkernels import checks


def check_indices(
    target: Tensor, num_classes: int, ignore_index: int, class_index: Tensor | None = None
) -> None:
    """Raise for indices of tensors whose values can be read: in the interpreter, and on request."""
    if target.is_meta:
        return
    checks.target_in_range(target, num_classes, ignore_index)
    checks.class_index_values(class_index, target, num_classes, ignore_index)
