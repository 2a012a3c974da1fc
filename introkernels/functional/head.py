"""What losses of a linear head share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from introkernels.autograd import LinearFunction, loss_parts
from introkernels.functional.rows import as_row_weight, weigh_rows
from introkernels.options import Options
from introkernels.types import REDUCTIONS, LossParts


class HeadCall(NamedTuple):
    """A head's rows, and what they are held against beside a teacher.

    ``features [..., D]``, ``weight [C, D]``, ``target [...]``, ``bias [C]``, ``class_weight [C]``
    and ``row_weight [...]``, the last three or None.
    """

    features: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    row_weight: Tensor | None
    options: Options


def head_loss(
    operators: SimpleNamespace, call: HeadCall, teacher: tuple[Tensor, ...] = ()
) -> LossParts:
    """The loss of a head that learns from ``teacher``, or from its own explanations."""
    features, target = call.features, call.target.flatten()
    rows = features.unsqueeze(0) if features.dim() == 1 else features.flatten(0, -2)

    def lose(class_weight: Tensor | None, options: Options) -> LossParts:
        wanted = _gradients_wanted(options, features, call.weight, call.bias)
        need_features, need_weight, need_bias = wanted
        options = options._replace(
            need_features=need_features, need_weight=need_weight, need_bias=need_bias
        )
        return loss_parts(
            LinearFunction,
            operators,
            rows,
            call.weight,
            target,
            call.bias,
            class_weight,
            teacher,
            options,
        )

    row_weight = as_row_weight(call.row_weight, features)
    parts = weigh_rows(lose, target, call.class_weight, row_weight, call.options)
    if REDUCTIONS[call.options.reduction] == "none":
        parts = LossParts(*(part.reshape(call.target.shape) for part in parts))
    return parts


def _gradients_wanted(options: Options, *tensors: Tensor | None) -> tuple[bool, ...]:
    """Which gradients a forward may make along with its loss: those a backward will ask for.

    None where the loss is not one number, and none where a trace or a transform hides the answer:
    then the backward makes them.
    """
    known = (
        REDUCTIONS[options.reduction] != "none"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
    return tuple([known and tensor is not None and tensor.requires_grad for tensor in tensors])
