"""Relations that must hold between calls, whatever the numbers: no oracle is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import (
    BUILDERS,
    HEADS,
    WITH_LABELS,
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from helpers.oracle import evaluate
from helpers.relations import assert_same, build, logits_of
from helpers.tolerance import assert_accurate
from torch import Tensor

import introkernels as ik

REDUCTIONS = ("mean", "sum", "none")

every_loss = pytest.mark.parametrize("loss", BUILDERS)
every_loss_with_labels = pytest.mark.parametrize("loss", WITH_LABELS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_similarity = pytest.mark.parametrize("similarity", ["cosine", "projection"])
every_label_mode = pytest.mark.parametrize("label_mode", ["softmax", "split"])

# The dimension of each tensor that counts the classes.
CLASS_DIMENSION = {
    "logits": 1,
    "teacher_logits": 1,
    "dots": 1,
    "sq_norms": 1,
    "gradients": 1,
    "weight": 0,
    "class_weight": 0,
    "bias": 0,
}


def on_a_grid(tensor: Tensor) -> Tensor:
    """Rounded to multiples of 2**-20, so that integers are added without another rounding."""
    return (tensor * 2**20).round() / 2**20


@every_loss
@every_reduction
def test_a_constant_added_to_the_logits_of_a_row(backend: str, loss: str, reduction: str) -> None:
    case = build(loss, class_weights=True, label_smoothing=0.1, reduction=reduction)
    if loss in HEADS:
        case = case.with_tensors(
            features=on_a_grid(case["features"]),
            weight=on_a_grid(case["weight"]),
            bias=on_a_grid(case["bias"]),
        )
        shifted = case.with_tensors(bias=case["bias"] + 64)
    else:
        case = case.with_tensors(logits=on_a_grid(case["logits"]))
        shift = torch.tensor([0.0, 1.0, -7.0, 1024.0, -4096.0, 64.0], dtype=torch.float64)
        shifted = case.with_tensors(logits=case["logits"] + shift[:, None])
    assert_same(evaluate(shifted), evaluate(case))


def test_a_constant_added_to_the_teacher_logits_of_a_row(backend: str) -> None:
    case = build("distillation_loss")
    teacher = on_a_grid(case["teacher_logits"])
    shift = torch.tensor([0.0, 1.0, -7.0, 1024.0, -4096.0, 64.0], dtype=torch.float64)
    assert_same(
        evaluate(case.with_tensors(teacher_logits=teacher + shift[:, None])),
        evaluate(case.with_tensors(teacher_logits=teacher)),
    )


@every_loss
@every_reduction
def test_classes_in_another_order(backend: str, loss: str, reduction: str) -> None:
    labels = {"label_mode": "split"} if loss in WITH_LABELS else {}
    case = build(
        loss, class_weights=True, label_smoothing=0.1, ignored=1, reduction=reduction, **labels
    )
    order = torch.randperm(9)
    target = case["target"]
    renamed = torch.where(target >= 0, order.argsort()[target.clamp(min=0)], target)

    def permute(name: str, value: Any) -> Any:
        if name in CLASS_DIMENSION and isinstance(value, Tensor):
            return value.index_select(CLASS_DIMENSION[name], order)
        return value

    permuted = Case(
        case.function,
        {name: permute(name, value) for name, value in case.tensors.items()},
        {name: permute(name, value) for name, value in case.keywords.items()},
        case.differentiable,
    ).with_tensors(target=renamed)
    expected = evaluate(case)
    assert_same(
        evaluate(permuted),
        expected,
        **{name: permute(name, grad) for name, grad in expected.grads.items()},
    )


@every_loss
def test_rows_in_another_order(backend: str, loss: str) -> None:
    case = build(loss, ignored=2, reduction="none")
    order = torch.randperm(6)
    per_row = {
        name: value[order]
        for name, value in case.tensors.items()
        if isinstance(value, Tensor) and name not in ("weight", "bias")
    }
    expected, actual = evaluate(case), evaluate(case.with_tensors(**per_row))
    assert_accurate(actual.loss, expected.loss[order])
    by_row = case.differentiable[0]
    assert_accurate(actual.grads[by_row], expected.grads[by_row][order])


@every_loss
def test_a_batch_is_the_sum_of_its_parts(backend: str, loss: str) -> None:
    case = build(loss, 7, ignored=2, class_weights=True, reduction="sum")
    whole = evaluate(case)
    parts = []
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        part = {
            name: value[begin:end]
            for name, value in case.tensors.items()
            if isinstance(value, Tensor) and name not in ("weight", "bias")
        }
        parts.append(evaluate(case.with_tensors(**part)))
    assert_accurate(whole.loss, torch.stack([part.loss for part in parts]).sum())
    for name, grad in whole.grads.items():
        grads = [part.grads[name] for part in parts]
        joined = torch.cat(grads) if name in ("logits", "features") else torch.stack(grads).sum(0)
        assert_accurate(grad, joined, name)


@every_loss
def test_reductions_of_the_same_rows(backend: str, loss: str) -> None:
    case = build(loss, 7, ignored=2)
    rows, total, mean = (
        evaluate(case.with_keywords(reduction=reduction)) for reduction in ("none", "sum", "mean")
    )
    assert_accurate(total.loss, rows.loss.sum())
    assert_accurate(mean.loss, rows.loss.sum() / 5)
    for name, grad in total.grads.items():
        assert_accurate(rows.grads[name], grad, name)
        assert_accurate(mean.grads[name], grad / 5, name)


@every_loss
@every_reduction
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_loss_is_the_weighted_sum_of_its_terms(
    backend: str, loss: str, reduction: str, temperature: float
) -> None:
    case = BUILDERS[loss](
        6,
        9,
        torch.float64,
        ignored=1,
        reduction=reduction,
        temperature=temperature,
        ce_weight=0.2,
        kl_weight=3.0,
    )
    result = evaluate(case)
    assert_accurate(result.loss, 0.2 * result.ce + 3.0 * temperature**2 * result.kl)
    ce_only = evaluate(case.with_keywords(ce_weight=1.0, kl_weight=0.0))
    kl_only = evaluate(case.with_keywords(ce_weight=0.0, kl_weight=1.0))
    assert_accurate(ce_only.loss, result.ce)
    assert_accurate(kl_only.loss, temperature**2 * result.kl)
    for name, grad in result.grads.items():
        assert_accurate(grad, 0.2 * ce_only.grads[name] + 3.0 * kl_only.grads[name], name)


@pytest.mark.parametrize("temperature", [0.25, 2.0, 16.0])
def test_temperature_scales_logits_and_the_divergence_by_its_square(
    backend: str, temperature: float
) -> None:
    case = BUILDERS["distillation_loss"](
        6, 9, torch.float64, temperature=1.0, ce_weight=0.0, kl_weight=1.0, reduction="none"
    )
    hot = case.with_tensors(
        logits=case["logits"] * temperature, teacher_logits=case["teacher_logits"] * temperature
    ).with_keywords(temperature=temperature)
    expected, actual = evaluate(case), evaluate(hot)
    assert_accurate(actual.kl, expected.kl)
    assert_accurate(actual.loss, expected.loss * temperature**2)
    assert_accurate(actual.grads["logits"], expected.grads["logits"] * temperature)


@every_label_mode
@pytest.mark.parametrize("explained", [None, 5])
def test_cosines_ignore_the_length_of_each_explanation(
    backend: str, label_mode: str, explained: int | None
) -> None:
    case = build("introspective_loss", explained=explained, label_mode=label_mode)
    # Powers of two change no digit.
    classes = case["gradients"].shape[1]
    factors = 2.0 ** torch.randint(-20, 20, (6, classes, 1)).double()
    scaled = case.with_tensors(gradients=case["gradients"] * factors)
    assert_same(evaluate(scaled), evaluate(case))


@every_similarity
@every_label_mode
@pytest.mark.parametrize("center", [False, True])
def test_similarities_ignore_the_scale_of_a_row(
    backend: str, similarity: str, label_mode: str, center: bool
) -> None:
    case = build("introspective_loss", similarity=similarity, label_mode=label_mode, center=center)
    factors = torch.tensor([2.0, -1.0, 0.25, -64.0, 2.0**-20, 1.0], dtype=torch.float64)
    expected = evaluate(case)
    assert_same(
        evaluate(case.with_tensors(gradients=case["gradients"] * factors[:, None, None])),
        expected,
    )
    assert_same(evaluate(case.with_tensors(inputs=case["inputs"] * factors[:, None])), expected)


@every_similarity
def test_an_explanation_turned_around_changes_the_sign_of_its_similarity(
    backend: str, similarity: str
) -> None:
    case = build("introspective_loss", similarity=similarity)
    gradients, rows = case["gradients"].clone(), torch.arange(6)
    other = (case["target"] + 1) % 9
    gradients[rows, other] *= -1
    before = ik.explanation_stats(case["gradients"], case["inputs"], case["target"])
    after = ik.explanation_stats(gradients, case["inputs"], case["target"])
    assert_accurate(after.dots[rows, other], -before.dots[rows, other])
    assert_accurate(after.sq_norms, before.sq_norms)
    assert (evaluate(case.with_tensors(gradients=gradients)).kl != evaluate(case).kl).all()


@pytest.mark.parametrize("explained", [None, 5])
def test_a_centred_explanation_ignores_what_all_classes_share(
    backend: str, explained: int | None
) -> None:
    case = build("introspective_loss", explained=explained, center=True)
    case = case.with_tensors(gradients=on_a_grid(case["gradients"]))
    common = torch.randint(-8, 8, (6, 1, 17)).double()
    shifted = case.with_tensors(gradients=case["gradients"] + common)
    assert_same(evaluate(shifted), evaluate(case))
    uncentred = [evaluate(each.with_keywords(center=False)) for each in (shifted, case)]
    assert (uncentred[0].kl - uncentred[1].kl).abs() > 1e-3


def test_a_centred_head_ignores_what_all_its_rows_share(backend: str) -> None:
    case = build("linear_introspective_loss", center=True)
    common = torch.randint(-8, 8, (1, 17)).double()
    grid = case.with_tensors(weight=on_a_grid(case["weight"]), features=on_a_grid(case["features"]))
    # The logits of a row move by one constant, which the losses don't see either.
    shifted = grid.with_tensors(weight=grid["weight"] + common)
    actual, expected = evaluate(shifted), evaluate(grid)
    assert_accurate(actual.loss, expected.loss)
    assert_accurate(actual.grads["weight"], expected.grads["weight"])
    assert_accurate(actual.grads["bias"], expected.grads["bias"])


@every_loss_with_labels
@every_similarity
def test_labels_become_uniform_as_the_similarity_temperature_grows(
    backend: str, loss: str, similarity: str
) -> None:
    case = build(loss, similarity=similarity, similarity_temperature=100.0, reduction="none")
    kl = evaluate(case).kl
    z = logits_of(case) / 1.5
    uniform = torch.full_like(z, 1 / 9)
    expected = F.kl_div(F.log_softmax(z, 1), uniform, reduction="none").sum(1)
    torch.testing.assert_close(kl, expected, rtol=0.01, atol=0)


@every_loss_with_labels
def test_labels_become_one_hot_as_the_similarity_temperature_falls(backend: str, loss: str) -> None:
    sharpest = {"temperature": 0.05, "similarity_temperature": 0.01}
    case = build(loss, reduction="none").with_keywords(**sharpest)
    nll = F.cross_entropy(logits_of(case) / 0.05, case["target"], reduction="none")
    torch.testing.assert_close(evaluate(case).kl, nll, rtol=1e-3, atol=1e-3)


@every_loss_with_labels
def test_no_mass_on_other_classes_is_one_hot(backend: str, loss: str) -> None:
    case = build(loss, label_mode="split", non_target_mass=0.0, reduction="none")
    nll = F.cross_entropy(logits_of(case) / 1.5, case["target"], reduction="none")
    assert_accurate(evaluate(case).kl, nll)


@every_loss_with_labels
def test_all_mass_on_other_classes_leaves_the_target_none(backend: str, loss: str) -> None:
    case = build(
        loss,
        label_mode="split",
        non_target_mass=1.0,
        similarity_temperature=100.0,
        reduction="none",
    )
    q = (1 - F.one_hot(case["target"], 9).double()) / 8
    log_p = F.log_softmax(logits_of(case) / 1.5, 1)
    expected = F.kl_div(log_p, q, reduction="none").sum(1)
    torch.testing.assert_close(evaluate(case).kl, expected, rtol=0.01, atol=0)


def test_explanations_are_sets_of_numbers_whatever_their_shape(backend: str) -> None:
    case = build("introspective_loss")
    gradients, inputs = torch.randn(6, 9, 4, 3, 5).double(), torch.randn(6, 4, 3, 5).double()
    expected = evaluate(case.with_tensors(gradients=gradients.flatten(2), inputs=inputs.flatten(1)))
    shaped = case.with_tensors(gradients=gradients, inputs=inputs)
    assert_same(evaluate(shaped), expected)
    order = torch.randperm(60)
    shuffled = case.with_tensors(
        gradients=gradients.flatten(2)[:, :, order], inputs=inputs.flatten(1)[:, order]
    )
    assert_same(evaluate(shuffled), expected)


def test_inputs_of_zero_count_for_nothing(backend: str) -> None:
    case = build("introspective_loss")
    zeros = torch.zeros(6, 5, dtype=torch.float64)
    padded = case.with_tensors(
        gradients=torch.cat([case["gradients"], torch.randn(6, 9, 5).double()], 2),
        inputs=torch.cat([case["inputs"], zeros], 1),
    )
    assert_same(evaluate(padded), evaluate(case))


@every_loss
def test_gradients_of_a_row_sum_to_zero(backend: str, loss: str) -> None:
    case = build(loss, class_weights=True, label_smoothing=0.1)
    grads = evaluate(case).grads
    if loss in HEADS:
        sums, size = grads["bias"].sum(), grads["bias"].norm()
    else:
        sums, size = grads["logits"].sum(1).abs().max(), grads["logits"].norm()
    assert abs(float(sums)) <= 1e-13 * float(size)


def test_the_cases_of_these_relations_are_not_degenerate() -> None:
    # The relations above would be empty if the cases were degenerate.
    for builder in (distillation_case, similarity_case, introspective_case, linear_case):
        case = builder(6, 9, torch.float64, reduction="none")
        with ik.use_backend("reference"):
            result = evaluate(case)
        assert (result.kl > 1e-3).all()
        assert (result.ce > 0).all()
