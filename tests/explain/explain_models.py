"""Small models and the dense definition that the explanation tests share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from introkernels.types import ExplanationStats

CLASSES = 5


def images(dtype: torch.dtype = torch.float64, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(rows, 2, 6, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (rows,), generator=generator)
    return inputs.to(dtype), target


def cnn(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolutions, BatchNorm with running statistics off their defaults, Dropout; training."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.4),
        nn.Conv2d(4, 6, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    ).double()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model.to(dtype)


def dense_explanations(model: nn.Module, inputs: Tensor) -> Tensor:
    """``E [B, C, D]`` of the model in eval mode, in float64, from its whole Jacobian."""
    model, inputs = copy.deepcopy(model).double().eval(), inputs.double()
    # [B, C, B, *S], zero where the two rows differ.
    jacobian = torch.autograd.functional.jacobian(model, inputs)
    assert isinstance(jacobian, Tensor)
    rows = torch.arange(len(inputs))
    gradients = jacobian[rows, :, rows]
    return (gradients * inputs[:, None]).flatten(2)


def dense_stats(explanations: Tensor, target: Tensor, center: bool = False) -> ExplanationStats:
    if center:
        explanations = explanations - explanations.mean(1, keepdim=True)
    of_target = explanations[torch.arange(len(target)), target]
    return ExplanationStats(
        torch.einsum("bcd,bd->bc", explanations, of_target),
        torch.einsum("bcd,bcd->bc", explanations, explanations),
    )


def assert_close(stats: ExplanationStats, expected: ExplanationStats, tolerance: float) -> None:
    """Norm-wise, ``|stats - expected| <= tolerance * |expected|``, as the contract measures it."""
    for got, wanted in ((stats.dots, expected.dots), (stats.sq_norms, expected.sq_norms)):
        assert got.shape == wanted.shape
        assert wanted.norm() > 0
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm()
