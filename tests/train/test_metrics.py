from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from introkernels.train.data import LabelledImages
from introkernels.train.metrics import Evaluator


class Fixed(nn.Module):
    """Gives its inputs back as logits."""

    def forward(self, inputs):
        return inputs.flatten(1)


def test_metrics_of_probabilities_worked_out_by_hand():
    # Four predictions of probability 0.8, three of them right, and a certain wrong one.
    probabilities = torch.tensor([[0.8, 0.2]] * 4 + [[0.0, 1.0]])
    labels = torch.tensor([0, 0, 0, 1, 0])
    data = LabelledImages(probabilities.clamp_min(1e-30).log(), labels)
    measured = Evaluator(2, torch.device("cpu"), batch_size=2)(Fixed(), data)
    assert measured["accuracy"] == pytest.approx(3 / 5)
    assert measured["confidence"] == pytest.approx((4 * 0.8 + 1) / 5)
    assert measured["ece"] == pytest.approx((4 * abs(0.8 - 0.75) + 1) / 5, rel=1e-5)
    nll = -(3 * math.log(0.8) + math.log(0.2) + math.log(1e-30)) / 5
    assert measured["nll"] == pytest.approx(nll, rel=1e-5)


def test_evaluator_starts_anew_and_leaves_the_mode_alone():
    data = LabelledImages(torch.eye(3) * 5, torch.arange(3))
    evaluate, model = Evaluator(3, torch.device("cpu")), Fixed().train()
    assert evaluate(model, data) == evaluate(model, data)
    assert model.training
