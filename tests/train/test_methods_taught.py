from __future__ import annotations

import math
from collections import Counter

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
    learner_of,
    sharp_network,
    softened,
)

import introkernels as ik
from introkernels.train.data import LabelledImages
from introkernels.train.methods import METHODS, Setting
from introkernels.train.methods.born_again import BornAgain
from introkernels.train.methods.kd import KnowledgeDistillation
from introkernels.train.methods.kd_class_average import KdClassAverage
from introkernels.train.methods.kd_cwtm import KdCwtm
from introkernels.train.methods.kd_dkpp import KdDkpp
from introkernels.train.methods.kd_ground_truth_only import KdGroundTruthOnly
from introkernels.train.methods.kd_non_target import KdNonTarget
from introkernels.train.methods.kd_permuted import KdPermuted
from introkernels.train.methods.standard import Standard
from introkernels.train.methods.tf_kd_self import TfKdSelf

TAUGHT = [name for name, method in METHODS.items() if method().teacher() is not None]
BY_A_NETWORK = [name for name in TAUGHT if name == "kd" or name.startswith("kd_")]
SETTINGS = {"temperature": 2.0, "ce_weight": 0.3, "kl_weight": 0.6}


def taught(method, rows=8):
    """A learner, its output on a batch, and the logits of student and teacher."""
    torch.manual_seed(2)
    teacher = sharp_network()
    learner = learner_of(method, teacher)
    inputs, target = batch(rows)
    if isinstance(method, KdClassAverage):
        learner.prepare(LabelledImages(inputs, target))
    return learner, learner(inputs, target), learner.model(inputs), teacher(inputs), target


@pytest.fixture
def lessons(monkeypatch):
    """What students are told: the teacher logits of each call of the loss, in order."""
    told = []
    loss = ik.distillation_loss

    def listening(logits, teacher_logits, target, **keywords):
        told.append(teacher_logits)
        return loss(logits, teacher_logits, target, **keywords)

    monkeypatch.setattr(ik, "distillation_loss", listening)
    return told


def test_the_methods_with_a_teacher_are_these():
    components = {name for name in METHODS if name.startswith("kd_")}
    assert len(components) == 6
    assert set(TAUGHT) == components | {"born_again", "kd", "tf_kd_self"}


@pytest.mark.parametrize("name", BY_A_NETWORK)
def test_the_teacher_is_a_network_trained_with_cross_entropy(name):
    method = METHODS[name]
    assert method().teacher().method == Standard()
    assert method().teacher().model is None
    assert method(teacher_model="resnet20").teacher().model == "resnet20"
    with pytest.raises(ValueError, match=f"{name}.teacher_model: got 'nothing', expected one of"):
        method(teacher_model="nothing")


def test_self_training_is_taught_by_the_same_network():
    teacher = TfKdSelf().teacher()
    assert (teacher.method, teacher.model) == (Standard(), None)


def test_each_generation_is_taught_by_the_one_before():
    method, taught_by = BornAgain(generations=3, temperature=2.0, kl_weight=0.7), []
    while teacher := method.teacher():
        assert teacher.model is None
        method = teacher.method
        taught_by.append(method)
    assert taught_by == [
        BornAgain(generations=2, temperature=2.0, kl_weight=0.7),
        BornAgain(generations=1, temperature=2.0, kl_weight=0.7),
        Standard(),
    ]


@pytest.mark.parametrize("method", [KnowledgeDistillation, TfKdSelf, BornAgain])
def test_distillation_is_cross_entropy_and_the_divergence_from_the_teacher(method):
    _, output, logits, teacher, target = taught(method(**SETTINGS))
    ce = cross_entropy(logits, target)
    kl = divergence(softened(teacher, 2.0), softened(logits, 2.0))
    assert kl > 0.01
    assert_near(output.parts["ce"], ce)
    assert_near(output.parts["kl"], kl)
    assert_near(output.loss, 0.3 * ce + 0.6 * 4 * kl)


def test_ground_truth_only_keeps_the_teachers_probability_of_the_true_class():
    _, output, logits, teacher, target = taught(KdGroundTruthOnly(**SETTINGS))
    labels = []
    for row, y in zip(softened(teacher, 2.0), target.tolist(), strict=True):
        rest = (1 - row[y]) / (CLASSES - 1)
        labels.append([row[y] if c == y else rest for c in range(CLASSES)])
    kl = divergence(labels, softened(logits, 2.0))
    assert_near(output.loss, 0.3 * cross_entropy(logits, target) + 0.6 * 4 * kl)


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        (KdPermuted, lambda teacher, target: target),
        (KdDkpp, lambda teacher, target: teacher.argmax(dim=1)),
    ],
)
def test_permutations_keep_one_class_and_deal_out_the_others(method, kept, lessons):
    learner, _, _, teacher, target = taught(method(**SETTINGS))
    kept = kept(teacher, target)
    assert (target != teacher.argmax(dim=1)).any()
    (told,) = lessons
    rows = torch.arange(len(target))
    assert torch.equal(told[rows, kept], teacher[rows, kept])
    assert torch.equal(told.sort(dim=1).values, teacher.sort(dim=1).values)
    assert not torch.equal(told, teacher)
    learner(*batch())
    assert not torch.equal(lessons[1], told)


