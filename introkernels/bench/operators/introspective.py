"""The introspective loss from gradients, and its statistics alone: forward only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

import introkernels as ik
from introkernels.bench.model import Contender, Operator, Sizes, Tensors
from introkernels.bench.operators.constants import INDEX_BYTES, LOSS_BYTES, STATISTIC_BYTES
from introkernels.bench.operators.distillation import distillation_eager, draw_logits


def stats_eager(gradients: Tensor, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient times input, its inner products and norms, term by term."""
    explanations = gradients.float() * inputs.float()[:, None]
    of_target = explanations[torch.arange(len(target)), target]
    dots = (explanations * of_target[:, None]).sum(-1)
    return dots, explanations.square().sum(-1)


def introspective_eager(
    logits: Tensor, target: Tensor, gradients: Tensor, inputs: Tensor
) -> Tensor:
    explanations = gradients.float() * inputs.float()[:, None]
    of_target = explanations[torch.arange(len(target)), target]
    dots = (explanations * of_target[:, None]).sum(-1)
    return _loss_of_explanations(logits, target, explanations, dots)


def introspective_einsum(
    logits: Tensor, target: Tensor, gradients: Tensor, inputs: Tensor
) -> Tensor:
    """As :func:`introspective_eager` with the inner products as a product of matrices.

    That is faster eagerly and slower compiled, where it can't be fused with the rest.
    """
    explanations = gradients.float() * inputs.float()[:, None]
    of_target = explanations[torch.arange(len(target)), target]
    dots = torch.einsum("bcd,bd->bc", explanations, of_target)
    return _loss_of_explanations(logits, target, explanations, dots)


def _loss_of_explanations(
    logits: Tensor, target: Tensor, explanations: Tensor, dots: Tensor
) -> Tensor:
    norms = explanations.norm(dim=-1)
    norm_of_target = norms.gather(1, target[:, None])
    cosine = dots / (norms * norm_of_target).clamp_min(torch.finfo(norms.dtype).tiny)
    return distillation_eager(logits, cosine.clamp(-1, 1), target)


def _einsum(operator: Operator) -> Callable[..., Tensor]:
    return introspective_einsum


def _draw_stats(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    """Gradients of small, unequal scale, part of which all classes share; normalised inputs."""
    B, C, D = sizes["B"], sizes["C"], sizes["D"]
    gradients = torch.randn(B, C, D, generator=generator)
    gradients += 0.5 * torch.randn(B, 1, D, generator=generator)
    gradients *= 0.01 * (0.5 + torch.rand(B, C, 1, generator=generator))
    return {
        "gradients": gradients.to(dtype),
        "inputs": torch.randn(B, D, generator=generator).to(dtype),
        "target": torch.randint(C, (B,), generator=generator),
    }


def _draw_introspective(sizes: Sizes, dtype: torch.dtype, generator: Generator) -> Tensors:
    logits, target = draw_logits(sizes["B"], sizes["C"], generator)
    explained = _draw_stats(sizes, dtype, generator)
    return {
        "logits": logits.to(dtype),
        "target": target,
        "gradients": explained["gradients"],
        "inputs": explained["inputs"],
    }


def _stats(gradients: Tensor, inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return ik.explanation_stats(gradients, inputs, target)[:2]


def _stats_definition(gradients: Tensor, inputs: Tensor, target: Tensor) -> object:
    return ik.reference.explanation_stats(gradients, inputs, target)[:2]


def _introspective_definition(
    logits: Tensor, target: Tensor, gradients: Tensor, inputs: Tensor
) -> object:
    return ik.reference.introspective_loss(logits, target, gradients, inputs, reduction="sum")


def _stats_bytes(sizes: Sizes, element: int) -> int:
    """Gradients, inputs and targets in; two statistics of each class out."""
    B, C, D = sizes["B"], sizes["C"], sizes["D"]
    return (B * C * D + B * D) * element + B * INDEX_BYTES + 2 * B * C * STATISTIC_BYTES


def _introspective_bytes(sizes: Sizes, element: int) -> int:
    """Gradients, inputs, logits and targets in; the loss out."""
    B, C, D = sizes["B"], sizes["C"], sizes["D"]
    return (B * C * D + B * D + B * C) * element + B * INDEX_BYTES + LOSS_BYTES


INTROSPECTIVE = Operator(
    name="introspective",
    dims=("B", "C", "D"),
    draw=_draw_introspective,
    outputs=("loss",),
    differentiable=(),
    largest="gradients",
    compute=ik.introspective_loss,
    eager=introspective_eager,
    definition=_introspective_definition,
    bytes_moved=_introspective_bytes,
    contenders=(Contender("einsum", _einsum),),
)

STATISTICS = Operator(
    name="statistics",
    dims=("B", "C", "D"),
    draw=_draw_stats,
    outputs=("dots", "sq_norms"),
    differentiable=(),
    largest="gradients",
    compute=_stats,
    eager=stats_eager,
    definition=_stats_definition,
    bytes_moved=_stats_bytes,
)
