"""The controls of introspective learning: soft labels of which something is taken."""

from __future__ import annotations

import pytest
import torch
from method_cases import (
    CLASSES,
    TinyNetwork,
    assert_near,
    batch,
    cross_entropy,
    divergence,
    softened,
)

import introkernels as ik
from introkernels.train.methods.introspective_input import IntrospectiveInput
from introkernels.train.methods.introspective_inverted import IntrospectiveInverted
from introkernels.train.methods.introspective_mean import IntrospectiveMean
from introkernels.train.methods.introspective_permuted import IntrospectivePermuted

CONTROLS = [IntrospectivePermuted, IntrospectiveMean, IntrospectiveInverted]
SETTINGS = [
    {},
    {"temperature": 0.5, "similarity_temperature": 0.4, "ce_weight": 0.4, "kl_weight": 0.8},
    {"label_mode": "split", "non_target_mass": 0.3, "similarity": "projection"},
    {"center": True, "temperature": 2.0},
]


@pytest.fixture
def labels(monkeypatch):
    """Soft labels ``[B, C]`` of each call of the loss, in order."""
    told = []
    loss = ik.distillation_loss

    def listening(logits, teacher_logits, target, *, temperature, **keywords):
        told.append((teacher_logits / temperature).exp())
        return loss(logits, teacher_logits, target, temperature=temperature, **keywords)

    monkeypatch.setattr(ik, "distillation_loss", listening)
    return told


def run(method):
    """The output of a batch, the logits, the target, and the labels and similarities of
    `introspective_input`, from the definition of the losses.
    """
    torch.manual_seed(0)
    network = TinyNetwork()
    inputs, target = batch(10)
    torch.manual_seed(1)
    output = method.loss(network, inputs, target)
    images = inputs.clone().requires_grad_()
    logits = network(images)
    gradients = torch.stack(
        [
            torch.autograd.grad(logits[:, c].sum(), images, retain_graph=True)[0]
            for c in range(CLASSES)
        ],
        dim=1,
    )
    stats = ik.reference.explanation_stats(gradients, inputs, target, center=method.center)
    q = ik.reference.soft_labels(stats, target, **method.label_keywords)
    norms = stats.sq_norms.sqrt()
    own = norms.gather(1, target[:, None])
    scale = own**2 if method.similarity == "projection" else norms * own
    return output, logits.detach(), target, q, (stats.dots / scale).clamp(-1, 1)


def others(values, target):
    rows = zip(values, target, strict=True)
    return torch.stack([torch.cat([row[:y], row[y + 1 :]]) for row, y in rows])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("control", CONTROLS)
def test_the_true_class_keeps_its_soft_label_and_the_loss_is_that_of_the_changed_ones(
    control, settings, labels
):
    method = control(**settings)
    output, logits, target, q, _ = run(method)
    (told,) = labels
    rows = torch.arange(len(target))
    torch.testing.assert_close(told[rows, target], q[rows, target])
    torch.testing.assert_close(told.sum(dim=1), torch.ones(len(target)))
    assert (told - q).abs().max() > 1e-3
    kl = divergence(told.tolist(), softened(logits, method.temperature))
    ce = cross_entropy(logits, target)
    expected = method.ce_weight * ce + method.kl_weight * method.temperature**2 * kl
    torch.testing.assert_close(output.loss.item(), expected, rtol=1e-4, atol=1e-5)
    assert_near(output.parts["ce"], ce)


@pytest.mark.parametrize("settings", SETTINGS)
def test_permuted_labels_are_the_same_numbers_in_an_order_drawn_anew(settings, labels):
    method = IntrospectivePermuted(**settings)
    _, _, target, q, _ = run(method)
    torch.testing.assert_close(labels[0].sort(dim=1).values, q.sort(dim=1).values)
    method.loss(TinyNetwork(), *batch(10))
    run(method)
    assert torch.equal(labels[2], labels[0])
    order, drawn = (others(told, target).argsort(dim=1) for told in labels[:2])
    assert not torch.equal(order, drawn)


@pytest.mark.parametrize("settings", SETTINGS)
def test_mean_labels_are_the_same_for_all_wrong_classes(settings, labels):
    _, _, target, q, _ = run(IntrospectiveMean(**settings))
    expected = others(q, target).mean(dim=1, keepdim=True).expand(-1, CLASSES - 1)
    torch.testing.assert_close(others(labels[0], target), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_inverted_labels_are_larger_for_classes_less_alike(settings, labels):
    method = IntrospectiveInverted(**settings)
    _, _, target, q, similarity = run(method)
    scores = others(similarity, target) / (method.similarity_temperature * method.temperature)
    shares = torch.tensor(softened(-scores, 1.0))
    mass = others(q, target).sum(dim=1, keepdim=True)
    told = others(labels[0], target)
    torch.testing.assert_close(told, mass * shares, rtol=1e-4, atol=1e-5)
    clear = (others(q, target)[:, :, None] - others(q, target)[:, None]) > 1e-4
    assert clear.any()
    assert (told[:, :, None] - told[:, None])[clear].max() < 0


def test_labels_too_small_for_float32_stay_finite():
    settings = {"temperature": 0.05, "similarity_temperature": 0.01}
    for control in CONTROLS:
        assert run(control(**settings))[0].loss.isfinite()


def test_controls_have_the_settings_of_what_they_control():
    for control in CONTROLS:
        assert vars(control()) == vars(IntrospectiveInput())
        assert control.introspective
