from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import introkernels as ik
from introkernels.train.config import FIRST_LOOK, TrainConfig
from introkernels.train.data import LabelledImages, load_dataset
from introkernels.train.engine import Run
from introkernels.train.methods import BY_EXPLANATION, METHODS
from introkernels.train.methods.base import REGISTRY, LossOutput, Method, Setting, register
from introkernels.train.methods.confidence_penalty import ConfidencePenalty
from introkernels.train.methods.introspective_head import IntrospectiveHead
from introkernels.train.methods.introspective_input import IntrospectiveInput
from introkernels.train.methods.introspective_projection import IntrospectiveProjection
from introkernels.train.methods.introspective_sketch import IntrospectiveSketch
from introkernels.train.methods.label_smoothing import LabelSmoothing
from introkernels.train.methods.standard import Standard
from introkernels.train.models import SmallCNN


@pytest.fixture
def batch() -> tuple[SmallCNN, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    data = load_dataset("digits").data
    return SmallCNN((1, 8, 8), 10), data.images[:12], data.labels[:12]


def explanations(model, inputs):
    inputs = inputs.clone().requires_grad_()
    logits = model(inputs)
    gradients = [
        torch.autograd.grad(logits[:, c].sum(), inputs, retain_graph=True)[0] for c in range(10)
    ]
    return logits, torch.stack(gradients, dim=1)


def test_registry_holds_the_methods_standard_first():
    assert list(METHODS) == [
        "standard",
        "born_again",
        "confidence_penalty",
        "cs_kd",
        "deep_mutual_learning",
        "dropout",
        "kd",
        "kd_class_average",
        "kd_cwtm",
        "kd_dkpp",
        "kd_ground_truth_only",
        "kd_non_target",
        "kd_permuted",
        "label_smoothing",
        "mixup",
        "online_label_smoothing",
        "tf_kd_reg",
        "tf_kd_self",
        "introspective_bank",
        "introspective_head",
        "introspective_input",
        "introspective_inverted",
        "introspective_mean",
        "introspective_permuted",
        "introspective_projection",
        "introspective_ramp",
        "introspective_sketch",
    ]
    assert all(METHODS[name].name == name for name in METHODS)
    assert all(method.summary for method in METHODS.values())


def test_every_explanation_has_its_training_method():
    assert list(BY_EXPLANATION) == ["exact", "sketch", "projection", "head"]
    assert set(BY_EXPLANATION) == set(ik.explain.METHODS)
    assert all(METHODS[name].introspective for name in BY_EXPLANATION.values())


def test_introspective_methods_are_the_ones_called_so():
    named = [name for name in METHODS if name.startswith("introspective_")]
    assert named == [name for name in METHODS if METHODS[name].introspective]


def test_registering_a_name_twice_is_refused():
    with pytest.raises(ValueError, match="'standard' is registered twice"):
        register("standard")(Standard)
    assert REGISTRY["standard"] is Standard


def test_a_method_must_define_its_loss_or_its_learner(batch):
    class Nothing(Method):
        pass

    learner = Nothing().learner(Setting(lambda: SmallCNN((1, 8, 8), 10), 10))
    with pytest.raises(NotImplementedError, match="Nothing defines neither loss nor learner"):
        learner(*batch[1:])


def test_standard_and_label_smoothing_are_cross_entropy(batch):
    model, inputs, target = batch
    assert torch.equal(
        Standard().loss(model, inputs, target).loss, F.cross_entropy(model(inputs), target)
    )
    assert torch.equal(
        LabelSmoothing(amount=0.3).loss(model, inputs, target).loss,
        F.cross_entropy(model(inputs), target, label_smoothing=0.3),
    )


def test_confidence_penalty_subtracts_the_entropy(batch):
    model, inputs, target = batch
    logits = model(inputs)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    output = ConfidencePenalty(strength=0.7).loss(model, inputs, target)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, target) - 0.7 * entropy)
    torch.testing.assert_close(output.parts["entropy"], entropy.detach())


@pytest.mark.parametrize("center", [False, True])
def test_introspective_input_is_the_definition_on_gradients_at_the_input(batch, center):
    model, inputs, target = batch
    logits, gradients = explanations(model, inputs)
    method = IntrospectiveInput(temperature=2.0, kl_weight=0.5, center=center)
    expected = ik.reference.introspective_loss(
        logits, target, gradients, inputs, temperature=2.0, kl_weight=0.5, center=center
    )
    torch.testing.assert_close(method.loss(model, inputs, target).loss, expected)


@pytest.mark.parametrize("center", [False, True])
def test_introspective_head_is_the_definition_on_gradients_at_the_features(batch, center):
    model, inputs, target = batch
    features = model.features(inputs).detach()
    logits, gradients = explanations(model.head, features)
    method = IntrospectiveHead(similarity="projection", label_mode="split", center=center)
    expected = ik.reference.introspective_loss(
        logits,
        target,
        gradients,
        features,
        similarity="projection",
        label_mode="split",
        center=center,
    )
    torch.testing.assert_close(method.loss(model, inputs, target).loss, expected)


