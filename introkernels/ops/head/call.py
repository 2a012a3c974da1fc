"""The arguments that the operators of a linear head share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from introkernels.ops.options import LabelOptions, LossOptions


class HeadCall(NamedTuple):
    """A head and its loss: ``features [B, D]``, ``weight [C, D]``, ``bias [C]`` or None."""

    features: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    center: bool
    loss: LossOptions
    labels: LabelOptions


class Needs(NamedTuple):
    """Which gradients are wanted."""

    features: bool
    weight: bool
    bias: bool
