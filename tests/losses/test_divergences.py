"""Divergences, weights of rows and class probabilities, on every loss that takes them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import BUILDERS, HEADS, Case, distillation_case, introspective_case
from helpers.oracle import assert_follows_definition, defined, evaluate
from helpers.tolerance import assert_accurate
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import introkernels as ik

DIVERGENCES = (
    {"divergence": "reverse_kl"},
    {"divergence": "js"},
    {"divergence": "js", "beta": 0.1},
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
every_loss = pytest.mark.parametrize("loss", BUILDERS)


def weighted(case: Case) -> Case:
    """The case with weights of its rows, one of which is 0."""
    row_weight = torch.rand(case.shape).to(case[case.differentiable[0]].dtype)
    row_weight[0] = 0
    return case.with_keywords(row_weight=row_weight)


def mixed(case: Case) -> Case:
    """The case with class probabilities as targets, some of them 0."""
    rows, classes = case["logits"].shape
    probabilities = torch.rand(rows, classes).masked_fill(torch.rand(rows, classes) < 0.4, 0)
    probabilities[:, 0] += 0.1
    return case.with_tensors(target=probabilities / probabilities.sum(1, keepdim=True))


@every_loss
@every_divergence
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_divergences(
    backend: str, loss: str, divergence: dict[str, Any], dtype: torch.dtype, reduction: str
) -> None:
    assert_follows_definition(
        BUILDERS[loss](6, 11, dtype, reduction=reduction, ignored=1, **divergence)
    )


@every_divergence
@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_large_logits(backend: str, divergence: dict[str, Any], offset: float) -> None:
    case = distillation_case(5, 40, scale=40, reduction="none", temperature=0.5, **divergence)
    moved = {name: case[name] + offset for name in ("logits", "teacher_logits")}
    assert_follows_definition(case.with_tensors(**moved))


@every_divergence
def test_masked_classes(backend: str, divergence: dict[str, Any]) -> None:
    """Those of the student's logits; and of the teacher's, which cost the reverse KL infinity."""
    case = distillation_case(6, 9, reduction="none", label_smoothing=0.1, **divergence)
    logits = case["logits"].clone()
    logits[:4, 2] = -torch.inf
    logits[1] = -torch.inf
    assert_follows_definition(case.with_tensors(logits=logits, target=torch.full((6,), 4)))
    teacher = case["teacher_logits"].clone()
    teacher[1, 3] = -torch.inf
    result = evaluate(case.with_tensors(teacher_logits=teacher))
    assert torch.equal(
        result.kl.isinf(), defined(case.with_tensors(teacher_logits=teacher)).kl.isinf()
    )
    assert result.kl.isinf().any() == (divergence["divergence"] == "reverse_kl")


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_limits_of_js(backend: str, temperature: float) -> None:
    """Divided by its weights, JS tends to either divergence where ``beta`` tends to 0 or 1."""
    case = distillation_case(
        4, 7, torch.float64, scale=0.5, reduction="none", temperature=temperature
    )
    small = 1e-6
    for beta, name in ((small, "forward_kl"), (1 - small, "reverse_kl")):
        js = evaluate(case.with_keywords(divergence="js", beta=beta)).kl / small
        kl = evaluate(case.with_keywords(divergence=name)).kl
        torch.testing.assert_close(js, kl, rtol=1e-3, atol=1e-6)


def _ten_cases() -> list[Case]:
    torch.manual_seed(0)
    return [
        distillation_case(5, 12, torch.float64, scale=scale, temperature=temperature, ce_weight=0.0)
        for scale, temperature in itertools.product((0.5, 1, 2, 4, 8), (1.0, 3.0))
    ]


@pytest.mark.parametrize("case", _ten_cases(), ids=range(10))
def test_reverse_kl_by_hand(backend: str, case: Case) -> None:
    """``F.kl_div`` with its arguments exchanged."""
    temperature = case.keywords["temperature"]
    z = case["logits"].clone().requires_grad_()
    log_p = F.log_softmax(z / temperature, 1)
    log_q = F.log_softmax(case["teacher_logits"] / temperature, 1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = 0.3 * temperature**2 * kl
    result = evaluate(case.with_keywords(divergence="reverse_kl"))
    assert_accurate(result.kl, kl.detach())
    assert_accurate(result.grads["logits"], torch.autograd.grad(loss, z)[0])


@pytest.mark.parametrize("case", _ten_cases(), ids=range(10))
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_js_of_on_policy_distillation(backend: str, case: Case, beta: float) -> None:
    """As Agarwal et al. (2024, arXiv:2306.13649) define it, ``beta`` times the teacher's part.

    TRL's ``generalized_jsd_loss`` is this with ``batchmean``, without T**2: the mixture there is
    ``logsumexp([log p + log(1 - beta), log q + log beta])``.
    """
    temperature = case.keywords["temperature"]
    z = case["logits"].clone().requires_grad_()
    log_p = F.log_softmax(z / temperature, 1)
    log_q = F.log_softmax(case["teacher_logits"] / temperature, 1)
    weight = torch.tensor(beta, dtype=torch.float64)
    mixture = torch.stack([log_p + torch.log1p(-weight), log_q + weight.log()]).logsumexp(0)
    of_teacher = F.kl_div(mixture, log_q, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, log_p, reduction="none", log_target=True)
    js = (beta * of_teacher + (1 - beta) * of_student).sum() / len(z)
    result = evaluate(case.with_keywords(divergence="js", beta=beta))
    assert_accurate(result.kl, js.detach())
    (grad,) = torch.autograd.grad(0.3 * temperature**2 * js, z)
    assert_accurate(result.grads["logits"], grad)


@every_loss
@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_rows(
    backend: str, loss: str, reduction: str, dtype: torch.dtype, class_weights: bool
) -> None:
    case = BUILDERS[loss](
        6,
        9,
        dtype,
        reduction=reduction,
        class_weights=class_weights,
        ignored=2,
        label_smoothing=0.1,
    )
    assert_follows_definition(weighted(case))


@pytest.mark.parametrize("class_weights", [False, True])
def test_a_weight_repeats_its_row(backend: str, class_weights: bool) -> None:
    """A row of weight 3 counts like three of weight 1."""
    case = distillation_case(4, 6, torch.float64, class_weights=class_weights)
    repeats = torch.tensor([1, 3, 2, 1])
    weighted = evaluate(case.with_keywords(row_weight=repeats.double()))
    repeated = {name: case[name].repeat_interleave(repeats, 0) for name in case.tensors}
    outcome = evaluate(case.with_tensors(**repeated))
    for part in ("loss", "ce", "kl"):
        assert_accurate(getattr(weighted, part), getattr(outcome, part))


def test_whatever_weighs_an_ignored_row(backend: str) -> None:
    case = distillation_case(4, 6)
    case["target"][1] = -100
    row_weight = torch.tensor([0.5, torch.nan, 2.0, 1.0])
    assert torch.isfinite(evaluate(case.with_keywords(row_weight=row_weight)).loss)


MIXED = ("distillation_loss", "similarity_loss", "introspective_loss")


@pytest.mark.parametrize("loss", MIXED)
@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_probabilities(
    backend: str,
    loss: str,
    reduction: str,
    dtype: torch.dtype,
    label_smoothing: float,
    class_weights: bool,
) -> None:
    case = BUILDERS[loss](
        6,
        9,
        dtype,
        reduction=reduction,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
    )
    case = mixed(case)
    assert_follows_definition(case)
    assert_follows_definition(weighted(case))


@pytest.mark.parametrize("loss", MIXED)
def test_probabilities_of_one_class_are_that_class(backend: str, loss: str) -> None:
    case = BUILDERS[loss](5, 7, torch.float64, class_weights=loss == "none")
    one_hot = F.one_hot(case["target"], 7).double()
    by_class, by_probability = evaluate(case), evaluate(case.with_tensors(target=one_hot))
    for part in ("loss", "ce", "kl"):
        assert_accurate(getattr(by_probability, part), getattr(by_class, part))
    assert_accurate(by_probability.grads["logits"], by_class.grads["logits"])


def test_probabilities_of_explained_classes(backend: str) -> None:
    """The mixture is of the classes that are explained; the cross entropy of all."""
    case = introspective_case(5, 8, torch.float64, explained=4)
    assert_follows_definition(mixed(case))


def test_a_masked_class_with_a_probability_costs_infinity(backend: str) -> None:
    case = mixed(distillation_case(3, 5, torch.float64, reduction="none"))
    logits = case["logits"].clone()
    logits[1, 0] = -torch.inf
    case["target"][2, 3] = 0
    logits[2, 3] = -torch.inf
    result = evaluate(case.with_tensors(logits=logits))
    assert result.ce.isinf().tolist() == [False, True, False]


def test_split_labels_need_a_class(backend: str) -> None:
    case = mixed(BUILDERS["similarity_loss"](3, 5, label_mode="split"))
    with pytest.raises(ValueError, match="label_mode must be 'softmax' where target holds class"):
        evaluate(case)


def cross_entropy_samples() -> list[Any]:
    """PyTorch's own calls of ``F.cross_entropy`` that this package's losses can make."""
    (info,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    return [
        sample
        for sample in info.sample_inputs("cpu", torch.float64, requires_grad=False)
        if sample.input.dim() > 1 and sample.input.numel() > 0
    ]


def test_cross_entropy_is_that_of_torch(backend: str) -> None:
    """On PyTorch's own samples, of class indices and of probabilities."""
    kinds = {"indices": 0, "probabilities": 0, "more dimensions": 0}
    for sample in cross_entropy_samples():
        logits, (target,), options = sample.input, sample.args, sample.kwargs
        expected = F.cross_entropy(logits, target, **options)
        result = ik.distillation_loss(
            logits, torch.randn_like(logits), target, ce_weight=1.0, kl_weight=0.0, **options
        )
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
        kinds["probabilities" if target.is_floating_point() else "indices"] += 1
        kinds["more dimensions"] += logits.dim() > 2
    assert kinds == {"indices": 11, "probabilities": 10, "more dimensions": 6}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mixes", [False, True])
