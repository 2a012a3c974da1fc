"""The methods side by side on one batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from explain_models import CLASSES, cnn, images, resnet, token_transformer, tokens
from torch import Tensor, nn

from introkernels.explain import (
    METHODS,
    MethodAgreement,
    MethodComparison,
    class_explanation_stats,
    compare_methods,
    similarities,
)


def compare(model: nn.Module, inputs: Any, target: Tensor, **keywords: Any) -> MethodComparison:
    generator = torch.Generator().manual_seed(5)
    return compare_methods(model, inputs, target, repeats=1, generator=generator, **keywords)


def row_of(comparison: MethodComparison, method: str) -> MethodAgreement:
    (row,) = (row for row in comparison.rows if row.method == method)
    return row


def test_exact_agrees_with_itself_and_sketch_nearly_so() -> None:
    inputs, target = images()
    comparison = compare(resnet(), inputs, target, probes=32)
    assert tuple(row.method for row in comparison.rows) == METHODS
    exact, sketch = row_of(comparison, "exact"), row_of(comparison, "sketch")
    assert exact.correlation == pytest.approx(1, abs=1e-12)
    assert exact.mean_absolute_error == 0
    assert exact.same_top_class == 1
    assert 0.95 < sketch.correlation < 1
    assert 0 < sketch.mean_absolute_error < 0.1


def test_agreement_by_hand() -> None:
    inputs, target = images(rows=12)
    target[3] = -100
    comparison = compare(cnn(), inputs, target)
    found: dict[str, Tensor] = {}
    _, stats = class_explanation_stats(cnn().eval(), inputs, target)
    found["exact"] = similarities(stats, target)
    found["projection"] = similarities(stats, target, similarity="projection")
    others = torch.ones(12, CLASSES, dtype=torch.bool)
    others[torch.arange(12), target.clamp(min=0)] = False
    others[3] = False

    row = row_of(comparison, "projection")
    pairs = torch.stack([found["projection"][others], found["exact"][others]])
    assert row.correlation == pytest.approx(float(torch.corrcoef(pairs)[0, 1]), abs=1e-12)
    assert row.mean_absolute_error == pytest.approx(float((pairs[0] - pairs[1]).abs().mean()))
    tops = [found[m].masked_fill(~others, -2).argmax(1) for m in ("projection", "exact")]
    same = (tops[0] == tops[1]) & others.any(1)
    assert row.same_top_class == pytest.approx(float(same.sum()) / 11)
    assert row.same_top_class < 1


def test_chosen_classes_are_compared_by_their_numbers() -> None:
    """Not by their columns, in which another method may have another class."""
    inputs, target = images()
    model = cnn().eval()
    comparison = compare(model, inputs, target, top_k=2, methods=["projection"])
    assert [row.method for row in comparison.rows] == ["exact", "projection"]
    _, stats = class_explanation_stats(model, inputs, target, top_k=2)
    exact = similarities(stats, target)[:, 1:]
    projection = similarities(stats, target, similarity="projection")[:, 1:]
    row = row_of(comparison, "projection")
    error = float((exact - projection).abs().mean())
    assert row.mean_absolute_error == pytest.approx(error, abs=1e-12)
    assert row_of(comparison, "exact").correlation == pytest.approx(1, abs=1e-12)


class WithoutRunningStatistics(nn.Sequential):
    """Refused by the methods that need rows by themselves, and without a Linear layer."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Softplus())


def test_a_method_that_refuses_says_so_in_its_row() -> None:
    inputs, target = images()
    comparison = compare(WithoutRunningStatistics().double(), inputs, target)
    exact, *others = comparison.rows
    assert exact.note == ""
    assert exact.correlation == pytest.approx(1)
    for row in others:
        assert math.isnan(row.correlation)
        assert math.isnan(row.mean_absolute_error)
        assert math.isnan(row.same_top_class)
        assert math.isnan(row.seconds)
    for row in others[:2]:
        assert "BatchNorm2d '0' computes with the statistics of the batch" in row.note
    assert "needs a model whose logits are the output of an nn.Linear layer" in others[2].note
    assert comparison.recommended == "exact"


