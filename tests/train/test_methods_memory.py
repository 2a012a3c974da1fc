"""Methods that remember something from step to step, and what a checkpoint keeps of any method."""

from __future__ import annotations

import io

import pytest
import torch
from method_cases import (
    CLASSES,
    assert_near,
    batch,
    cross_entropy,
    divergence,
    learner_of,
    sharp_network,
    softened,
)
from torch import distributed

from introkernels.bank import SimilarityBank
from introkernels.train.data import LabelledImages
from introkernels.train.methods import METHODS
from introkernels.train.methods.introspective_bank import IntrospectiveBank
from introkernels.train.methods.introspective_ramp import IntrospectiveRamp
from introkernels.train.methods.online_label_smoothing import OnlineLabelSmoothing


def smoothed(rows=60):
    """A learner whose network classifies some images rightly, and the batch of an epoch."""
    torch.manual_seed(3)
    learner = learner_of(OnlineLabelSmoothing(ce_weight=0.3))
    learner.model.load_state_dict(sharp_network().state_dict())
    inputs, target = batch(rows)
    # The last class has no image that is classified rightly.
    predicted = learner.model(inputs).argmax(dim=1)
    target = torch.where(torch.arange(rows) % 2 == 0, predicted, target)
    target = torch.where((target == 4) & (predicted == 4), (target + 1) % CLASSES, target)
    return learner, inputs, target


def mean_right_predictions(logits, target):
    """Soft labels by hand: row = class, uniform where none is classified rightly."""
    rows = []
    for c in range(CLASSES):
        right = [
            p
            for p, y in zip(softened(logits, 1.0), target.tolist(), strict=True)
            if y == c and p.index(max(p)) == c
        ]
        none = [1 / CLASSES] * CLASSES
        means = [sum(column) / len(right) for column in zip(*right, strict=True)]
        rows.append(means if right else none)
    return rows


def test_online_label_smoothing_begins_with_uniform_soft_labels():
    learner, inputs, target = smoothed()
    output = learner(inputs, target)
    logits = learner.model(inputs)
    uniform = [[1 / CLASSES] * CLASSES] * len(target)
    kl = divergence(uniform, softened(logits, 1.0))
    assert_near(output.loss, 0.3 * cross_entropy(logits, target) + 0.7 * kl)


def test_online_label_smoothing_uses_the_right_predictions_of_the_epoch_before():
    learner, inputs, target = smoothed()
    logits = learner.model(inputs)
    expected = mean_right_predictions(logits, target)
    assert expected[4] == [1 / CLASSES] * CLASSES
    assert sum(row == [1 / CLASSES] * CLASSES for row in expected) == 1
    # In two batches of different sizes; soft labels stay as they are until the epoch ends.
    learner(inputs[:20], target[:20])
    learner(inputs[20:], target[20:])
    assert torch.equal(learner.soft_labels, torch.full((CLASSES, CLASSES), 1 / CLASSES))
    learner.end_epoch()
    torch.testing.assert_close(learner.soft_labels, torch.tensor(expected))
    output = learner(inputs, target)
    kl = divergence([expected[y] for y in target.tolist()], softened(logits, 1.0))
    assert_near(output.loss, 0.3 * cross_entropy(logits, target) + 0.7 * kl)
    # What an epoch saw is forgotten in the next.
    learner.end_epoch()
    torch.testing.assert_close(learner.soft_labels, torch.tensor(expected))
    learner(inputs[:1], (learner.model(inputs[:1]).argmax(dim=1) + 1) % CLASSES)
    learner.end_epoch()
    torch.testing.assert_close(learner.soft_labels, torch.full((CLASSES, CLASSES), 1 / CLASSES))


def test_online_label_smoothing_counts_the_images_of_all_processes(monkeypatch):
    learner, inputs, target = smoothed()
    other, _, _ = smoothed()
    logits = learner.model(inputs)
    other(inputs[20:], target[20:])
    elsewhere = other._sums
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda sums: sums.add_(elsewhere))
    learner(inputs[:20], target[:20])
    learner.end_epoch()
    expected = mean_right_predictions(logits, target)
    torch.testing.assert_close(learner.soft_labels, torch.tensor(expected))


def test_bank_is_the_moving_average_of_the_similarities_of_a_pair_of_classes():
    torch.manual_seed(0)
    learner = learner_of(IntrospectiveBank(bank_momentum=0.75, temperature=2.0))
    steps = [batch(10, seed) for seed in (1, 2)]
    assert learner.bank is None
    expected = None
    for inputs, target in steps:
        sums = torch.zeros(CLASSES, CLASSES)
        for x, y in zip(inputs, target.tolist(), strict=True):
            jacobian = torch.autograd.functional.jacobian(
                lambda image: learner.model(image[None])[0], x
            )
            explanations = (jacobian * x).flatten(1)
            sums[y] += torch.cosine_similarity(explanations, explanations[y][None], dim=1)
        mean = sums / 2  # ten rows of five classes
        expected = mean if expected is None else 0.75 * expected + 0.25 * mean
        output = learner(inputs, target)
    torch.testing.assert_close(learner.bank, expected)
    logits = learner.model(inputs)
    kl = divergence(softened(expected[target], 2.0), softened(logits, 2.0))
    assert_near(output.loss, 0.7 * cross_entropy(logits, target) + 0.3 * 4 * kl)


def test_bank_takes_the_batches_of_all_processes_for_one(monkeypatch, request):
    groups = []
    update = SimilarityBank.update

    def noting(bank, *arguments, group, **keywords):
        groups.append(group)
        update(bank, *arguments, group=group, **keywords)

    monkeypatch.setattr(SimilarityBank, "update", noting)
    learner = learner_of(IntrospectiveBank())
    learner(*batch())
    group = request.getfixturevalue("process_group")
    learner(*batch())
    assert groups == [None, group]


@pytest.mark.parametrize("name", METHODS)
def test_a_learner_goes_on_from_its_state(name):
    torch.manual_seed(0)
    method, teacher = METHODS[name](), sharp_network()
    learner, restored = learner_of(method, teacher), learner_of(method, teacher)
    inputs, target = batch(20)
    learner.prepare(LabelledImages(inputs, target))
    learner(inputs, target)
    learner.end_epoch()
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    losses = []
    for one in (learner, restored):
        torch.manual_seed(1)
        losses.append(one(*batch(10, seed=2)).loss)
    assert torch.equal(*losses)


def test_a_ramp_weighs_the_divergence_by_the_steps_that_were_done():
    learner = learner_of(IntrospectiveRamp(warmup_steps=4, ce_weight=0.6, kl_weight=0.5))
    inputs, target = batch(12)
    ce = 0.6 * cross_entropy(learner.model(inputs), target)
    losses = [learner(inputs, target).loss.item() for _ in range(6)]
    # The network stays as it is, so that only the weight changes.
    whole = losses[4] - ce
    assert whole > 1e-3
    assert losses == pytest.approx([ce + share * whole for share in (0, 0.25, 0.5, 0.75, 1, 1)])
    again = learner_of(IntrospectiveRamp(warmup_steps=4, ce_weight=0.6, kl_weight=0.5))
    again.load_state_dict(learner.state_dict())
    assert again(inputs, target).loss.item() == pytest.approx(losses[-1])
