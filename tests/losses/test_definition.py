"""Is the oracle itself right? Its float64 results against 50 digits, and against PyTorch.

The definition in :mod:`introkernels.reference` judges every backend, so here it is judged: by the
formulas in plain Python and arbitrary precision, by PyTorch's losses on PyTorch's own samples, and
by autograd's numerical differentiation. What the public functions share with PyTorch is checked for
every backend at the same time.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import exact
from helpers.cases import (
    BUILDERS,
    HEADS,
    WITH_LABELS,
    Case,
    distillation_case,
    introspective_case,
    similarity_case,
)
from helpers.oracle import defined, evaluate
from helpers.tolerance import assert_accurate
from torch import Tensor, nn

import introkernels as ik


def exact_rows(case: Case) -> list[exact.Row]:
    """Each row of a distillation or similarity case in 50 digits, unreduced."""
    keywords = dict(case.keywords)
    weight = keywords.pop("weight", None)
    loss_keywords = {
        name: keywords[name]
        for name in ("temperature", "ce_weight", "kl_weight", "label_smoothing")
        if name in keywords
    }
    temperature = loss_keywords.get("temperature", 4.0)
    label_keywords = {
        name: keywords[name]
        for name in ("similarity_temperature", "similarity", "label_mode", "non_target_mass")
        if name in keywords
    }
    rows = []
    for b, target in enumerate(case["target"].tolist()):
        logits = case["logits"][b].tolist()
        exists = [z != float("-inf") for z in logits]
        if case.function == "distillation_loss":
            q = exact.teacher_labels(case["teacher_logits"][b].tolist(), temperature, exists)
        else:
            index = case.tensors["stats_index"]
            classes = list(range(len(logits))) if index is None else index[b].tolist()
            on_explained = exact.soft_labels(
                case["dots"][b].tolist(),
                case["sq_norms"][b].tolist(),
                classes.index(target),
                temperature=temperature,
                **label_keywords,
            )
            q = [exact.Number(0)] * len(logits)
            for c, share in zip(classes, on_explained, strict=True):
                q[c] = share if exists[c] else exact.Number(0)
            q = [share / sum(q) for share in q]
        rows.append(
            exact.row(
                logits,
                q,
                target,
                weight=None if weight is None else weight.tolist(),
                **loss_keywords,
            )
        )
    return rows


def assert_exact(case: Case) -> None:
    """Hold the definition in float64 against 50 digits, row by row."""
    rows = exact_rows(case)
    result = defined(case.with_keywords(reduction="none"))
    for name in ("loss", "ce", "kl"):
        expected = torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
        assert_accurate(getattr(result, name), expected, name)
    expected = torch.tensor([row.grad for row in rows], dtype=torch.float64)
    assert_accurate(result.grads["logits"], expected, "gradient of logits")


class TestAgainstFiftyDigits:
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
    @pytest.mark.parametrize("class_weights", [False, True])
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
    def test_distillation(
        self, temperature: float, class_weights: bool, label_smoothing: float
    ) -> None:
        for classes in (1, 2, 10):
            assert_exact(
                distillation_case(
                    3,
                    classes,
                    torch.float64,
                    class_weights=class_weights,
                    temperature=temperature,
                    label_smoothing=label_smoothing,
                    ce_weight=0.4,
                    kl_weight=1.7,
                )
            )

    @pytest.mark.parametrize("explained", [None, 4])
    @pytest.mark.parametrize("label_mode", ["softmax", "split"])
    @pytest.mark.parametrize("similarity", ["cosine", "projection"])
    def test_similarity(self, similarity: str, label_mode: str, explained: int | None) -> None:
        for temperature, similarity_temperature, mass in (
            (4.0, 1.0, 0.1),
            (0.5, 0.2, 0.6),
            (2.0, 10.0, 1.0),
            (2.0, 10.0, 0.0),
        ):
            assert_exact(
                similarity_case(
                    3,
                    9,
                    torch.float64,
                    explained=explained,
                    similarity=similarity,
                    label_mode=label_mode,
                    temperature=temperature,
                    similarity_temperature=similarity_temperature,
                    non_target_mass=mass,
                )
            )

    @pytest.mark.parametrize("label_mode", ["softmax", "split"])
    def test_masked_classes(self, label_mode: str) -> None:
        never = float("-inf")
        case = similarity_case(3, 6, torch.float64, label_mode=label_mode, label_smoothing=0.1)
        logits = case["logits"].clone()
        logits[:, [1, 4]] = never
        # A row whose target is masked, a row without masked classes, a row with its target alone.
        target = torch.tensor([1, 3, 2])
        logits[1] = torch.randn(6)
        logits[2] = torch.tensor([never, never, 0.5, never, never, never])
        assert_exact(case.with_tensors(logits=logits, target=target))
        teacher = torch.randn(3, 6, dtype=torch.float64)
        teacher[1, 2] = never
        assert_exact(
            Case(
                "distillation_loss",
                {"logits": logits, "teacher_logits": teacher, "target": target},
            )
        )

    @pytest.mark.parametrize("center", [False, True])
    def test_statistics(self, center: bool) -> None:
        case = introspective_case(3, 5, torch.float64, shape=(2, 4))
        stats = ik.reference.explanation_stats(
            case["gradients"], case["inputs"], case["target"], center=center
        )
        for b, target in enumerate(case["target"].tolist()):
            dots, sq_norms = exact.explanation_stats(
                case["gradients"][b].flatten(1).tolist(),
                case["inputs"][b].flatten().tolist(),
                target,
                center,
            )
            assert_accurate(stats.dots[b], torch.tensor(dots, dtype=torch.float64))
            assert_accurate(stats.sq_norms[b], torch.tensor(sq_norms, dtype=torch.float64))

    @pytest.mark.parametrize("label_mode", ["softmax", "split"])
    @pytest.mark.parametrize("similarity", ["cosine", "projection"])
    def test_soft_labels(self, backend: str, similarity: str, label_mode: str) -> None:
        for dtype, explained in itertools.product((torch.float64, torch.float32), (None, 4)):
            case = similarity_case(3, 7, stats_dtype=dtype, explained=explained)
            stats = ik.ExplanationStats(case["dots"], case["sq_norms"], case.tensors["stats_index"])
            q = ik.soft_labels(
                stats,
                case["target"],
                temperature=2.0,
                similarity_temperature=0.3,
                similarity=similarity,
                label_mode=label_mode,
                non_target_mass=0.35,
            )
            assert q.dtype == dtype
            for b, target in enumerate(case["target"].tolist()):
                classes = list(range(7)) if explained is None else stats.class_index[b].tolist()
                expected = exact.soft_labels(
                    stats.dots[b].tolist(),
                    stats.sq_norms[b].tolist(),
                    classes.index(target),
                    temperature=2.0,
                    similarity_temperature=0.3,
                    similarity=similarity,
                    label_mode=label_mode,
                    non_target_mass=0.35,
                )
                shares = torch.tensor([float(share) for share in expected], dtype=torch.float64)
                assert_accurate(q[b], shares)


@cache
def cross_entropy_samples(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """PyTorch's own samples of ``F.cross_entropy`` with class-index targets."""
    # PyTorch's own tests need it.
    pytest.importorskip("expecttest", reason="a machine with a GPU may lack it")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    return [
        (sample.input, sample.args[0], sample.kwargs)
        for sample in info.sample_inputs("cpu", dtype, requires_grad=False)
        if sample.args[0].dtype == torch.int64
    ]


