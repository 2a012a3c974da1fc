"""A small network, a batch and formulas, each written out once more for the tests of methods."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from introkernels.train.classifier import Classifier
from introkernels.train.methods import Method, Setting

CLASSES = 5
NEAR = {"rtol": 2e-5, "atol": 1e-6}


class TinyNetwork(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 7)
        self.head = nn.Linear(7, CLASSES)

    def features(self, inputs: Tensor) -> Tensor:
        return self.hidden(inputs.flatten(1)).tanh()


def sharp_network() -> TinyNetwork:
    """One that is sure of its predictions, as trained networks are."""
    network = TinyNetwork()
    with torch.no_grad():
        network.head.weight.mul_(6)
    return network


def batch(rows: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs ``[rows, 1, 2, 3]``, and targets that hold every class in turn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, 2, 3, generator=generator), torch.arange(rows) % CLASSES


def learner_of(method: Method, teacher: Classifier | None = None):
    return method.learner(Setting(TinyNetwork, CLASSES, teacher)).train()


def softened(logits: Tensor, temperature: float) -> list[list[float]]:
    """Probabilities of each row, by their definition, in float64."""
    rows = []
    for row in logits.tolist():
        weights = [math.exp((value - max(row)) / temperature) for value in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def divergence(q: list[list[float]], p: list[list[float]]) -> float:
    """``KL(q || p)``, the mean over rows."""
    pairs = [pair for rows in zip(q, p, strict=True) for pair in zip(*rows, strict=True)]
    return sum(a * math.log(a / b) for a, b in pairs if a > 0) / len(q)


def cross_entropies(logits: Tensor, target: Tensor) -> list[float]:
    return [-math.log(p[y]) for p, y in zip(softened(logits, 1.0), target.tolist(), strict=True)]


def cross_entropy(logits: Tensor, target: Tensor) -> float:
    each = cross_entropies(logits, target)
    return sum(each) / len(each)


def assert_near(actual: Tensor, expected: float) -> None:
    """Equal but for the rounding of float32."""
    torch.testing.assert_close(actual.detach().double(), torch.tensor(expected).double(), **NEAR)
