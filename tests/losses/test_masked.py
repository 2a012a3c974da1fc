"""Classes, teachers and rows that do not take part, and NaN that has to stay where it is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.bounds import bounds_of
from helpers.cases import (
    BUILDERS,
    HEADS,
    WITH_LABELS,
    Case,
    distillation_case,
    linear_case,
)
from helpers.oracle import Outcome, assert_follows_definition, defined, evaluate
from helpers.tolerance import assert_accurate, assert_within
from torch import Tensor

import introkernels as ik

NEVER = float("-inf")
NAN = float("nan")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A head is masked by its bias, which is the same in all rows.
MASKED_BY_ROW = ("distillation_loss", "similarity_loss", "introspective_loss")

every_loss = pytest.mark.parametrize("loss", BUILDERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_label_mode = pytest.mark.parametrize("label_mode", ["softmax", "split"])

MASKED = (0, 3, 4, 9)
KEPT = (1, 2, 5, 6, 7, 8)
# Which dimension of a tensor counts the classes.
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


def without_masked_classes(case: Case) -> Case:
    """The case with its ``MASKED`` columns cut out and its classes numbered anew."""
    kept = torch.tensor(KEPT)
    number = torch.full((10,), -1).scatter(0, kept, torch.arange(len(KEPT)))
    index = case.tensors.get("stats_index", case.keywords.get("class_index"))
    explained = kept.expand(case.rows, -1)
    if index is not None:
        exists = torch.isin(index, kept)
        explained = exists.nonzero()[:, 1].reshape(case.rows, -1)

    def cut(name: str, value: Any) -> Any:
        if value is None or name in ("features", "inputs") or not isinstance(value, Tensor):
            return value
        if name == "target":
            return torch.where(value >= 0, number[value.clamp(min=0)], value)
        if name in ("stats_index", "class_index"):
            return number[value.gather(1, explained)]
        if name in ("dots", "sq_norms", "gradients"):
            rows = torch.arange(case.rows)[:, None]
            return value[rows, explained]
        return value.index_select(CLASS_DIMENSION[name], kept)

    return Case(
        case.function,
        {name: cut(name, value) for name, value in case.tensors.items()},
        {name: cut(name, value) for name, value in case.keywords.items()},
        case.differentiable,
    )


def masked_case(loss: str, dtype: torch.dtype, **keywords: Any) -> Case:
    """Ten classes of which four are masked, never the target."""
    case = BUILDERS[loss](6, 10, dtype, class_weights=True, ignored=1, **keywords)
    target = torch.tensor(KEPT)
    target[2] = -100
    case = case.with_tensors(target=target)
    if loss in HEADS:
        bias = case["bias"].clone()
        bias[list(MASKED)] = NEVER
        return case.with_tensors(bias=bias)
    logits = case["logits"].clone()
    logits[:, list(MASKED)] = NEVER
    return case.with_tensors(logits=logits)


def assert_masked_is_absent(case: Case) -> None:
    absent = without_masked_classes(case)
    result, expected, bounds = evaluate(case), defined(absent), bounds_of(absent, None)
    for part in ("loss", "ce", "kl"):
        assert_within(getattr(result, part), getattr(expected, part), getattr(bounds, part), part)
    for name, grad in result.grads.items():
        reference = expected.grads[name]
        if name in CLASS_DIMENSION:
            dimension = CLASS_DIMENSION[name]
            assert (grad.index_select(dimension, torch.tensor(MASKED)) == 0).all(), name
            grad = grad.index_select(dimension, torch.tensor(KEPT))
        assert_within(grad, reference, bounds.grads[name], name)


class TestMaskedClasses:
    @every_loss
    @every_dtype
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_row_without_its_masked_classes(
        self, backend: str, loss: str, dtype: torch.dtype, reduction: str
    ) -> None:
        for label_smoothing in (0.0, 0.2):
            assert_masked_is_absent(
                masked_case(loss, dtype, label_smoothing=label_smoothing, reduction=reduction)
            )

    @pytest.mark.parametrize("loss", WITH_LABELS)
    @pytest.mark.parametrize("similarity", ["cosine", "projection"])
    def test_labels_live_on_the_other_classes(
        self, backend: str, loss: str, similarity: str
    ) -> None:
        assert_masked_is_absent(
            masked_case(loss, torch.float64, similarity=similarity, temperature=1.5)
        )

    @pytest.mark.parametrize("loss", WITH_LABELS)
    @pytest.mark.parametrize("mass", [0.0, 0.4])
    def test_split_labels_of_the_other_classes_are_renormalized(
        self, backend: str, loss: str, mass: float
    ) -> None:
        case = masked_case(
            loss, torch.float64, label_mode="split", non_target_mass=mass, temperature=1.5
        )
        assert_follows_definition(case)

    @pytest.mark.parametrize("loss", ["similarity_loss", "introspective_loss"])
    def test_explained_classes_may_be_masked(self, backend: str, loss: str) -> None:
        case = masked_case(loss, torch.float64, explained=4)
        # Two masked classes among the explained ones of every row, in different places.
        explained = [
            torch.tensor([0, max(y, 1), 9, 1 if y == 2 else 2]).roll(row)
            for row, y in enumerate(case["target"].tolist())
        ]
        index = torch.stack(explained)
        if loss == "similarity_loss":
            assert_masked_is_absent(case.with_tensors(stats_index=index))
        else:
            assert_masked_is_absent(case.with_keywords(class_index=index))

    @pytest.mark.parametrize("loss", MASKED_BY_ROW)
    @every_dtype
    def test_other_classes_of_every_row_masked_at_random(
        self, backend: str, loss: str, dtype: torch.dtype
    ) -> None:
        for label_smoothing, mode in itertools.product((0.0, 0.1), ("softmax", "split")):
            labels = {} if loss not in WITH_LABELS else {"label_mode": mode}
            case = BUILDERS[loss](
                9, 12, dtype, label_smoothing=label_smoothing, reduction="none", **labels
            )
            masked = torch.rand(9, 12) < 0.4
            masked.scatter_(1, case["target"][:, None], False)
            # A row with its target alone.
            masked[4] = torch.arange(12) != case["target"][4]
            logits = case["logits"].masked_fill(masked, NEVER)
            result = assert_follows_definition(case.with_tensors(logits=logits))
            assert (result.grads["logits"][masked] == 0).all()
            assert result.loss.isfinite().all()
            assert result.ce[4] == 0
            assert result.kl[4] == 0


class TestMaskedTarget:
    @pytest.mark.parametrize("loss", MASKED_BY_ROW)
    @every_dtype
    @every_label_mode
    def test_costs_infinity_and_keeps_a_finite_gradient(
        self, backend: str, loss: str, dtype: torch.dtype, label_mode: str
    ) -> None:
        labels = {} if loss not in WITH_LABELS else {"label_mode": label_mode}
        case = BUILDERS[loss](4, 7, dtype, reduction="none", **labels)
        logits = case["logits"].clone()
        logits[2, case["target"][2]] = NEVER
        logits[2, (case["target"][2] + 2) % 7] = NEVER
        masked = case.with_tensors(logits=logits)
        result = assert_follows_definition(masked)
        assert result.loss.isinf().tolist() == [False, False, True, False]
        assert result.loss[2] > 0
        grad = result.grads["logits"]
        assert grad.isfinite().all()
        assert (grad[2][logits[2] == NEVER] == 0).all()
        assert (grad[2][logits[2] != NEVER] != 0).all()
        # The divergence needs no target: without a cross entropy there is nothing infinite.
        only_kl = assert_follows_definition(masked.with_keywords(ce_weight=0.0, kl_weight=1.0))
        assert only_kl.loss.isfinite().all()
        for reduction in ("mean", "sum"):
            result = assert_follows_definition(masked.with_keywords(reduction=reduction))
            assert result.loss == float("inf")

    def test_of_a_head(self, backend: str) -> None:
        case = linear_case(4, 7, reduction="none")
        bias = case["bias"].clone()
        bias[3] = NEVER
        result = evaluate(case.with_tensors(bias=bias, target=torch.tensor([0, 3, 1, 6])))
        assert result.loss.isinf().tolist() == [False, True, False, False]
        assert all(grad.isfinite().all() for grad in result.grads.values())
        assert (result.grads["weight"][3] == 0).all()
        assert result.grads["bias"][3] == 0

    @every_dtype
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("target_weight", [0.0, 2.0])
    def test_costs_infinity_whatever_its_share_in_the_cross_entropy(
        self, backend: str, dtype: torch.dtype, target_weight: float, label_smoothing: float
    ) -> None:
        case = distillation_case(3, 5, dtype, reduction="none", label_smoothing=label_smoothing)
        weight = torch.ones(5, dtype=dtype)
        weight[case["target"][1]] = target_weight
        logits = case["logits"].clone()
        logits[1, case["target"][1]] = NEVER
        masked = case.with_tensors(logits=logits).with_keywords(weight=weight)
        result = assert_follows_definition(masked)
        assert result.loss.isinf()[1]
        assert result.loss[1] > 0
        assert result.grads["logits"].isfinite().all()

    @every_label_mode
    @pytest.mark.parametrize("loss", ["similarity_loss", "introspective_loss"])
    def test_spoils_its_row_where_no_other_class_was_explained(
        self, backend: str, loss: str, label_mode: str
    ) -> None:
        # Its teacher excludes every class, and is no distribution.
        case = BUILDERS[loss](3, 5, explained=1, reduction="none", label_mode=label_mode)
        logits = case["logits"].clone()
        logits[1, case["target"][1]] = NEVER
        clean = evaluate(case)
        result = evaluate(case.with_tensors(logits=logits))
        assert result.ce[1] == float("inf")
        assert result.loss[1].isnan()
        others = [0, 2]
        assert torch.equal(result.loss[others], clean.loss[others])
        assert torch.equal(result.grads["logits"][others], clean.grads["logits"][others])

    @every_dtype
    def test_row_without_any_class(self, backend: str, dtype: torch.dtype) -> None:
        for loss, label_smoothing in itertools.product(MASKED_BY_ROW, (0.0, 0.1, 1.0)):
            case = BUILDERS[loss](3, 5, dtype, reduction="none", label_smoothing=label_smoothing)
            logits = case["logits"].clone()
            logits[1] = NEVER
            result = assert_follows_definition(case.with_tensors(logits=logits))
            assert result.loss.isinf().tolist() == [False, True, False]
            assert (result.grads["logits"][1] == 0).all()
            untouched = evaluate(case)
            assert torch.equal(result.loss[[0, 2]], untouched.loss[[0, 2]])


class TestTeacherWithoutLabels:
    @every_dtype
    def test_minus_infinity_is_no_soft_label(self, backend: str, dtype: torch.dtype) -> None:
        case = distillation_case(
            4, 8, dtype, temperature=2.0, ce_weight=0.0, kl_weight=1.0, reduction="none"
        )
        teacher = case["teacher_logits"].clone()
        teacher[:, [1, 5]] = NEVER
        case = case.with_tensors(teacher_logits=teacher)
        assert_follows_definition(case)
        result = evaluate(case)
        assert result.loss.isfinite().all()
        # There p - q is p alone.
        p = torch.softmax(case["logits"].double() / 2, 1)[:, [1, 5]]
        assert_accurate(result.grads["logits"][:, [1, 5]], 2 * p)

    @every_dtype
    def test_one_label_left(self, backend: str, dtype: torch.dtype) -> None:
        case = distillation_case(
            4, 8, dtype, temperature=2.0, ce_weight=0.0, kl_weight=1.0, reduction="none"
        )
        teacher = torch.full_like(case["teacher_logits"], NEVER)
        teacher[:, 3] = case["teacher_logits"][:, 3]
        result = assert_follows_definition(case.with_tensors(teacher_logits=teacher))
        nll = -torch.log_softmax(case["logits"].double() / 2, 1)[:, 3]
        assert_accurate(result.kl, nll)

    def test_a_teacher_that_is_no_distribution_spoils_its_row_alone(self, backend: str) -> None:
        case = distillation_case(4, 8, reduction="none")
        clean = evaluate(case)
        teacher = case["teacher_logits"].clone()
        teacher[1] = NEVER
        result = evaluate(case.with_tensors(teacher_logits=teacher))
        assert_spoiled_alone(result, clean, row=1, rows=4)


def assert_spoiled_alone(result: Outcome, clean: Outcome, *, row: int, rows: int) -> None:
    """NaN throughout ``row``, and the very bits of the clean result elsewhere."""
    others = [b for b in range(rows) if b != row]
    assert result.loss[row].isnan()
    assert torch.equal(result.loss[others], clean.loss[others])
    by_row = "logits" if "logits" in result.grads else "features"
    grad, clean_grad = result.grads[by_row], clean.grads[by_row]
    assert grad[row].isnan().all()
    assert torch.equal(grad[others], clean_grad[others])


class TestNaN:
    # Tensors of each loss, and where NaN is put in a row whose target is class 2.
    PLACES = (
        ("distillation_loss", "logits", (4,)),
        ("distillation_loss", "logits", (2,)),
        ("distillation_loss", "teacher_logits", (4,)),
        ("distillation_loss", "teacher_logits", (2,)),
        ("similarity_loss", "logits", (4,)),
        ("similarity_loss", "dots", (4,)),
        ("similarity_loss", "sq_norms", (4,)),
        ("similarity_loss", "sq_norms", (2,)),
        ("introspective_loss", "logits", (2,)),
        ("introspective_loss", "gradients", (4, 3)),
        ("introspective_loss", "gradients", (2, 16)),
        ("introspective_loss", "inputs", (5,)),
        ("linear_introspective_loss", "features", (7,)),
    )

    @pytest.mark.parametrize(("loss", "name", "place"), PLACES, ids=str)
    @every_dtype
    def test_stays_in_its_row(
        self, backend: str, loss: str, name: str, place: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        case = BUILDERS[loss](5, 6, dtype, reduction="none")
        target = case["target"].clone()
        target[3] = 2
        case = case.with_tensors(target=target)
        spoiled = case[name].clone()
        spoiled[(3, *place)] = NAN
        assert_spoiled_alone(
            evaluate(case.with_tensors(**{name: spoiled})), evaluate(case), row=3, rows=5
        )

    @every_dtype
    def test_split_labels_let_it_through(self, backend: str, dtype: torch.dtype) -> None:
        for loss, name, place in (
            ("similarity_loss", "dots", (4,)),
            ("introspective_loss", "gradients", (4, 3)),
        ):
            case = BUILDERS[loss](5, 6, dtype, reduction="none", label_mode="split")
            target = case["target"].clone()
            target[3] = 2
            case = case.with_tensors(target=target)
            spoiled = case[name].clone()
            spoiled[(3, *place)] = NAN
            result = evaluate(case.with_tensors(**{name: spoiled}))
            assert result.loss.isnan().tolist() == [False, False, False, True, False]
            assert result.grads["logits"].isnan().any(1).tolist() == [
                False,
                False,
                False,
                True,
                False,
            ]

    @every_dtype
    @pytest.mark.parametrize("name", ["logits", "teacher_logits"])
    def test_infinity_is_no_probability(self, backend: str, name: str, dtype: torch.dtype) -> None:
        case = distillation_case(5, 6, dtype, reduction="none")
        spoiled = case[name].clone()
        spoiled[3, 1] = float("inf")
        assert_spoiled_alone(
            evaluate(case.with_tensors(**{name: spoiled})), evaluate(case), row=3, rows=5
        )

    @every_loss
    def test_reaches_the_reduced_loss(self, backend: str, loss: str) -> None:
        for reduction in ("mean", "sum"):
            case = BUILDERS[loss](5, 6, reduction=reduction)
            name = "features" if loss in HEADS else "logits"
            spoiled = case[name].clone()
            spoiled[3, 1] = NAN
            result = evaluate(case.with_tensors(**{name: spoiled}))
            assert result.loss.isnan()
            clean_rows = result.grads[name][[0, 1, 2, 4]]
            assert clean_rows.isfinite().all()


class TestIgnoredRows:
    def test_no_gradient_comes_in_for_them(self, backend: str) -> None:
        case = distillation_case(3, 5, reduction="none")
        case["target"][1] = -100
        logits = case["logits"].requires_grad_()
        loss = ik.distillation_loss(*case.arguments(), **case.keywords)
        loss.backward(torch.tensor([1.0, NAN, 1.0], device=loss.device))
        assert logits.grad is not None
        assert torch.equal(logits.grad[1], torch.zeros_like(logits.grad[1]))
        assert logits.grad[0].isfinite().all()

    @every_loss
    @every_dtype
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_nothing_in_them_matters(
        self, backend: str, loss: str, dtype: torch.dtype, reduction: str
    ) -> None:
        builder, further = BUILDERS[loss], {}
        if loss in ("similarity_loss", "introspective_loss"):
            further["explained"] = 3
        case = builder(
            6, 7, dtype, reduction=reduction, class_weights=True, label_smoothing=0.1, **further
        )
        target = case["target"].clone()
        target[[1, 4]] = -100
        case = case.with_tensors(target=target)
        spoiled = {}
        for name in case.tensors.keys() - {"target", "stats_index", "weight", "bias"}:
            tensor = case[name].clone()
            tensor[1], tensor[4] = NAN, float("inf")
            spoiled[name] = tensor
        changed = case.with_tensors(**spoiled)
        if loss == "similarity_loss":
            changed = changed.with_tensors(stats_index=garbage_index(case["stats_index"]))
        elif loss == "introspective_loss":
            changed = changed.with_keywords(class_index=garbage_index(case["class_index"]))
        result, clean = evaluate(changed), evaluate(case)
        for part in ("loss", "ce", "kl"):
            assert torch.equal(getattr(result, part), getattr(clean, part)), part
            if reduction == "none":
                assert (getattr(result, part)[[1, 4]] == 0).all()
        for name, grad in result.grads.items():
            assert torch.equal(grad, clean.grads[name]), name
            if name in ("logits", "features"):
                assert (grad[[1, 4]] == 0).all()

    @every_loss
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_losses_without_them_are_the_same(
        self, backend: str, loss: str, reduction: str
    ) -> None:
        case = BUILDERS[loss](
            7, 5, torch.float64, ignored=3, reduction=reduction, class_weights=True
        )
        live = case["target"] != -100
        by_row = {
            name: None if tensor is None else tensor[live]
            for name, tensor in case.tensors.items()
            if name not in ("weight", "bias")
        }
        assert_accurate(evaluate(case).loss, evaluate(case.with_tensors(**by_row)).loss)


def garbage_index(index: Tensor) -> Tensor:
    """The index with classes in its ignored rows that don't exist."""
    garbage = index.clone()
    garbage[1] = torch.tensor([10**15, -7, 10**15])
    garbage[4] = -100
    return garbage
