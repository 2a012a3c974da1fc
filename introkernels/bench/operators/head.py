"""The introspective loss of a linear head: forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

import introkernels as ik
from introkernels.bench.model import Contender, Operator, Sizes, Tensors
from introkernels.bench.operators.constants import INDEX_BYTES, LOSS_BYTES
from introkernels.bench.operators.distillation import similarity_eager

# Logits, dots and norms forward; the gradients of features and weight backward.
MATRIX_PRODUCTS = 5


def head_eager(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Closed form: three products of matrices, each ``[B, C]``, and the loss on them.

    Half inputs in float32: products rounded to a half type miss the tolerance.
    """
    features, weight = features.float(), weight.float()
    logits = F.linear(features, weight)
    with torch.no_grad():
        squares = features.square()
        dots = F.linear(squares * weight[target], weight)
        sq_norms = F.linear(squares, weight.square())
    return similarity_eager(logits, target, dots, sq_norms)


def head_matmuls(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The floor: the same products with a plain cross entropy in the place of the loss.

    The statistics are made and thrown away.
    """
    logits = F.linear(features, weight)
    with torch.no_grad():
        squares = features.square()
        F.linear(squares * weight[target], weight)
        F.linear(squares, weight.square())
    return F.cross_entropy(logits, target)


def _matmuls(operator: Operator) -> Callable[..., Tensor]:
    return head_matmuls


def draw_head(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    """Features as a rectifier leaves them, half of them zero; weights of a fresh Linear layer."""
    B, C, D = sizes["B"], sizes["C"], sizes["D"]
    return {
        "features": torch.randn(B, D, generator=generator).relu_().to(dtype),
        "weight": torch.randn(C, D, generator=generator).mul_(D**-0.5).to(dtype),
        "target": torch.randint(C, (B,), generator=generator),
    }


def _definition(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The closed form in float64: the definition proper would hold ``B * C * D`` numbers."""
    with ik.use_backend("reference"):
        return ik.linear_introspective_loss(features, weight, target, reduction="sum")


def _bytes(sizes: Sizes, element: int) -> int:
    """Features, weight and targets in; the gradients of features and weight and the loss out."""
    B, C, D = sizes["B"], sizes["C"], sizes["D"]
    return 2 * (B * D + C * D) * element + B * INDEX_BYTES + LOSS_BYTES


def _flops(sizes: Sizes) -> int:
    return MATRIX_PRODUCTS * 2 * sizes["B"] * sizes["C"] * sizes["D"]


HEAD = Operator(
    name="head",
    dims=("B", "C", "D"),
    draw=draw_head,
    outputs=("loss",),
    differentiable=("features", "weight"),
    largest="weight",
    compute=ik.linear_introspective_loss,
    eager=head_eager,
    definition=_definition,
    bytes_moved=_bytes,
    flops=_flops,
    shared=("weight",),
    contenders=(Contender("matmuls", _matmuls, role="floor"),),
)
