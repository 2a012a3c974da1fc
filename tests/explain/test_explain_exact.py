"""Exact statistics at the input against the dense Jacobian and against Captum."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
from explain_models import CLASSES, assert_close, cnn, dense_explanations, dense_stats, images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import introkernels as ik
from introkernels.explain import METHODS, class_explanation_stats
from introkernels.types import ExplanationStats


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_dense_jacobian_in_eval_mode(center: bool, training: bool) -> None:
    inputs, target = images()
    model = cnn().train(training)
    expected = dense_stats(dense_explanations(model, inputs), target, center)
    _, stats = class_explanation_stats(model, inputs, target, center=center)
    assert_close(stats, expected, 1e-12)
    assert stats.class_index is None
    assert stats.dots.dtype == torch.float64
    assert not stats.dots.requires_grad
    assert not stats.sq_norms.requires_grad


@pytest.mark.parametrize("center", [False, True])
def test_float32_is_as_accurate_as_the_contract_says(center: bool) -> None:
    inputs, target = images(torch.float32)
    model = cnn(torch.float32)
    expected = dense_stats(dense_explanations(model, inputs), target, center)
    _, stats = class_explanation_stats(model, inputs, target, center=center)
    assert stats.dots.dtype == stats.sq_norms.dtype == torch.float32
    assert_close(stats, expected, 2e-6)


def test_many_dimensions_accumulate_accurately() -> None:
    torch.manual_seed(0)
    model = nn.Linear(100_000, 3)
    inputs, target = torch.randn(2, 100_000), torch.tensor([2, 0])
    _, stats = class_explanation_stats(model, inputs, target)
    assert_close(stats, dense_stats(dense_explanations(model, inputs), target), 2e-6)


def test_equals_inner_products_of_captum_attributions() -> None:
    inputs, target = images()
    model = cnn().eval()
    input_x_gradient = captum.attr.InputXGradient(model)
    leaf = inputs.clone().requires_grad_()
    explanations = torch.stack(
        [input_x_gradient.attribute(leaf, target=c).detach().flatten(1) for c in range(CLASSES)], 1
    )
    _, stats = class_explanation_stats(model, inputs, target)
    assert_close(stats, dense_stats(explanations, target), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("center", [False, True])
def test_half_models_accumulate_in_float32(dtype: torch.dtype, center: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    inputs, target = torch.randn(5, 300).to(dtype), torch.tensor([0, 3, 1, 1, 2])
    _, stats = class_explanation_stats(model, inputs, target, center=center)
    leaf = inputs.clone().requires_grad_()
    logits = model(leaf)
    explained = logits - logits.mean(1, keepdim=True) if center else logits
    gradients = torch.stack(
        [torch.autograd.grad(explained[:, c].sum(), leaf, retain_graph=True)[0] for c in range(4)],
        1,
    )
    assert stats.dots.dtype == torch.float32
    # Uncentered gradients are the same half numbers; centered ones are rounded along another way.
    tolerance = 2e-6 if not center else 2 * torch.finfo(dtype).eps
    explanations = gradients.double() * inputs[:, None].double()
    assert_close(stats, dense_stats(explanations, target), tolerance)


def test_equals_the_statistics_of_a_tensor_of_gradients() -> None:
    inputs, target = images()
    model = cnn().eval()
    leaf = inputs.clone().requires_grad_()
    logits = model(leaf)
    gradients = torch.stack(
        [torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)[0] for c in range(5)], 1
    )
    _, stats = class_explanation_stats(model, inputs, target)
    expected = ik.explanation_stats(gradients, inputs, target)
    assert_close(stats, expected, 1e-12)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, CLASSES, CLASSES + 3])
def test_chunks_change_nothing(chunk: int, top_k: int | None) -> None:
    inputs, target = images()
    _, whole = class_explanation_stats(cnn(), inputs, target, top_k=top_k)
    _, chunked = class_explanation_stats(cnn(), inputs, target, top_k=top_k, chunk=chunk)
    assert_close(chunked, whole, 1e-14)


@pytest.mark.parametrize("top_k", [1, 3, CLASSES - 1])
def test_top_k_is_the_full_result_gathered(top_k: int) -> None:
    inputs, target = images()
    _, full = class_explanation_stats(cnn(), inputs, target)
    _, stats = class_explanation_stats(cnn(), inputs, target, top_k=top_k)
    index = stats.class_index
    assert index is not None
    assert index.shape == (len(inputs), top_k + 1)
    assert index.dtype == torch.int64
    assert index[:, 0].equal(target)
    assert all(len(set(row)) == top_k + 1 for row in index.tolist())
    logits = cnn().eval()(inputs)
    others = logits.scatter(1, target[:, None], -torch.inf)
    assert index[:, 1:].equal(others.argsort(1, descending=True)[:, :top_k])
    gathered = ExplanationStats(full.dots.gather(1, index), full.sq_norms.gather(1, index))
    assert_close(stats, gathered, 1e-14)


def test_top_k_centers_on_the_classes_it_explains() -> None:
    inputs, target = images()
    _, stats = class_explanation_stats(cnn(), inputs, target, top_k=2, center=True)
    index = stats.class_index
    assert index is not None
    explanations = dense_explanations(cnn(), inputs)
    some = explanations.gather(1, index[:, :, None].expand(-1, -1, explanations.shape[2]))
    assert_close(stats, dense_stats(some, torch.zeros_like(target), center=True), 1e-12)


def test_top_k_names_a_class_once_where_logits_are_minus_infinity() -> None:
    class Masked(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            logits = inputs * torch.arange(1.0, 5.0)
            return logits.masked_fill(torch.tensor([False, True, True, True]), -torch.inf)

    target = torch.tensor([0, 3])
    _, stats = class_explanation_stats(Masked(), torch.ones(2, 4), target, top_k=3)
    assert stats.class_index is not None
    assert stats.class_index[:, 0].equal(target)
    assert stats.class_index.sort(1).values.equal(torch.arange(4).expand(2, 4))


@pytest.mark.parametrize("keywords", [{}, {"top_k": 2}, {"chunk": 3}, {"center": True}])
def test_similarity_of_the_target_to_itself_is_one_to_the_last_bit(
    keywords: dict[str, Any],
) -> None:
    inputs, target = images(torch.float32)
    _, stats = class_explanation_stats(cnn(torch.float32), inputs, target, **keywords)
    at = target if stats.class_index is None else torch.zeros_like(target)
    dots, sq_norms = (t.gather(1, at[:, None]) for t in (stats.dots, stats.sq_norms))
    assert dots.equal(sq_norms)


@pytest.mark.parametrize("method", ["exact", "projection", "head"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_rows_are_zero_and_touch_no_other(
    method: Any, top_k: int | None, ignore_index: int
) -> None:
    inputs, target = images()
    target[target == 2] = 1
    inputs[1] = torch.nan
    keywords: dict[str, Any] = {"method": method, "top_k": top_k, "mode": "eval"}
    live = torch.tensor([True, False, True, True, False, True])
    _, alone = class_explanation_stats(cnn(), inputs[live], target[live], **keywords)
    target[~live] = ignore_index
    _, stats = class_explanation_stats(cnn(), inputs, target, ignore_index=ignore_index, **keywords)
    assert_close(ExplanationStats(stats.dots[live], stats.sq_norms[live]), alone, 1e-13)
    assert stats.dots[~live].eq(0).all()
    assert stats.sq_norms[~live].eq(0).all()
    if stats.class_index is not None:
        assert stats.class_index.min() >= 0
        assert stats.class_index.max() < CLASSES


def test_nan_stays_in_its_row() -> None:
    inputs, target = images()
    _, clean = class_explanation_stats(cnn(), inputs, target)
    inputs[2, 0, 0, 0] = torch.nan
    _, stats = class_explanation_stats(cnn(), inputs, target)
    others = torch.arange(len(inputs)) != 2
    assert stats.dots[2].isnan().all()
    assert stats.dots[others].equal(clean.dots[others])


@pytest.mark.parametrize("method", METHODS)
def test_no_rows(method: Any) -> None:
    inputs, target = images()
    for top_k, columns in ((None, CLASSES), (2, 3)):
        logits, stats = class_explanation_stats(
            cnn(), inputs[:0], target[:0], method=method, top_k=top_k
        )
        assert logits.shape == (0, CLASSES)
        assert stats.dots.shape == stats.sq_norms.shape == (0, columns)


def test_rows_without_dimensions_and_a_single_class() -> None:
    class Square(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs[:, None] ** 2

    inputs = torch.tensor([1.0, -3.0], dtype=torch.float64)
    _, stats = class_explanation_stats(Square(), inputs, torch.zeros(2, dtype=torch.int64))
    # E = 2 x * x
    torch.testing.assert_close(stats.sq_norms, 4 * inputs[:, None] ** 4)
    assert stats.dots.equal(stats.sq_norms)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_strides_of_the_inputs_do_not_matter(layout: str) -> None:
    inputs, target = images()
    if layout == "channels_last":
        strided = inputs.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        strided = inputs.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        strided = inputs[:1].expand_as(inputs)
        inputs = strided.contiguous()
    _, expected = class_explanation_stats(cnn(), inputs, target)
    _, stats = class_explanation_stats(cnn(), strided, target, chunk=2)
    assert_close(stats, expected, 1e-13)


class Constant(nn.Module):
    """Logits that don't depend on the inputs; with or without a graph of their own."""

    def __init__(self, requires_grad: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(3.0), requires_grad=requires_grad)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits.expand(len(inputs), 3)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("chunk", [1, 2])
