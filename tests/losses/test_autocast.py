"""Autocast changes what the model around a loss computes, never the loss of the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import backends
from helpers.backends import sized
from helpers.bounds import bounds_of
from helpers.cases import BUILDERS, Case, introspective_case, linear_case
from helpers.oracle import assert_outcomes_agree, defined, evaluate
from torch import Tensor, nn

import introkernels as ik

HALF = torch.bfloat16
# Not looked up in each call, which torch.compile would have to trace.
DEVICE = backends.device()


def autocast(dtype: torch.dtype = HALF) -> torch.autocast:
    """Autocast of the device on which the test makes its tensors."""
    return torch.autocast(DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", BUILDERS)
def test_same_bits_inside_and_outside(
    backend: str, function: str, dtype: torch.dtype, autocast_dtype: torch.dtype
) -> None:
    case = BUILDERS[function](6, 9, dtype, ignored=1, class_weights=True, label_smoothing=0.1)
    outside = evaluate(case)
    with autocast(autocast_dtype):
        inside = evaluate(case)
    assert inside.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for part in ("loss", "ce", "kl"):
        assert torch.equal(getattr(inside, part), getattr(outside, part)), part
    for name, grad in outside.grads.items():
        assert torch.equal(inside.grads[name], grad), name


def test_backward_outside_of_the_region_of_its_forward(backend: str) -> None:
    case = linear_case(6, 9)
    leaves = [case[name].requires_grad_() for name in case.differentiable]
    with autocast():
        loss = ik.linear_introspective_loss(*case.arguments(), **case.keywords)
    grads = torch.autograd.grad(loss, leaves)
    for grad, expected in zip(grads, evaluate(case).grads.values(), strict=True):
        assert torch.equal(grad, expected)


def test_statistics_are_the_same(backend: str) -> None:
    case = introspective_case(6, 9, HALF, inputs_dtype=torch.float32)
    arguments = (case["gradients"], case["inputs"], case["target"])
    outside = ik.explanation_stats(*arguments)
    with autocast():
        inside = ik.explanation_stats(*arguments)
        labels = ik.soft_labels(inside, case["target"])
    assert inside.dots.dtype == labels.dtype == torch.float32
    assert torch.equal(inside.dots, outside.dots)
    assert torch.equal(inside.sq_norms, outside.sq_norms)
    assert torch.equal(labels, ik.soft_labels(outside, case["target"]))


def test_float32_head_is_not_rounded_to_half(backend: str) -> None:
    """Autocast would give ``F.linear`` bfloat16 here; the loss keeps float32 throughout."""
    case = linear_case(16, 40, width=64)
    with autocast():
        rounded = torch.nn.functional.linear(case["features"], case["weight"], case["bias"])
        outcome = evaluate(case)
    assert rounded.dtype == HALF
    assert_outcomes_agree(outcome, defined(case), bounds_of(case, None))


def mixtures() -> dict[str, Callable[[], Case]]:
    """Calls in which the dtypes are those that autocast makes: half logits, float32 parameters."""
    return {
        "half-logits": lambda: introspective_case(
            6, 9, HALF, gradients_dtype=HALF, inputs_dtype=torch.float32
        ),
        "half-features-float32-head": lambda: linear_case(6, 9, HALF, weight_dtype=torch.float32),
        "float32-features-half-head": lambda: linear_case(6, 9, weight_dtype=HALF),
    }


@pytest.mark.parametrize("name", mixtures())
def test_mixtures_follow_the_definition(backend: str, name: str) -> None:
    case = mixtures()[name]()
    with autocast():
        outcome = evaluate(case)
    assert outcome.loss.dtype == torch.float32
    for leaf, grad in outcome.grads.items():
        assert grad.dtype == case[leaf].dtype
    assert_outcomes_agree(outcome, defined(case), bounds_of(case, None))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(inputs)
        return features, self.head(features)


def step(model: Classifier, inputs: Tensor, target: Tensor) -> Tensor:
    """The loss at the input and at the features of one mixed-precision forward pass."""
    with autocast():
        explained = inputs.clone().requires_grad_()
        _, logits = model(explained)
        gradients = torch.stack(
            [torch.autograd.grad(z.sum(), explained, retain_graph=True)[0] for z in logits.T], 1
        )
        features, logits = model(inputs)
        assert logits.dtype == HALF
        at_input = ik.introspective_loss(logits, target, gradients, inputs)
        at_features = ik.linear_introspective_loss(
            features, model.head.weight, target, model.head.bias
        )
    return at_input + at_features


def test_training_in_mixed_precision(backend: str) -> None:
    model = Classifier()
    inputs = torch.randn(32, 12)
    target = (inputs @ torch.randn(12, 5)).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(sized(30, 12)):
        optimizer.zero_grad()
        loss = step(model, inputs, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for parameter in model.parameters():
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
    assert loss.dtype == torch.float32
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("function", BUILDERS)
def test_compiled_under_autocast(backend: str, function: str) -> None:
    torch._dynamo.reset()
    case = BUILDERS[function](6, 5, ignored=1)
    leaf = case[case.differentiable[0]].requires_grad_()

    def loss_under_autocast() -> Tensor:
        with autocast():
            return getattr(ik, function)(*case.arguments(), **case.keywords)

    compiled = torch.compile(loss_under_autocast, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(), loss_under_autocast()
    assert torch.equal(actual, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(each, leaf) for each in (actual, expected))
    assert torch.equal(grad, expected_grad)
