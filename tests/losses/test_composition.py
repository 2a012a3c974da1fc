"""The losses in terms of each other: each is also a composition of the narrower ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cases import Case, introspective_case, similarity_case
from helpers.oracle import evaluate
from helpers.relations import assert_same, build, logits_of
from helpers.tolerance import assert_accurate

import introkernels as ik

every_similarity = pytest.mark.parametrize("similarity", ["cosine", "projection"])
every_label_mode = pytest.mark.parametrize("label_mode", ["softmax", "split"])
STATS_OPTIONS = list(itertools.product((False, True), ("cosine", "projection"), (None, 4)))


@pytest.mark.parametrize(("center", "similarity", "explained"), STATS_OPTIONS)
@every_label_mode
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_introspective_is_statistics_and_similarity_loss(
    backend: str,
    dtype: torch.dtype,
    center: bool,
    similarity: str,
    explained: int | None,
    label_mode: str,
) -> None:
    keywords = {"similarity": similarity, "label_mode": label_mode, "reduction": "none"}
    case = introspective_case(
        6, 9, dtype, explained=explained, center=center, ignored=1, **keywords
    )
    stats = ik.explanation_stats(
        case["gradients"],
        case["inputs"],
        case["target"],
        center=center,
        class_index=case.keywords["class_index"],
    )
    split = Case(
        "similarity_loss",
        {
            "logits": case["logits"],
            "target": case["target"],
            "dots": stats.dots,
            "sq_norms": stats.sq_norms,
            "stats_index": stats.class_index,
        },
        keywords,
    )
    whole, parts = evaluate(case), evaluate(split)
    assert_accurate(whole.loss, parts.loss.double(), "loss")
    assert_accurate(whole.grads["logits"], parts.grads["logits"].double(), "gradient")


@every_similarity
@every_label_mode
@pytest.mark.parametrize("center", [False, True])
def test_head_is_an_introspective_loss_of_its_weight(
    backend: str, similarity: str, label_mode: str, center: bool
) -> None:
    case = build(
        "linear_introspective_loss", similarity=similarity, label_mode=label_mode, center=center
    )
    logits = logits_of(case)
    spelt_out = Case(
        "introspective_loss",
        {
            "logits": logits,
            "target": case["target"],
            "gradients": case["weight"].expand(6, -1, -1),
            "inputs": case["features"],
        },
        {name: value for name, value in case.keywords.items() if name != "class_weight"},
    )
    head, spelt = evaluate(case), evaluate(spelt_out)
    assert_accurate(head.loss, spelt.loss)
    grad = spelt.grads["logits"]
    assert_accurate(head.grads["features"], grad @ case["weight"])
    assert_accurate(head.grads["weight"], grad.mT @ case["features"])
    assert_accurate(head.grads["bias"], grad.sum(0))


@every_similarity
@every_label_mode
def test_introspection_is_distillation_of_similarities(
    backend: str, similarity: str, label_mode: str
) -> None:
    case = similarity_case(
        6,
        9,
        torch.float64,
        similarity=similarity,
        label_mode=label_mode,
        temperature=1.5,
        similarity_temperature=0.5,
        non_target_mass=0.3,
    )
    stats = ik.ExplanationStats(case["dots"], case["sq_norms"])
    q = ik.soft_labels(
        stats,
        case["target"],
        temperature=1.5,
        similarity_temperature=0.5,
        similarity=similarity,
        label_mode=label_mode,
        non_target_mass=0.3,
    )
    torch.testing.assert_close(q.sum(1), torch.ones(6).double(), rtol=1e-14, atol=0)
    distilled = Case(
        "distillation_loss",
        {"logits": case["logits"], "teacher_logits": 1.5 * q.log(), "target": case["target"]},
        {"temperature": 1.5},
    )
    assert_same(evaluate(case), evaluate(distilled))


def test_classes_not_explained_have_no_label(backend: str) -> None:
    case = similarity_case(6, 9, torch.float64, explained=4, temperature=1.5)
    index = case["stats_index"]
    stats = ik.ExplanationStats(case["dots"], case["sq_norms"], index)
    q = ik.soft_labels(stats, case["target"], temperature=1.5)
    teacher = torch.full((6, 9), float("-inf"), dtype=torch.float64)
    distilled = Case(
        "distillation_loss",
        {
            "logits": case["logits"],
            "teacher_logits": teacher.scatter(1, index, 1.5 * q.log()),
            "target": case["target"],
        },
        {"temperature": 1.5},
    )
    assert_same(evaluate(case), evaluate(distilled))


@every_similarity
@every_label_mode
@pytest.mark.parametrize("loss", ["similarity_loss", "introspective_loss"])
def test_all_classes_named_in_any_order_are_all_classes(
    backend: str, loss: str, similarity: str, label_mode: str
) -> None:
    case = build(loss, similarity=similarity, label_mode=label_mode)
    index = torch.stack([torch.randperm(9) for _ in range(6)])
    rows = torch.arange(6)[:, None]
    named = case.with_tensors(
        **{
            name: case[name][rows, index]
            for name in ("dots", "sq_norms", "gradients")
            if name in case.tensors
        }
    )
    if loss == "similarity_loss":
        named = named.with_tensors(stats_index=index)
    else:
        named = named.with_keywords(class_index=index)
    assert_same(evaluate(named), evaluate(case))