class TestAgainstPyTorch:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_without_divergence_it_is_cross_entropy(self, backend: str, dtype: torch.dtype) -> None:
        compared = 0
        for sample, target, keywords in cross_entropy_samples(dtype):
            logits = sample.movedim(1, -1).reshape(-1, sample.shape[1]).requires_grad_()
            theirs = F.cross_entropy(sample.requires_grad_(), target, **keywords)
            loss = ik.distillation_loss(
                logits,
                torch.randn(logits.shape, dtype=dtype),
                target.reshape(-1),
                ce_weight=1.0,
                kl_weight=0.0,
                **keywords,
            )
            incoming = torch.randn(theirs.shape, dtype=dtype)
            (their_grad,) = torch.autograd.grad(theirs, sample, incoming)
            (grad,) = torch.autograd.grad(loss, logits, incoming.reshape(loss.shape))
            tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {}
            torch.testing.assert_close(
                loss, theirs.reshape(loss.shape), equal_nan=True, **tolerance
            )
            torch.testing.assert_close(
                grad,
                their_grad.movedim(1, -1).reshape(grad.shape),
                equal_nan=True,
                **tolerance,
            )
            compared += 1
        # 11 of the 21 samples of torch 2.13 have class indices; a later torch may add some.
        assert compared >= 11

    @pytest.mark.parametrize("loss", WITH_LABELS)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_every_loss_without_divergence_is_cross_entropy(
        self, backend: str, loss: str, reduction: str
    ) -> None:
        case = BUILDERS[loss](
            9,
            7,
            torch.float64,
            ignored=2,
            class_weights=True,
            label_smoothing=0.1,
            reduction=reduction,
            ce_weight=1.0,
            kl_weight=0.0,
        )
        weight = case.keywords.get("class_weight", case.keywords.get("weight"))
        linear = loss in HEADS
        logits = (
            F.linear(case["features"], case["weight"], case["bias"]) if linear else case["logits"]
        )
        theirs = F.cross_entropy(
            logits, case["target"], weight, reduction=reduction, label_smoothing=0.1
        )
        torch.testing.assert_close(evaluate(case).loss, theirs, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
    @pytest.mark.parametrize("class_weights", [False, True])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_distillation_is_kl_div_and_cross_entropy(
        self,
        backend: str,
        reduction: str,
        temperature: float,
        class_weights: bool,
        label_smoothing: float,
    ) -> None:
        case = distillation_case(
            9,
            13,
            torch.float64,
            class_weights=class_weights,
            temperature=temperature,
            ce_weight=0.25,
            kl_weight=1.5,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        logits = case["logits"].clone().requires_grad_()
        divergence = F.kl_div(
            F.log_softmax(logits / temperature, 1),
            F.softmax(case["teacher_logits"] / temperature, 1),
            reduction={"mean": "batchmean"}.get(reduction, reduction),
        )
        if reduction == "none":
            divergence = divergence.sum(1)
        cross_entropy = F.cross_entropy(
            logits,
            case["target"],
            case.keywords["weight"],
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        theirs = 0.25 * cross_entropy + 1.5 * temperature**2 * divergence
        incoming = torch.randn(theirs.shape, dtype=torch.float64)
        (their_grad,) = torch.autograd.grad(theirs, logits, incoming)
        ours = evaluate(case, ik, incoming)
        close = {"rtol": 1e-11, "atol": 1e-13}
        torch.testing.assert_close(ours.loss, theirs.detach(), **close)
        torch.testing.assert_close(ours.ce, cross_entropy.detach(), **close)
        torch.testing.assert_close(ours.kl, divergence.detach(), **close)
        torch.testing.assert_close(ours.grads["logits"], their_grad, **close)

    def test_ignored_rows_stay_out_of_both_means(self, backend: str) -> None:
        case = distillation_case(9, 13, torch.float64, ignored=4, temperature=2.0)
        live = case["target"] != -100
        logits, teacher = case["logits"][live], case["teacher_logits"][live]
        divergence = F.kl_div(
            F.log_softmax(logits / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean"
        )
        cross_entropy = F.cross_entropy(case["logits"], case["target"])
        theirs = 0.7 * cross_entropy + 0.3 * 4 * divergence
        torch.testing.assert_close(evaluate(case).loss, theirs, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("loss", BUILDERS)
    def test_definition_passes_gradcheck(self, loss: str) -> None:
        for reduction, label_mode, label_smoothing in (
            ("mean", "softmax", 0.0),
            ("sum", "split", 0.2),
            ("none", "split", 0.0),
            ("none", "softmax", 0.2),
        ):
            further: dict[str, Any] = {}
            if loss in WITH_LABELS:
                further["label_mode"] = label_mode
            if loss in HEADS:
                # Its soft labels are constants that a difference quotient would move.
                further.update(kl_weight=0.0, width=3)
            case = BUILDERS[loss](
                4,
                5,
                torch.float64,
                ignored=1,
                class_weights=True,
                reduction=reduction,
                label_smoothing=label_smoothing,
                **further,
            )

            def call(*leaves: Tensor, case: Case = case) -> Tensor:
                changed = case.with_tensors(**dict(zip(case.differentiable, leaves, strict=True)))
                function = getattr(ik.reference, case.function)
                return function(*changed.arguments(), **case.keywords)

            leaves = [case[name].clone().requires_grad_() for name in case.differentiable]
            assert torch.autograd.gradcheck(call, leaves)

    def test_head_differentiates_through_its_logits_alone(self, backend: str) -> None:
        case = BUILDERS["linear_introspective_loss"](6, 5, torch.float64, label_smoothing=0.1)
        leaves = [case[name].clone().requires_grad_() for name in case.differentiable]
        features, weight, bias = leaves
        stats = ik.explanation_stats(
            weight.detach().expand(6, -1, -1), features.detach(), case["target"]
        )
        loss = ik.similarity_loss(
            F.linear(features, weight, bias), case["target"], stats, label_smoothing=0.1
        )
        expected = torch.autograd.grad(loss, leaves)
        for name, grad in zip(case.differentiable, expected, strict=True):
            assert_accurate(evaluate(case).grads[name], grad, name)


class TestAgainstCaptum:
    @pytest.mark.parametrize("center", [False, True])
    def test_statistics_are_inner_products_of_input_x_gradient(
        self, backend: str, center: bool
    ) -> None:
        captum = pytest.importorskip("captum.attr", reason="a machine with a GPU may lack it")

        model = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.GELU(),
            nn.Conv2d(4, 5, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(5 * 2 * 3, 6),
        ).double()
        images = torch.randn(4, 2, 7, 9, dtype=torch.float64, requires_grad=True)
        target = torch.tensor([5, 0, 2, 2])
        explainer = captum.InputXGradient(model)
        explanations = torch.stack(
            [explainer.attribute(images, target=c).detach().flatten(1) for c in range(6)], 1
        )
        if center:
            explanations = explanations - explanations.mean(1, keepdim=True)
        of_target = explanations[torch.arange(4), target]
        logits = model(images)
        gradients = torch.stack(
            [
                torch.autograd.grad(logits[:, c].sum(), images, retain_graph=True)[0]
                for c in range(6)
            ],
            1,
        )
        stats = ik.explanation_stats(gradients, images, target, center=center)
        assert_accurate(stats.dots, torch.einsum("bcd,bd->bc", explanations, of_target), "dots")
        assert_accurate(stats.sq_norms, explanations.square().sum(-1), "sq_norms")