@pytest.mark.parametrize("center", [False, True])
def test_introspective_projection_is_the_definition_on_gradients_at_the_input(batch, center):
    model, inputs, target = batch
    logits, gradients = explanations(model, inputs)
    method = IntrospectiveProjection(temperature=2.0, center=center)
    expected = ik.reference.introspective_loss(
        logits,
        target,
        gradients,
        inputs,
        temperature=2.0,
        similarity="projection",
        center=center,
    )
    torch.testing.assert_close(method.loss(model, inputs, target).loss, expected)


def test_introspective_sketch_nears_the_definition_and_is_drawn_from_torchs_generator(batch):
    model, inputs, target = batch
    exact = IntrospectiveInput().loss(model, inputs, target).parts["kl"]

    def kl(probes):
        torch.manual_seed(3)
        return IntrospectiveSketch(probes=probes).loss(model, inputs, target).parts["kl"]

    few, many = kl(2), kl(200)
    assert 0 < (many - exact).abs() < 0.3 * (few - exact).abs()
    assert torch.equal(kl(2), few)
    next_draw = IntrospectiveSketch(probes=2).loss(model, inputs, target).parts["kl"]
    assert not torch.equal(next_draw, few)


@pytest.mark.parametrize("name", METHODS)
def test_loss_reaches_every_parameter_and_logits_do_not_need_a_graph(batch, name):
    teacher, inputs, target = batch
    method = METHODS[name]()
    index = next(method.batches(target, len(target), torch.Generator()))
    rows = index.flatten()
    learner = method.learner(Setting(lambda: SmallCNN((1, 8, 8), 10), 10, teacher.eval())).train()
    learner.prepare(LabelledImages(inputs, target))
    output = learner(inputs[rows], target[rows])
    assert isinstance(output, LossOutput)
    assert output.loss.shape == ()
    assert output.logits.shape == (len(rows), 10)
    assert not any(part.requires_grad for part in output.parts.values())
    assert all(part.isfinite() for part in output.parts.values())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())


@pytest.mark.parametrize("name", FIRST_LOOK)
def test_a_method_of_a_first_look_learns(name):
    config = dataclasses.replace(TrainConfig(), epochs=15, methods=(name,))
    run = Run(config, name, seed=3)
    while not run.finished:
        run.train_epoch()
    losses = [epoch["train_loss"] for epoch in run.history]
    assert losses[-1] < 0.75 * losses[0]
    assert run.test["accuracy"] > 0.8
    assert all(0 <= run.test[name] <= 1 for name in ("accuracy", "ece", "confidence"))


# Of every field a value that is not allowed.
REFUSED = {
    "born_again": {"generations": 0, "temperature": 0.04, "ce_weight": -1.0, "kl_weight": -1.0},
    "confidence_penalty": {"strength": -1.0},
    "cs_kd": {"temperature": 101.0, "ce_weight": -0.1, "kl_weight": float("inf")},
    "deep_mutual_learning": {"peers": 1, "temperature": float("nan"), "ce_weight": -1.0},
    "dropout": {"probability": 1.0},
    "kd": {"temperature": float("inf"), "ce_weight": float("nan"), "kl_weight": -0.1},
    "label_smoothing": {"amount": 1.0},
    "mixup": {"concentration": 0.0},
    "online_label_smoothing": {"ce_weight": 1.1},
    "tf_kd_reg": {
        "correct_probability": 1.5,
        "temperature": 0.0,
        "ce_weight": -1.0,
        "kl_weight": -1.0,
    },
    "introspective_bank": {"bank_momentum": 1.0, "kl_weight": -1.0},
    "introspective_mean": {"temperature": 0.0, "label_mode": "hard", "non_target_mass": 2.0},
    "introspective_ramp": {"warmup_steps": 0},
    "introspective_sketch": {"probes": 0},
}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [(name, field, value) for name, fields in REFUSED.items() for field, value in fields.items()],
)
def test_refused_hyperparameters_are_named(name, field, value):
    with pytest.raises(ValueError, match=rf"^{name}\.{field}\b.*\bgot {value!r}"):
        METHODS[name](**{field: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntrospectiveInput(temperature=0.0), "temperature"),
        (lambda: IntrospectiveHead(label_mode="hard"), "label_mode"),
        (
            lambda: IntrospectiveProjection(similarity="cosine"),
            r"introspective_projection.similarity: got 'cosine', expected 'projection'",
        ),
        (lambda: IntrospectiveSketch(probes=0), r"introspective_sketch.probes: got 0, expected at"),
    ],
)
def test_bad_hyperparameters_are_refused_when_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()