def test_more_dimensions(backend: str, reduction: str, mixes: bool) -> None:
    """``[B, C, H, W]`` as in segmentation, from memory of either order."""
    case = distillation_case(2 * 3 * 4, 5, reduction=reduction)
    shaped: dict[str, Tensor] = {
        name: case[name].reshape(2, 3, 4, 5).movedim(-1, 1) for name in ("logits", "teacher_logits")
    }
    shaped["target"] = case["target"].reshape(2, 3, 4)
    if mixes:
        shaped["target"] = torch.softmax(torch.randn(2, 5, 3, 4), 1)
        case = case.with_tensors(target=shaped["target"].movedim(1, -1).reshape(-1, 5))
    row_weight = torch.rand(2, 3, 4)
    image = case.with_tensors(**shaped).with_keywords(row_weight=row_weight)
    rows = evaluate(case.with_keywords(row_weight=row_weight.flatten()))
    for tensors in (shaped, {name: tensor.contiguous() for name, tensor in shaped.items()}):
        outcome = evaluate(image.with_tensors(**tensors))
        assert outcome.loss.shape == ((2, 3, 4) if reduction == "none" else ())
        for part in ("loss", "ce", "kl"):
            assert torch.equal(getattr(outcome, part).flatten(), getattr(rows, part).flatten())
        grad = outcome.grads["logits"].movedim(1, -1).reshape(-1, 5)
        assert torch.equal(grad, rows.grads["logits"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_target(backend: str, reduction: str) -> None:
    """Where the cross entropy has no weight nobody needs a target, and its part is NaN."""
    case = distillation_case(5, 7, ce_weight=0.0, reduction=reduction)
    expected, outcome = evaluate(case), evaluate(case.with_tensors(target=None))
    assert torch.equal(outcome.loss, expected.loss)
    assert torch.equal(outcome.kl, expected.kl)
    assert torch.equal(outcome.grads["logits"], expected.grads["logits"])
    assert outcome.ce.isnan().all()
    with pytest.raises(TypeError, match="target must be a torch.Tensor, got None"):
        evaluate(case.with_tensors(target=None).with_keywords(ce_weight=0.5))


@every_divergence
@every_loss
def test_gradients_are_those_of_the_loss(
    backend: str, loss: str, divergence: dict[str, Any]
) -> None:
    case = weighted(BUILDERS[loss](3, 4, torch.float64, **divergence))
    if loss in HEADS:
        pytest.skip("its explanations are constants, which numerical differentiation moves")
    names = case.differentiable

    def function(*leaves: Tensor) -> Tensor:
        moved = case.with_tensors(**dict(zip(names, leaves, strict=True)))
        result = getattr(ik, loss)(*moved.arguments(), **moved.keywords)
        assert isinstance(result, Tensor)
        return result

    leaves = [case[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves)


@every_divergence
def test_compiled(backend: str, divergence: dict[str, Any]) -> None:
    case = weighted(mixed(distillation_case(4, 6, **divergence)))
    teacher, target = case["teacher_logits"], case["target"]

    def loss(logits: Tensor) -> Tensor:
        result = ik.distillation_loss(logits, teacher, target, **case.keywords)
        assert isinstance(result, Tensor)
        return result

    expected = evaluate(case)
    logits = case["logits"].clone().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(compiled, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(compiled, logits)[0], expected.grads["logits"])


@pytest.mark.parametrize(
    "options", [{}, {"weight": True}, {"label_smoothing": 1.0}, {"label_smoothing": 0.1}], ids=str
)
def test_masked_classes_of_mixtures(backend: str, options: dict[str, Any]) -> None:
    """No gradient, and infinity where they have a probability; rows without any class too."""
    case = distillation_case(4, 6, torch.float64, reduction="none", **options | {"weight": None})
    logits = case["logits"].clone()
    logits[0, 2] = -torch.inf
    logits[1, 3] = -torch.inf
    logits[2] = -torch.inf
    target = torch.full((4, 6), 1 / 6, dtype=torch.float64)
    target[1] = torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    case = case.with_tensors(logits=logits, target=target)
    if options.get("weight"):
        weight = torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64)
        case = case.with_keywords(weight=weight)
    result, expected = evaluate(case), defined(case)
    for part in ("loss", "ce", "kl"):
        assert_accurate(getattr(result, part), getattr(expected, part))
    assert_accurate(result.grads["logits"], expected.grads["logits"])
    assert result.ce.isinf().tolist() == [True, False, True, False]


def test_probabilities_made_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        target = torch.softmax(torch.randn(4, 6), 1)
    logits = torch.randn(4, 6, requires_grad=True)
    loss = ik.distillation_loss(logits, torch.zeros(4, 6), target)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize(
    ("class_index", "error", "message"),
    [
        ([[0, 1, 1], [0, 1, 2]], ValueError, "each class once"),
        ([[0, 1, 9], [0, 1, 2]], IndexError, "is 9, outside"),
        ([[0, -1, 3], [0, 1, 2]], IndexError, "is -1, outside"),
    ],
)
def test_classes_of_a_mixture(
    backend: str, class_index: list[list[int]], error: type[Exception], message: str
) -> None:
    target, index = torch.full((2, 6), 1 / 6), torch.tensor(class_index)
    with pytest.raises(error, match=message):
        ik.introspective_loss(
            torch.zeros(2, 6), target, torch.ones(2, 3, 4), torch.ones(2, 4), class_index=index
        )


def test_freed_weights_of_rows() -> None:
    weight = torch.ones(4)
    weight.untyped_storage().resize_(0)
    target = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="row_weight must have memory"):
        ik.distillation_loss(torch.zeros(4, 6), torch.zeros(4, 6), target, row_weight=weight)
