"""Tensors of any strides and sizes, and nothing ever written to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cases import (
    BUILDERS,
    HEADS,
    WITH_LABELS,
    Case,
    distillation_case,
    introspective_case,
    linear_case,
)
from helpers.oracle import assert_follows_definition, defined, evaluate
from torch import Tensor

import introkernels as ik

INF = float("inf")


def filler(tensor: Tensor) -> float | int:
    """What stands around a view: nothing that a right kernel could read unnoticed."""
    return float("nan") if tensor.is_floating_point() else -(2**40)


def transposed(tensor: Tensor) -> Tensor:
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def every_third(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1]), filler(tensor))
    view = wide[..., 1::3]
    return view.copy_(tensor)


def offset_rows(tensor: Tensor) -> Tensor:
    """Rows that start at odd addresses and don't touch."""
    padded = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), filler(tensor))
    view = padded[..., 1:-2]
    return view.copy_(tensor)


def unaligned(tensor: Tensor) -> Tensor:
    buffer = tensor.new_full((tensor.numel() + 1,), filler(tensor))
    view = buffer[1:].view(tensor.shape)
    return view.copy_(tensor)


def expanded_first(tensor: Tensor) -> Tensor:
    return tensor[:1].clone().expand(tensor.shape)


def expanded_last(tensor: Tensor) -> Tensor:
    return tensor[..., :1].clone().expand(tensor.shape)


def expanded_scalar(tensor: Tensor) -> Tensor:
    return tensor.flatten()[0].clone().expand(tensor.shape)


LAYOUTS = (transposed, every_third, offset_rows, unaligned)
EXPANSIONS = (expanded_first, expanded_last, expanded_scalar)

CASES: dict[str, Callable[[], Case]] = {
    "distillation": lambda: distillation_case(
        5, 9, class_weights=True, reduction="none", label_smoothing=0.1
    ),
    "similarity": lambda: BUILDERS["similarity_loss"](
        5, 9, class_weights=True, explained=4, reduction="none"
    ),
    "introspective": lambda: introspective_case(
        5, 9, shape=(3, 4, 5), class_weights=True, reduction="none"
    ),
    "introspective-explained": lambda: introspective_case(
        5, 9, shape=(33,), explained=4, center=True, reduction="none"
    ),
    "introspective-half": lambda: introspective_case(5, 9, torch.bfloat16, shape=(37,)),
    "linear": lambda: linear_case(5, 9, width=19, class_weights=True, reduction="none"),
    "linear-half": lambda: linear_case(5, 9, torch.bfloat16, width=19),
}


def tensors_of(case: Case) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in (case.tensors | case.keywords).items()
        if isinstance(tensor, Tensor)
    }


