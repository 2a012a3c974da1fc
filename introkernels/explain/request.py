"""What the caller asks of a method, and what a method asks of the model's output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from introkernels import checks


class Request(NamedTuple):
    """The arguments of ``class_explanation_stats`` that the methods share."""

    target: Tensor
    top_k: int | None
    chunk: int | None
    center: bool
    ignore_index: int


def logits_of(output: object, inputs: Tensor) -> Tensor:
    """The model's output; raises ValueError unless it is floating ``[B, C]`` with ``C >= 1``."""
    rows = inputs.shape[0]
    if (
        not isinstance(output, Tensor)
        or not output.is_floating_point()
        or output.dim() != 2
        or output.shape[0] != rows
        or output.shape[1] == 0
    ):
        got = checks.describe(output) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"model must return logits of shape [{rows}, C] for inputs "
            f"{checks.describe(inputs)}, got {got}"
        )
    return output
