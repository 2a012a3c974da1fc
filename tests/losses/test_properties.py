"""Drawn calls: any shape, dtype, layout and option against the definition in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.cases import (
    BUILDERS,
    HEADS,
    Case,
    introspective_case,
    linear_case,
    random_class_index,
    random_target,
)
from helpers.oracle import assert_follows_definition
from helpers.tolerance import assert_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import introkernels as ik

NEVER = float("-inf")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "reversed", "stepped", "unaligned", "expanded")
# Equal rows of a head's weight would cancel all of the features' gradient but its rounding.
DISTINCT = ("dots", "sq_norms", "weight")

# The backend is chosen once for all examples of a test, which is what is wanted.
drawn = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

dtypes = st.sampled_from(DTYPES)
# Half types meet float32, never float64.
narrow_dtypes = st.sampled_from(DTYPES[1:])
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**32 - 1)
row_counts = st.one_of(st.integers(0, 9), st.sampled_from((17, 33)))
class_counts = st.one_of(st.integers(1, 20), st.sampled_from((31, 32, 33, 65, 130)))
shapes = st.one_of(
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
    st.integers(1, 70).map(lambda size: (size,)),
)

loss_options = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.2, 20.0),
        "ce_weight": st.one_of(st.just(0.7), st.floats(0.2, 3.0)),
        "kl_weight": st.one_of(st.just(0.0), st.just(0.3), st.floats(0.1, 3.0)),
        "label_smoothing": st.sampled_from((0.0, 0.0, 0.1, 0.5, 1.0)),
        "ignore_index": st.sampled_from((-100, -1, 0, 5)),
        "reduction": st.sampled_from(("mean", "sum", "none")),
        "class_weights": st.booleans(),
        "scale": st.sampled_from((0.5, 3.0, 10.0)),
    }
)
label_options = st.fixed_dictionaries(
    {
        "similarity_temperature": st.floats(0.2, 20.0),
        "similarity": st.sampled_from(("cosine", "projection")),
        "label_mode": st.sampled_from(("softmax", "split")),
        "non_target_mass": st.sampled_from((0.0, 0.1, 0.5, 0.99, 1.0)),
    }
)


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout; ``"expanded"`` repeats the first row by stride 0."""
    if layout == "reversed":
        dimensions = list(range(tensor.dim()))[::-1]
        return tensor.permute(dimensions).contiguous().permute(dimensions)
    if layout == "stepped" and tensor.dim():
        apart = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
        apart[..., ::2] = tensor
        return apart[..., ::2]
    if layout == "unaligned":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if layout == "expanded" and tensor.dim() and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    return tensor


def laid_out(draw: st.DrawFn, case: Case) -> Case:
    """The case with every tensor in a drawn layout; indices and statistics are not repeated."""
    tensors: dict[str, Tensor | None] = {}
    for name, tensor in case.tensors.items():
        if not isinstance(tensor, Tensor):
            tensors[name] = None
        elif tensor.is_floating_point() and name not in DISTINCT:
            tensors[name] = in_layout(tensor, draw(layouts, label=f"layout of {name}"))
        else:
            layout = draw(st.sampled_from(LAYOUTS[:-1]), label=f"layout of {name}")
            tensors[name] = in_layout(tensor, layout)
    return case.with_tensors(**tensors)


def masked(draw: st.DrawFn, case: Case) -> Case:
    """The case with some classes masked in each row, sometimes the target among them."""
    share = draw(st.sampled_from((0.0, 0.0, 0.3)), label="masked share")
    if share == 0.0:
        return case
    logits = case["logits"]
    return case.with_tensors(logits=logits.masked_fill(torch.rand(logits.shape) < share, NEVER))


def further_options(draw: st.DrawFn, loss: str, dtype: torch.dtype, classes: int) -> dict[str, Any]:
    """What one loss takes beside the options of all."""
    other = st.just(torch.float64) if dtype == torch.float64 else narrow_dtypes
    explained = st.one_of(st.none(), st.integers(1, classes))
    options: dict[str, Any] = {}
    if loss in ("distillation_loss", "linear_distillation_loss"):
        options["teacher_dtype"] = draw(other, label="teacher dtype")
    else:
        options.update(draw(label_options, label="label options"))
    if loss == "similarity_loss":
        options["stats_dtype"] = draw(st.sampled_from(DTYPES[:2]), label="stats dtype")
        options["explained"] = draw(explained, label="explained")
    elif loss == "introspective_loss":
        options["gradients_dtype"] = draw(other, label="gradients dtype")
        options["inputs_dtype"] = draw(other, label="inputs dtype")
        options["shape"] = draw(shapes, label="shape")
        options["explained"] = draw(explained, label="explained")
    if loss in HEADS:
        options["weight_dtype"] = draw(other, label="weight dtype")
        options["width"] = draw(st.integers(1, 70), label="width")
        options["bias"] = draw(st.booleans(), label="bias")
    if loss in ("introspective_loss", "linear_introspective_loss"):
        options["center"] = draw(st.booleans(), label="center")
    return options


