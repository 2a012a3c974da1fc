"""torch.nn.functional.linear_cross_entropy, plain and in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from introkernels.bench.model import Contender, Operator


def _missing() -> str | None:
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy"


def prepare_plain(operator: Operator) -> Callable[..., Tensor]:
    """It holds all logits, as a linear layer before a cross entropy does."""
    return _with_options(None)


def prepare_chunked(operator: Operator) -> Callable[..., Tensor]:
    """Logits of some rows at a time, and gradients made along with the loss."""
    return _with_options(torch.nn.LinearCrossEntropyOptions())


def _with_options(options: Any) -> Callable[..., Tensor]:
    def call(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # Products rounded to a half type miss the tolerance.
        return F.linear_cross_entropy(features.float(), weight.float(), target, options=options)

    return call


_HALF_IN_FLOAT32 = "half inputs in float32"

LINEAR_CROSS_ENTROPY = Contender(
    "torch-linear-ce", prepare_plain, missing=_missing, made_equal=_HALF_IN_FLOAT32
)
CHUNKED_CROSS_ENTROPY = Contender(
    "torch-chunked-ce", prepare_chunked, missing=_missing, made_equal=_HALF_IN_FLOAT32
)
