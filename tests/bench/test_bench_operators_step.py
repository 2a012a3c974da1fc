"""Training steps: what each recipe's loss is, and that it trains."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import introkernels as ik
from introkernels.bench.model import Case
from introkernels.bench.operators.step import (
    IMAGE,
    STEP_RESNET20,
    STEP_SMALL_CNN,
    TrainingStep,
)
from introkernels.train.classifier import Classifier
from introkernels.train.models import make_model

CASE = Case(STEP_SMALL_CNN, "tiny", "a tiny case", (6, 5))
RECIPES = {contender.name: contender for contender in STEP_SMALL_CNN.contenders}


def step_of(name: str) -> TrainingStep:
    step = RECIPES[name].prepare(STEP_SMALL_CNN)
    assert isinstance(step, TrainingStep)
    return step


def started(head: Tensor) -> Classifier:
    """The network that every step starts from."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = make_model("small_cnn", IMAGE, len(head))
    with torch.no_grad():
        model.head.weight.copy_(head)
        model.head.bias.zero_()
    return model


def first_loss(name: str) -> float:
    return float(step_of(name)(*CASE.draw(seed=0).values()).detach())


def gradients(model: Classifier, images: Tensor) -> Tensor:
    """``[B, C, D]`` of a network whose rows don't meet, class by class."""
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    found = [
        torch.autograd.grad(logits[:, index].sum(), leaf, retain_graph=True)[0]
        for index in range(logits.shape[1])
    ]
    return torch.stack(found, 1).flatten(2)


def test_first_losses_are_those_of_their_formulas() -> None:
    images, target, head = CASE.draw(seed=0).values()
    model = started(head)
    logits, features = model(images).detach(), model.features(images).detach()
    ce = float(F.cross_entropy(logits, target))
    assert first_loss("plain") == pytest.approx(ce, rel=1e-5)
    uniform = -float(logits.log_softmax(1).mean())
    assert first_loss("smoothing") == pytest.approx(0.9 * ce + 0.1 * uniform, rel=1e-5)
    # The teacher starts as its student, so that there is nothing to learn from it yet.
    assert first_loss("teacher") == pytest.approx(0.7 * ce, rel=1e-5)
    of_head = ik.reference.introspective_loss(
        logits, target, head.expand(len(target), -1, -1), features
    )
    for name in ("head", "fused head"):
        assert first_loss(name) == pytest.approx(float(of_head), rel=1e-5)
    of_images = ik.reference.introspective_loss(
        logits, target, gradients(model, images), images.flatten(1)
    )
    assert first_loss("exact") == pytest.approx(float(of_images), rel=1e-5)
    of_projection = ik.reference.introspective_loss(
        logits, target, gradients(model, images), images.flatten(1), similarity="projection"
    )
    assert first_loss("projection") == pytest.approx(float(of_projection), rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name: str) -> None:
    step, tensors = step_of(name), CASE.draw(seed=0)
    losses = [float(step(*tensors.values()).detach()) for _ in range(25)]
    assert losses[-1] < 0.95 * losses[0]


def test_the_teacher_stays_as_it_is() -> None:
    """Its student moves away from it, and the divergence from 0."""
    images, target, head = CASE.draw(seed=0).values()
    step, teacher = step_of("teacher"), started(head)
    losses = [float(step(images, target, head).detach()) for _ in range(3)]
    student = started(head)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    for found in losses:
        loss = ik.reference.distillation_loss(student(images), teacher(images).detach(), target)
        assert found == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_steps_leave_the_global_random_numbers_alone() -> None:
    tensors = CASE.draw(seed=0)
    before = torch.get_rng_state()
    step_of("plain")(*tensors.values())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("operator", [STEP_SMALL_CNN, STEP_RESNET20], ids=lambda one: one.name)
def test_every_recipe_can_be_sent_to_another_process(operator: object) -> None:
    for contender in operator.contenders:
        sent = pickle.loads(pickle.dumps(contender))
        assert isinstance(sent.prepare(operator), TrainingStep)


def test_the_networks_are_those_of_the_names() -> None:
    """Which each has so many weights, beside a last layer of 5 classes."""
    expected = {STEP_SMALL_CNN: 448 + 4_640 + 524_352, STEP_RESNET20: 269_722 - 10 * 65}
    for operator, number in expected.items():
        case = Case(operator, "tiny", "a tiny case", (2, 5))
        step = operator.contenders[0].prepare(operator)
        step(*case.draw(seed=0).values())
        _, optimizer = step._training
        weights = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        assert weights == number + 5 * 65
