"""Constants made in inference mode, as a teacher usually is, meet logits that are trained."""

from __future__ import annotations

import torch

import introkernels as ik


def test_a_teacher_in_inference_mode(backend: str) -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    target = torch.randint(6, (4,))
    with torch.inference_mode():
        teacher = torch.randn(4, 6)
    (grad,) = torch.autograd.grad(ik.distillation_loss(logits, teacher, target), logits)
    plain = ik.distillation_loss(logits, teacher.clone(), target)
    assert torch.equal(grad, *torch.autograd.grad(plain, logits))


def test_statistics_and_class_weights_in_inference_mode(backend: str) -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    gradients, inputs = torch.randn(4, 6, 9), torch.randn(4, 9)
    with torch.inference_mode():
        target = torch.randint(6, (4,))
        weight = torch.rand(6)
        stats = ik.explanation_stats(gradients, inputs, target)
    loss = ik.similarity_loss(logits, target, stats, weight=weight)
    fused = ik.introspective_loss(logits, target, gradients, inputs, weight=weight)
    for result in (loss, fused):
        (grad,) = torch.autograd.grad(result, logits)
        assert grad.isfinite().all()
        assert grad.abs().sum() > 0