def test_what_exact_refuses_is_an_error() -> None:
    inputs, target = images()
    with pytest.raises(IndexError, match=r"target\[0\] is 9"):
        compare(cnn(), inputs, target.fill_(9))
    with pytest.raises(ValueError, match="top_k must be in"):
        compare(cnn(), inputs, images()[1], top_k=CLASSES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["exact", "lime"]}, ValueError, "methods must be .*'exact', .* got 'lime'"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
        ({"repeats": 2.0}, TypeError, r"repeats must be an int, got 2\.0"),
        ({"target": torch.ones(6, CLASSES)}, TypeError, "target must be int64, got float32"),
    ],
)
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs, target = images()
    arguments = {"model": cnn(), "inputs": inputs, "target": target, **changes}
    with pytest.raises(error, match=message):
        compare_methods(**arguments)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_it_was(training: bool) -> None:
    inputs, target = images()
    model = cnn().train(training)
    model[1].eval()
    reference = copy.deepcopy(model)
    torch.manual_seed(6)
    random_numbers = torch.get_rng_state()
    buffers = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
    compare(model, inputs, target)
    assert torch.get_rng_state().equal(random_numbers)
    assert not inputs.requires_grad
    for name, (buffer, version) in buffers.items():
        assert model.get_buffer(name) is buffer
        assert buffer._version == version
    for name, value in reference.state_dict().items():
        assert model.state_dict()[name].equal(value), name
    assert all(parameter.grad is None for parameter in model.parameters())
    for got, wanted in zip(model.modules(), reference.modules(), strict=True):
        assert got.training == wanted.training
        assert vars(got).keys() == vars(wanted).keys()


def test_the_fastest_of_those_that_agree_is_recommended() -> None:
    inputs, target = images()
    for keywords in ({}, {"probes": 64}, {"methods": ["head"]}, {"methods": ["projection"]}):
        comparison = compare(cnn(), inputs, target, **keywords)
        good = [row for row in comparison.rows if row.correlation >= 0.95]
        assert comparison.recommended == min(good, key=lambda row: row.seconds).method


def test_methods_share_the_dropout_mask_of_the_training_pass() -> None:
    inputs, target = images()
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, CLASSES)).double()
    torch.manual_seed(6)
    comparison = compare(model, inputs, target, mode="train")
    _, stats = class_explanation_stats(model, inputs, target, mode="train")
    error = similarities(stats, target) - similarities(stats, target, similarity="projection")
    # The target itself is not compared.
    wanted = float(error.abs().sum()) / (len(target) * (CLASSES - 1))
    row = row_of(comparison, "projection")
    assert row.mean_absolute_error == pytest.approx(wanted, abs=1e-12)


def test_keywords_that_do_not_concern_head_do_not_stop_it() -> None:
    inputs, target = tokens()
    comparison = compare(token_transformer(), inputs, target, at="embedding", mode="eval")
    assert row_of(comparison, "head").note == "explains the last layer's features, not the input"
    assert 0 < row_of(comparison, "sketch").correlation <= 1
    assert all(row.correlation == row.correlation for row in comparison.rows)


class Workspace(nn.Module):
    """Makes large tensors on the way to its logits, one after the other or all at once."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps

    def forward(self, inputs: Tensor) -> Tensor:
        kept = []
        for _ in range(8):
            kept.append(torch.ones(250_000, dtype=torch.float32))
            if not self.keeps:
                kept.pop()
        return inputs * 2


@pytest.mark.parametrize(("keeps", "megabytes"), [(False, 1), (True, 8)])
def test_memory_is_that_of_the_tensors_alive_at_once(keeps: bool, megabytes: int) -> None:
    inputs, target = torch.ones(2, 3), torch.tensor([0, 1])
    comparison = compare(Workspace(keeps), inputs, target, methods=["exact"])
    (row,) = comparison.rows
    # The rest is a handful of tensors with 6 numbers, and the target's.
    assert megabytes * 1e6 <= row.memory_bytes <= megabytes * 1e6 + 2000


class Table(nn.Module):
    """Looks up a few of many weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1_000_000))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight[:3]


def test_memory_of_the_model_is_not_counted() -> None:
    inputs, target = torch.ones(2, 3), torch.tensor([0, 1])
    for row in compare(Table(), inputs, target, methods=["projection"]).rows:
        assert 0 < row.memory_bytes <= 2000
        assert row.seconds > 0


def test_as_a_table() -> None:
    comparison = MethodComparison(
        (
            MethodAgreement("exact", 1.0, 0.0, 1.0, 0.1234, 12_300_000, ""),
            MethodAgreement("sketch", 0.98765, 0.0123, 0.9, 0.0211, 1_000_000, ""),
            MethodAgreement("head", *(math.nan,) * 4, 0, "no"),
        ),
        "sketch",
    )
    assert str(comparison).splitlines() == [
        "method  correlation  mean error  same top     ms    MB",
        "exact         1.000       0.000     100 %  123.4  12.3",
        "sketch        0.988       0.012      90 %   21.1   1.0",
        "head            nan         nan     nan %    nan   0.0  no",
        "recommended: sketch",
    ]


@pytest.mark.usefixtures("process_group")
def test_wrapped_models() -> None:
    inputs, target = images()
    model = nn.parallel.DistributedDataParallel(cnn())
    comparison = compare(model, inputs, target)
    plain = compare(cnn(), inputs, target)
    for got, wanted in zip(comparison.rows[:3], plain.rows[:3], strict=True):
        assert got.correlation == wanted.correlation
