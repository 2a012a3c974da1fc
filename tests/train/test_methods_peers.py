"""Methods where predictions teach one another: of images of a class, of networks side by side."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from method_cases import (
    TinyNetwork,
    assert_near,
    batch,
    cross_entropy,
    divergence,
    learner_of,
    softened,
)
from torch import nn

from introkernels.train.methods.cs_kd import CsKd
from introkernels.train.methods.deep_mutual_learning import DeepMutualLearning

LABELS = torch.tensor([3, 0, 0, 3, 1, 3, 0, 3, 0, 3, 0])


def pairs(seed=0, batch_size=4):
    generator = torch.Generator().manual_seed(seed)
    return list(CsKd().batches(LABELS, batch_size, generator))


def test_pairs_have_every_image_first_once_and_a_partner_of_its_class():
    batches = pairs()
    assert [index.shape for index in batches] == [(4, 2), (4, 2), (3, 2)]
    first, partner = torch.cat(batches).unbind(dim=1)
    assert sorted(first.tolist()) == list(range(len(LABELS)))
    assert torch.equal(LABELS[first], LABELS[partner])
    # Image 4 is alone in its class.
    assert first[first == partner].tolist() == [4]


def test_every_other_image_of_the_class_is_a_partner_as_often():
    drawn = Counter(
        pair for seed in range(800) for pair in map(tuple, torch.cat(pairs(seed)).tolist())
    )
    members = [1, 2, 6, 8, 10]
    counts = [drawn[a, b] for a in members for b in members if a != b]
    # Two hundred are expected; five standard deviations are 61.
    assert max(abs(count - 200) for count in counts) < 62


def test_pairs_come_from_the_generator_in_another_order_each_epoch():
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.cat(list(CsKd().batches(LABELS, 4, generator))) for _ in range(2)]
    assert torch.equal(epochs[0], torch.cat(pairs()))
    assert not torch.equal(epochs[0], epochs[1])


def test_cs_kd_learns_from_the_second_image_without_teaching_it():
    torch.manual_seed(0)
    learner = learner_of(CsKd(temperature=2.0, ce_weight=0.8, kl_weight=0.5))
    inputs, _ = batch(8)
    target = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    inputs.requires_grad_()
    graphs = []
    learner.model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    output = learner(inputs, target)
    assert graphs == [True, False]
    logits = learner.model(inputs)
    torch.testing.assert_close(output.logits, logits)
    first, second = logits[::2], logits[1::2]
    kl = divergence(softened(second, 2.0), softened(first, 2.0))
    assert_near(output.parts["kl"], kl)
    assert_near(output.loss, 0.8 * cross_entropy(first, target[::2]) + 0.5 * 4 * kl)
    (gradient,) = torch.autograd.grad(output.loss, inputs)
    reached = gradient.flatten(1).abs().sum(dim=1) > 0
    assert reached.tolist() == [True, False] * 4


@pytest.mark.parametrize("peers", [2, 3])
def test_mutual_learning_is_the_sum_of_every_networks_loss(peers):
    torch.manual_seed(0)
    method = DeepMutualLearning(peers=peers, temperature=2.0, ce_weight=0.8, kl_weight=0.5)
    learner = learner_of(method)
    inputs, target = batch()
    output = learner(inputs, target)
    responses = [network(inputs) for network in (learner.model, *learner.others)]
    assert len(responses) == peers
    losses = []
    for own in range(peers):
        terms = [
            divergence(softened(responses[other], 2.0), softened(responses[own], 2.0))
            for other in range(peers)
            if other != own
        ]
        kl = sum(terms) / (peers - 1)
        losses.append(0.8 * cross_entropy(responses[own], target) + 0.5 * 4 * kl)
    assert_near(output.loss, sum(losses))
    assert torch.equal(output.logits, responses[0])


def test_networks_do_not_learn_to_teach():
    torch.manual_seed(0)
    learner = learner_of(DeepMutualLearning(ce_weight=0.8, kl_weight=0.5, temperature=2.0))
    inputs, target = batch()
    learner(inputs, target).loss.backward()
    own, other = learner.model(inputs), learner.others[0](inputs).detach()
    log_p, q = (own / 2).log_softmax(dim=1), (other / 2).softmax(dim=1)
    kl = (q * (q.log() - log_p)).sum(dim=1).mean()
    expected = torch.autograd.grad(
        0.8 * nn.functional.cross_entropy(own, target) + 0.5 * 4 * kl,
        list(learner.model.parameters()),
    )
    for parameter, gradient in zip(learner.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_networks_side_by_side_differ_and_are_all_trained_and_kept():
    learner = learner_of(DeepMutualLearning(peers=3))
    networks = [learner.model, *learner.others]
    weights = [network.head.weight for network in networks]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    parameters = 4
    assert sum(1 for _ in TinyNetwork().parameters()) == parameters
    assert sum(1 for _ in learner.parameters()) == len(learner.state_dict()) == 3 * parameters
    learner(*batch()).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in learner.parameters())