def laid_out(case: Case, name: str, layout: Callable[[Tensor], Tensor]) -> Case:
    if name in case.tensors:
        return case.with_tensors(**{name: layout(case[name])})
    return case.with_keywords(**{name: layout(case[name])})


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", CASES)
def test_strides_of_each_tensor(
    backend: str, name: str, layout: Callable[[Tensor], Tensor]
) -> None:
    case = CASES[name]()
    for argument in tensors_of(case):
        assert_follows_definition(laid_out(case, argument, layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", CASES)
def test_strides_of_all_tensors(
    backend: str, name: str, layout: Callable[[Tensor], Tensor]
) -> None:
    case = CASES[name]()
    for argument in tensors_of(case):
        case = laid_out(case, argument, layout)
    assert_follows_definition(case)


@pytest.mark.parametrize("expansion", EXPANSIONS, ids=lambda expansion: expansion.__name__)
@pytest.mark.parametrize("name", CASES)
def test_expanded_tensors(backend: str, name: str, expansion: Callable[[Tensor], Tensor]) -> None:
    case = CASES[name]()
    for argument in tensors_of(case):
        # Expanded class indices would no longer name each class once; equal classes of a head
        # have a test of their own.
        if argument in ("class_index", "stats_index", "target"):
            continue
        if argument == "weight" and case.function in HEADS:
            continue
        assert_follows_definition(laid_out(case, argument, expansion))


@pytest.mark.parametrize("expansion", EXPANSIONS, ids=lambda expansion: expansion.__name__)
def test_expanded_weight_of_a_head(backend: str, expansion: Callable[[Tensor], Tensor]) -> None:
    case = laid_out(linear_case(5, 9, width=19, reduction="none"), "weight", expansion)
    actual, expected = evaluate(case), defined(case)
    # Equal classes get gradients that add up to 0 in the features: only rounding is left of them.
    rounding = 2e-6 * float(case["weight"].abs().max()) * 9
    for name, grad in expected.grads.items():
        torch.testing.assert_close(actual.grads[name].double(), grad, rtol=2e-6, atol=rounding)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=0)


def test_expanded_target(backend: str) -> None:
    for build in (distillation_case, linear_case):
        case = build(5, 9)
        assert_follows_definition(laid_out(case, "target", expanded_scalar))


@pytest.mark.parametrize("function", BUILDERS)
def test_incoming_gradient_of_any_layout(backend: str, function: str) -> None:
    case = BUILDERS[function](6, 5, reduction="none", ignored=1)
    for incoming in (
        torch.tensor(1.5).expand(6),
        every_third(torch.randn(6)),
        unaligned(torch.randn(6)),
        torch.zeros(6),
    ):
        expected = evaluate(case, grad_loss=incoming.clone(memory_format=torch.contiguous_format))
        actual = evaluate(case, grad_loss=incoming)
        for name, grad in expected.grads.items():
            assert torch.equal(actual.grads[name], grad)


@pytest.mark.parametrize("function", BUILDERS)
def test_sum_over_rows_gives_an_expanded_incoming_gradient(backend: str, function: str) -> None:
    case = BUILDERS[function](6, 5, reduction="none", ignored=1)
    leaf = case[case.differentiable[0]].requires_grad_()
    loss = getattr(ik, function)(*case.arguments(), **case.keywords)
    (by_rows,) = torch.autograd.grad(loss.sum(), leaf)
    summed = getattr(ik, function)(*case.arguments(), **{**case.keywords, "reduction": "sum"})
    (at_once,) = torch.autograd.grad(summed, leaf)
    assert torch.equal(by_rows, at_once)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(2, -1).contiguous().movedim(-1, 2)


def with_gaps(tensor: Tensor, *dims: int) -> Tensor:
    """The same numbers, every other one along dimensions of a larger tensor."""
    wide = tensor
    index = [slice(None)] * tensor.dim()
    for dim in dims:
        wide = wide.repeat_interleave(2, dim)
        index[dim] = slice(1, None, 2)
    view = wide[tuple(index)]
    wide.fill_(filler(tensor))
    return view.copy_(tensor)


GRADIENT_LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((3, 4, 5), lambda g: g),
    "channels last": ((3, 4, 5), channels_last),
    "channels last 3d": ((2, 3, 4, 5), channels_last),
    "gaps between columns": ((3, 4, 5), lambda g: with_gaps(g, 4)),
    "gaps between rows and columns": ((3, 4, 5), lambda g: with_gaps(g, 3, 4)),
    "gaps between classes": ((3, 4, 5), lambda g: with_gaps(g, 1)),
    "gaps between channels": ((3, 40, 41), lambda g: with_gaps(g, 2)),
    "transposed image": ((3, 4, 5), lambda g: g.mT.contiguous().mT),
    "expanded columns": ((3, 4, 5), lambda g: g[..., :1].expand_as(g)),
    "expanded classes": ((3, 4, 5), lambda g: g[:, :1].expand_as(g)),
    "one dimension": ((7,), lambda g: g),
    "one dimension with gaps": ((70,), lambda g: with_gaps(g, 2)),
    "no dimension": ((), lambda g: g),
    "empty": ((3, 0, 5), lambda g: g),
    "single pixels": ((3, 1, 1), channels_last),
    "longer than a slice": ((3, 25, 70), channels_last),
    "longer than a segment": ((3, 75, 151), channels_last),
}


