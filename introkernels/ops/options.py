"""The options that losses share, as the operators take them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossOptions(NamedTuple):
    """The numbers of every loss, in the operators' order."""

    weight: Tensor | None
    temperature: float
    ce_weight: float
    kl_weight: float
    ignore_index: int
    label_smoothing: float
    reduction: int


class LabelOptions(NamedTuple):
    """The numbers that make soft labels of statistics, in the operators' order."""

    similarity_temperature: float
    similarity: int
    label_mode: int
    non_target_mass: float