@pytest.mark.parametrize("loss", BUILDERS)
@drawn
@given(data=st.data())
def test_losses(backend: str, loss: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(seeds, label="seed"))
    rows, classes = draw(row_counts, label="rows"), draw(class_counts, label="classes")
    dtype = draw(dtypes, label="dtype")
    options = draw(loss_options, label="options")
    options.update(further_options(draw, loss, dtype, classes))
    ignored = draw(st.integers(0, rows), label="ignored")
    case = BUILDERS[loss](rows, classes, dtype, ignored=ignored, **options)
    is_head = loss in HEADS
    case = laid_out(draw, case if is_head else masked(draw, case))
    assert_follows_definition(case)


@drawn
@given(data=st.data())
def test_statistics(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(seeds, label="seed"))
    rows, classes = draw(row_counts, label="rows"), draw(class_counts, label="classes")
    dtype = draw(dtypes, label="dtype")
    other = dtype if dtype == torch.float64 else draw(narrow_dtypes, label="inputs dtype")
    shape = draw(shapes, label="shape")
    target = random_target(rows, classes, draw(st.integers(0, rows), label="ignored"))
    index, explained = None, classes
    if draw(st.booleans(), label="class_index"):
        explained = draw(st.integers(1, classes), label="explained")
        index = random_class_index(target, classes, explained)
        index = in_layout(index, draw(st.sampled_from(LAYOUTS[:-1]), label="layout of index"))
    case = introspective_case(
        rows, explained, shape=shape, gradients_dtype=dtype, inputs_dtype=other
    )
    gradients = in_layout(case["gradients"], draw(layouts, label="layout of gradients"))
    inputs = in_layout(case["inputs"], draw(layouts, label="layout of inputs"))
    # Nothing but rounding is left of one explanation without itself.
    center = explained > 1 and draw(st.booleans(), label="center")
    stats = ik.explanation_stats(gradients, inputs, target, center=center, class_index=index)
    expected = ik.reference.explanation_stats(
        gradients.double(), inputs.double(), target, center=center, class_index=index
    )
    assert_accurate(stats.dots, expected.dots, "dots")
    assert_accurate(stats.sq_norms, expected.sq_norms, "sq_norms")


@drawn
@given(data=st.data())
def test_heads_of_any_rank(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(seeds, label="seed"))
    leading = draw(st.lists(st.integers(0, 4), max_size=3).map(tuple), label="leading")
    rows = torch.Size(leading).numel()
    classes, width = draw(class_counts, label="classes"), draw(st.integers(1, 40), label="width")
    reduction = draw(st.sampled_from(("mean", "sum", "none")), label="reduction")
    case = linear_case(rows, classes, draw(dtypes, label="dtype"), width=width, reduction=reduction)
    features = case["features"].reshape(*leading, width)
    case = case.with_tensors(
        features=in_layout(features, draw(layouts, label="layout of features")),
        target=case["target"].reshape(leading),
    )
    result = assert_follows_definition(case)
    assert result.loss.shape == (leading if reduction == "none" else ())


def test_layouts_hold_the_same_numbers() -> None:
    tensor = torch.arange(60.0).reshape(3, 4, 5)
    for layout in LAYOUTS[:-1]:
        assert torch.equal(in_layout(tensor, layout), tensor), layout
    strides = {in_layout(tensor, layout).stride() for layout in LAYOUTS}
    assert strides == {(20, 5, 1), (1, 3, 12), (40, 10, 2), (0, 5, 1)}
    assert all(
        in_layout(tensor, first).data_ptr() != in_layout(tensor, second).data_ptr()
        for first, second in itertools.combinations(("contiguous", "reversed", "stepped"), 2)
    )