# Classes whose gradients are all the same have nothing left to compare once their mean is gone.
@pytest.mark.parametrize(
    ("layout", "center"),
    [
        *((layout, False) for layout in GRADIENT_LAYOUTS),
        *((layout, True) for layout in GRADIENT_LAYOUTS if layout != "expanded classes"),
    ],
)
def test_layouts_of_gradients(backend: str, layout: str, center: bool) -> None:
    shape, arrange = GRADIENT_LAYOUTS[layout]
    case = introspective_case(2, 6, shape=shape, center=center)
    gradients = arrange(case["gradients"])
    assert gradients.shape == case["gradients"].shape
    assert_follows_definition(case.with_tensors(gradients=gradients))
    # The inputs in that order too, beside contiguous gradients.
    inputs = arrange(case["inputs"].unsqueeze(1)).squeeze(1)
    assert_follows_definition(case.with_tensors(inputs=inputs))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", BUILDERS)
def test_no_rows(backend: str, function: str, reduction: str) -> None:
    """Nothing summed is 0, and its mean is NaN, as for ``F.cross_entropy``."""
    outcome = assert_follows_definition(BUILDERS[function](0, 5, reduction=reduction))
    if reduction == "none":
        assert outcome.loss.shape == (0,)
    else:
        assert torch.equal(outcome.loss.isnan(), torch.tensor(reduction == "mean"))
        assert reduction == "mean" or outcome.loss == 0
    for grad in outcome.grads.values():
        assert torch.equal(grad, torch.zeros_like(grad))


def test_statistics_of_no_rows(backend: str) -> None:
    stats = ik.explanation_stats(
        torch.empty(0, 5, 2, 3), torch.empty(0, 2, 3), torch.empty(0, dtype=torch.int64)
    )
    assert stats.dots.shape == stats.sq_norms.shape == (0, 5)
    labels = ik.soft_labels(stats, torch.empty(0, dtype=torch.int64))
    assert labels.shape == (0, 5)


@pytest.mark.parametrize("label_mode", ["softmax", "split"])
@pytest.mark.parametrize("function", BUILDERS)
def test_one_class(backend: str, function: str, label_mode: str) -> None:
    """A single class is certain: the loss and its gradient are 0."""
    keywords: dict[str, Any] = {} if function not in WITH_LABELS else {"label_mode": label_mode}
    outcome = assert_follows_definition(BUILDERS[function](4, 1, **keywords))
    assert outcome.loss == 0
    for grad in outcome.grads.values():
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2), ()], ids=str)
@pytest.mark.parametrize("center", [False, True])
def test_empty_and_scalar_explanations(backend: str, shape: tuple[int, ...], center: bool) -> None:
    case = introspective_case(4, 5, shape=shape, center=center, ignored=1)
    assert_follows_definition(case)
    stats = ik.explanation_stats(case["gradients"], case["inputs"], case["target"], center=center)
    assert stats.dots.shape == (4, 5)
    if 0 in shape:
        assert not stats.dots.any()
        assert not stats.sq_norms.any()


def test_head_without_features(backend: str) -> None:
    """A head of width 0 has its bias for logits."""
    assert_follows_definition(linear_case(4, 5, width=0, ignored=1))
    assert_follows_definition(linear_case(4, 5, width=0, bias=False))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3), (0, 3), (2, 0)], ids=str)
def test_leading_dimensions_of_features(
    backend: str, leading: tuple[int, ...], reduction: str
) -> None:
    rows = math.prod(leading)
    case = linear_case(rows, 5, ignored=min(rows, 1), reduction=reduction)
    shaped = case.with_tensors(
        features=case["features"].reshape(*leading, -1 if rows else 17),
        target=case["target"].reshape(leading),
    )
    flat, outcome = evaluate(case), evaluate(shaped)
    assert outcome.loss.shape == (leading if reduction == "none" else ())
    torch.testing.assert_close(
        outcome.loss.reshape(flat.loss.shape), flat.loss, rtol=0, atol=0, equal_nan=True
    )
    assert outcome.grads["features"].shape == shaped["features"].shape
    for name, grad in flat.grads.items():
        assert torch.equal(outcome.grads[name].reshape(grad.shape), grad)


