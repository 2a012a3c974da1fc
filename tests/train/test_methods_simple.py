"""Methods whose loss needs nothing but the network and the batch."""

from __future__ import annotations

import math

import pytest
import torch
from method_cases import (
    CLASSES,
    TinyNetwork,
    assert_near,
    batch,
    cross_entropies,
    cross_entropy,
    divergence,
    softened,
)
from torch.nn import functional as F

from introkernels.train.methods.dropout import Dropout
from introkernels.train.methods.mixup import Mixup
from introkernels.train.methods.tf_kd_reg import TfKdReg


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TinyNetwork()


def test_dropout_drops_features_and_scales_the_others(network):
    inputs, target = batch(400)
    seen = []
    network.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    output = Dropout(probability=0.25).loss(network.train(), inputs, target)
    features, dropped = network.features(inputs).detach(), seen[0] == 0
    # Of 2800 features 700 are expected to go; five standard deviations are 115.
    assert abs(dropped.sum().item() - 700) < 115
    torch.testing.assert_close(seen[0][~dropped], features[~dropped] / 0.75)
    assert_near(output.loss, cross_entropy(output.logits, target))


def test_dropout_of_a_network_in_evaluation_is_cross_entropy(network):
    inputs, target = batch()
    output = Dropout().loss(network.eval(), inputs, target)
    assert torch.equal(output.loss, F.cross_entropy(network(inputs), target))


def test_mixup_mixes_images_and_losses_in_the_same_shares(network):
    inputs, target = batch()
    seen = []
    network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    output = Mixup(concentration=2.0).loss(network, inputs, target)
    (mixed,) = seen
    # Find share and partners in what the network was given, of which nothing else is told.
    fits = []
    for row in range(len(inputs)):
        for partner in set(range(len(inputs))) - {row}:
            way = (inputs[row] - inputs[partner]).flatten()
            gone = (mixed[row] - inputs[partner]).flatten()
            share = (gone @ way / (way @ way)).item()
            if (gone - share * way).norm() < 1e-4:
                fits.append((row, partner, share))
    assert len(fits) >= 4
    share = fits[0][2]
    assert 0 < share < 1
    assert all(math.isclose(other, share, abs_tol=1e-4) for _, _, other in fits)
    partners = list(range(len(inputs)))
    for row, partner, _ in fits:
        partners[row] = partner
    assert sorted(partners) == list(range(len(inputs)))
    own = cross_entropies(output.logits, target)
    other = cross_entropies(output.logits, target[partners])
    losses = [share * a + (1 - share) * b for a, b in zip(own, other, strict=True)]
    torch.testing.assert_close(output.loss.item(), sum(losses) / len(losses), rtol=1e-4, atol=1e-4)


def test_mixups_shares_are_beta_distributed_and_drawn_from_torchs_generator(network, monkeypatch):
    inputs, target = batch(2)

    def share():
        # With losses of 1 and 0 the loss is the share.
        losses = iter([1.0, 0.0])
        monkeypatch.setattr(F, "cross_entropy", lambda *_: torch.tensor(next(losses)))
        return Mixup(concentration=0.5).loss(network, inputs, target).loss.item()

    torch.manual_seed(7)
    drawn = torch.tensor([share() for _ in range(1000)])
    # Beta(a, a) has the variance 1 / (4 (2 a + 1)): 1/8 here.
    assert abs(drawn.mean().item() - 0.5) < 0.05
    assert abs(drawn.var().item() - 0.125) < 0.02
    torch.manual_seed(7)
    assert share() == drawn[0].item()


def test_tf_kd_reg_is_taught_by_a_teacher_that_is_always_right(network):
    inputs, target = batch()
    method = TfKdReg(correct_probability=0.9, temperature=0.5, ce_weight=0.4, kl_weight=0.7)
    output = method.loss(network, inputs, target)
    right, wrong = math.exp(0.9 / 0.5), math.exp(0.025 / 0.5)
    total = right + (CLASSES - 1) * wrong
    labels = [
        [(right if c == y else wrong) / total for c in range(CLASSES)] for y in target.tolist()
    ]
    logits = network(inputs)
    kl = divergence(labels, softened(logits, 1.0))
    assert_near(output.loss, 0.4 * cross_entropy(logits, target) + 0.7 * kl)