def test_unused_inputs_have_zero_explanations(requires_grad: bool, chunk: int) -> None:
    _, stats = class_explanation_stats(
        Constant(requires_grad), torch.ones(2, 4), torch.tensor([0, 2]), chunk=chunk
    )
    assert stats.dots.equal(torch.zeros(2, 3))
    assert stats.sq_norms.equal(torch.zeros(2, 3))


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize(("keywords", "chunk"), [({}, 1), ({"chunk": 4}, 4), ({"top_k": 9}, 1)])
def test_memory_is_that_of_a_chunk_of_classes(keywords: dict[str, Any], chunk: int) -> None:
    rows, dimensions, classes = 8, 500, 20
    model = nn.Sequential(nn.Linear(dimensions, 4), nn.Tanh(), nn.Linear(4, classes))
    inputs, target = torch.randn(rows, dimensions), torch.arange(rows)
    with LargestTensor() as largest:
        class_explanation_stats(model, inputs, target, **keywords)
    assert largest.numel == chunk * rows * dimensions
    assert largest.numel < classes * rows * dimensions


def test_a_target_that_was_not_checked_gives_nan_in_its_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where reading targets would stall the stream."""
    monkeypatch.setattr("introkernels.checks.values_are_readable", lambda tensor: False)
    inputs, target = images()
    _, expected = class_explanation_stats(cnn(), inputs, target)
    target[3] = CLASSES
    _, stats = class_explanation_stats(cnn(), inputs, target)
    others = torch.arange(len(target)) != 3
    assert stats.dots[3].isnan().all()
    assert stats.dots[others].equal(expected.dots[others])