def test_features_that_can_not_be_viewed_as_rows(backend: str) -> None:
    case = linear_case(6, 5)
    features = case["features"].reshape(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1)
    shaped = case.with_tensors(features=features, target=case["target"].reshape(2, 3))
    expected = evaluate(case)
    actual = evaluate(shaped)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.grads["features"].reshape(6, -1), expected.grads["features"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("function", BUILDERS)
def test_arguments_are_never_written_to(backend: str, function: str, reduction: str) -> None:
    explained = (
        {} if function not in ("similarity_loss", "introspective_loss") else {"explained": 3}
    )
    case = BUILDERS[function](6, 5, ignored=1, class_weights=True, reduction=reduction, **explained)
    if "logits" in case.tensors:
        case["logits"][1, 2] = -INF
    copies = {name: tensor.clone() for name, tensor in tensors_of(case).items()}
    versions = {name: tensor._version for name, tensor in tensors_of(case).items()}
    incoming = torch.rand(6 if reduction == "none" else ())
    kept = incoming.clone()
    evaluate(case, grad_loss=incoming)
    if function == "introspective_loss":
        ik.explanation_stats(
            case["gradients"], case["inputs"], case["target"],
            class_index=case.keywords["class_index"], center=True,
        )  # fmt: skip
    for name, tensor in tensors_of(case).items():
        # As bytes, so that a zero whose sign changed would show.
        assert torch.equal(tensor.view(torch.uint8), copies[name].view(torch.uint8)), name
        assert tensor._version == versions[name], name
    assert torch.equal(incoming, kept)
    assert incoming._version == 0


@pytest.mark.parametrize("function", BUILDERS)
def test_kept_graph_gives_the_same_gradient_again(backend: str, function: str) -> None:
    case = BUILDERS[function](6, 5, ignored=1)
    leaves = [case[name].requires_grad_() for name in case.differentiable]
    loss = getattr(ik, function)(*case.arguments(), **case.keywords)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for ours, again in zip(first, second, strict=True):
        assert torch.equal(ours, again)
        assert ours.data_ptr() != again.data_ptr()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_losses_that_share_their_logits_add_up(backend: str) -> None:
    """Logits stay as they are for whatever else reads them, before or after."""
    first = introspective_case(6, 5)
    second = distillation_case(6, 5).with_tensors(logits=first["logits"])
    logits = first["logits"].clone().requires_grad_()
    scaled = 2 * logits
    total = (
        ik.introspective_loss(*first.with_tensors(logits=scaled).arguments())
        + ik.distillation_loss(*second.with_tensors(logits=scaled).arguments())
        + scaled.exp().sum()
    )
    total.backward()
    doubled = 2 * first["logits"]
    separate = sum(
        evaluate(case.with_tensors(logits=doubled)).grads["logits"] for case in (first, second)
    )
    torch.testing.assert_close(logits.grad, 2 * (separate + doubled.exp()))


@pytest.mark.parametrize("function", BUILDERS)
def test_changing_a_saved_tensor_in_place_raises(backend: str, function: str) -> None:
    case = BUILDERS[function](6, 5, class_weights=True)
    for name, tensor in tensors_of(case).items():
        # Of explanations the teacher logits are kept, which no one else can change.
        if name in ("gradients", "inputs", "dots", "sq_norms"):
            continue
        leaves = [case[each].detach().requires_grad_() for each in case.differentiable]
        tensors = dict(zip(case.differentiable, leaves, strict=True))
        changed = case.with_tensors(**tensors)
        loss = getattr(ik, function)(*changed.arguments(), **changed.keywords)
        with torch.no_grad():
            tensor.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_explanations_may_change_or_go_after_the_forward(backend: str) -> None:
    """The backward needs their statistics only, so they are not kept alive."""
    case = introspective_case(6, 5, shape=(50,))
    expected = evaluate(case).grads["logits"]
    logits = case["logits"].requires_grad_()
    loss = ik.introspective_loss(logits, case["target"], case["gradients"], case["inputs"])
    storages = [case[name].untyped_storage() for name in ("gradients", "inputs")]
    case["gradients"].fill_(float("nan"))
    case["inputs"].fill_(float("nan"))
    for storage in storages:
        storage.resize_(0)
    loss.backward()
    assert torch.equal(logits.grad, expected)
