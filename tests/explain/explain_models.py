"""Small models and the dense definition that the explanation tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.convolutions[0](inputs)), inplace=True)
        return F.relu(self.norms[1](self.convolutions[1](hidden)) + inputs)


def resnet(dtype: torch.dtype = torch.float64, classes: int = CLASSES) -> nn.Sequential:
    """Residual blocks with BatchNorm, statistics and weights off their defaults; training."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Block(6),
        nn.AvgPool2d(2),
        Block(6),
        nn.Flatten(),
        nn.Linear(54, classes),
    ).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
    return model.to(dtype)


TOKENS, WIDTH = 5, 8


class Transformer(nn.Module):
    """An encoder whose attention is fused, with dropout; of vectors, or of tokens."""

    def __init__(self, vocabulary: int | None = None, classes: int = CLASSES) -> None:
        super().__init__()
        self.embedding = nn.Identity() if vocabulary is None else nn.Embedding(vocabulary, WIDTH)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dropout=0.1), 2
        )
        self.last = nn.Linear(WIDTH, classes)

    def forward(self, inputs: Tensor, padding: Tensor | None = None) -> Tensor:
        hidden = self.encoder(self.embedding(inputs), src_key_padding_mask=padding)
        return self.last(hidden.mean(1))


def transformer(dtype: torch.dtype = torch.float64, classes: int = CLASSES) -> Transformer:
    """Of vectors ``[B, TOKENS, WIDTH]``; training."""
    torch.manual_seed(5)
    return Transformer(classes=classes).to(dtype)


def token_transformer(dtype: torch.dtype = torch.float64) -> Transformer:
    """Of tokens ``[B, TOKENS]`` below 11; training."""
    torch.manual_seed(6)
    return Transformer(vocabulary=11).to(dtype)


def vectors(dtype: torch.dtype = torch.float64, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(rows, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (rows,), generator=generator)
    return inputs.to(dtype), target


def tokens(rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randint(11, (rows, TOKENS), generator=generator)
    return inputs, torch.randint(CLASSES, (rows,), generator=generator)


Data = Callable[..., tuple[Tensor, Tensor]]

NETWORKS: dict[str, tuple[Callable[..., nn.Module], Data]] = {
    "cnn": (cnn, images),
    "resnet": (resnet, images),
    "transformer": (transformer, vectors),
}
"""Networks to explain at their inputs, with data for them: both take a dtype."""


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