def test_every_order_of_the_other_classes_comes_as_often(lessons):
    torch.manual_seed(0)
    teacher = sharp_network()
    learner = learner_of(KdPermuted(), teacher)
    inputs = batch(1)[0].expand(4800, 1, 2, 3)
    learner(inputs, torch.full((4800,), 2))
    orders = Counter(tuple(row) for row in lessons[0].argsort(dim=1).tolist())
    assert len(orders) == math.factorial(CLASSES - 1)
    # Two hundred of each are expected; five standard deviations are 69.
    assert max(abs(count - 200) for count in orders.values()) < 69


def test_the_loss_of_a_permutation_is_that_of_the_permuted_teacher(lessons):
    _, output, logits, _, target = taught(KdPermuted(**SETTINGS))
    kl = divergence(softened(lessons[0], 2.0), softened(logits, 2.0))
    assert_near(output.loss, 0.3 * cross_entropy(logits, target) + 0.6 * 4 * kl)


def test_class_average_teaches_the_mean_over_the_images_of_a_class():
    learner, output, logits, teacher, target = taught(KdClassAverage(**SETTINGS), rows=300)
    sums = [[0.0] * CLASSES for _ in range(CLASSES)]
    for row, y in zip(softened(teacher, 2.0), target.tolist(), strict=True):
        sums[y] = [a + b / (300 / CLASSES) for a, b in zip(sums[y], row, strict=True)]
    torch.testing.assert_close(learner.soft_labels, torch.tensor(sums))
    kl = divergence([sums[y] for y in target.tolist()], softened(logits, 2.0))
    assert_near(output.loss, 0.3 * cross_entropy(logits, target) + 0.6 * 4 * kl)


def test_class_average_shows_the_teacher_images_as_networks_see_them():
    method, teacher = KdClassAverage(), sharp_network()
    stored = torch.arange(60, dtype=torch.uint8).reshape(10, 1, 2, 3)
    labels = torch.arange(10) % CLASSES
    learner, expected = learner_of(method, teacher), learner_of(method, teacher)
    learner.prepare(LabelledImages(stored, labels))
    expected.prepare(LabelledImages(stored.float() / 255, labels))
    torch.testing.assert_close(learner.soft_labels, expected.soft_labels)


def test_non_target_compares_the_other_classes_among_themselves():
    learner, output, logits, teacher, target = taught(KdNonTarget(**SETTINGS))

    def others(values):
        rows = zip(values, target, strict=True)
        return torch.stack([torch.cat([row[:y], row[y + 1 :]]) for row, y in rows])

    ce = cross_entropy(logits, target)
    kl = divergence(softened(others(teacher), 2.0), softened(others(logits), 2.0))
    assert_near(output.parts["ce"], ce)
    assert_near(output.loss, 0.3 * ce + 0.6 * 4 * kl)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in learner.parameters())


def test_cwtm_weighs_images_by_the_teachers_certainty():
    _, output, logits, teacher, target = taught(KdCwtm(**SETTINGS))
    certainty = [max(row) for row in softened(teacher, 2.0)]
    each = cross_entropies(logits, target)
    weighted = sum(w * ce for w, ce in zip(certainty, each, strict=True)) / sum(certainty)
    assert abs(weighted - sum(each) / 8) > 1e-3
    assert_near(output.loss, 0.3 * sum(each) / 8 + 0.6 * weighted)


@pytest.mark.parametrize("name", TAUGHT)
def test_the_teacher_is_neither_trained_nor_kept(name):
    learner, output, _, _, _ = taught(METHODS[name]())
    output.loss.backward()
    (teacher,) = learner._teacher
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in learner.model.parameters())
    own = {f"model.{key}" for key in learner.model.state_dict()}
    assert set(learner.state_dict()) - own <= {"soft_labels"}
    assert sum(1 for _ in learner.parameters()) == len(own)


@pytest.mark.parametrize("name", TAUGHT)
def test_a_missing_teacher_is_refused(name):
    with pytest.raises(ValueError, match="setting.teacher: got None, expected a trained network"):
        METHODS[name]().learner(Setting(TinyNetwork, CLASSES))
