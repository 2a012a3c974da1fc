"""Statistics at the features of the last Linear layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from explain_models import CLASSES, assert_close, cnn, images
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import introkernels as ik
from introkernels.explain import class_explanation_stats
from introkernels.types import ExplanationStats


def by_definition(
    features: Tensor, weight: Tensor, target: Tensor, center: bool = False
) -> ExplanationStats:
    return ik.reference.explanation_stats(
        weight.double().expand(len(features), -1, -1), features.double(), target, center=center
    )


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_definition_at_features_in_eval_mode(
    center: bool, dtype: torch.dtype, tolerance: float
) -> None:
    inputs, target = images(dtype)
    model = cnn(dtype)
    features = copy.deepcopy(model[:-1]).double().eval()(inputs.double())
    _, stats = class_explanation_stats(
        model, inputs, target, method="head", mode="eval", center=center
    )
    assert_close(stats, by_definition(features, model[-1].weight, target, center), tolerance)
    assert stats.dots.dtype == dtype
    assert not stats.dots.requires_grad


@pytest.mark.parametrize("keywords", [{}, {"center": True}, {"top_k": 2}])
def test_equals_exact_where_the_model_is_a_linear_layer(keywords: dict[str, Any]) -> None:
    inputs, target = images()
    model = nn.Linear(72, CLASSES).double()
    _, exact = class_explanation_stats(model, inputs.flatten(1), target, **keywords)
    _, head = class_explanation_stats(model, inputs.flatten(1), target, method="head", **keywords)
    assert_close(head, exact, 1e-13)
    assert head.dots.gather(1, _at(head, target)).equal(head.sq_norms.gather(1, _at(head, target)))


def _at(stats: ExplanationStats, target: Tensor) -> Tensor:
    return (target if stats.class_index is None else torch.zeros_like(target))[:, None]


@pytest.mark.parametrize("center", [False, True])
def test_top_k_is_the_definition_on_its_classes(center: bool) -> None:
    inputs, target = images()
    model = cnn()
    _, stats = class_explanation_stats(
        model, inputs, target, method="head", mode="eval", top_k=3, center=center
    )
    assert stats.class_index is not None
    features = cnn()[:-1].eval()(inputs)
    expected = ik.reference.explanation_stats(
        model[-1].weight[stats.class_index],
        features,
        target,
        center=center,
        class_index=stats.class_index,
    )
    assert_close(stats, expected, 1e-12)


@pytest.mark.parametrize("keywords", [{}, {"mode": "train"}])
def test_train_mode_takes_the_features_of_the_training_forward(keywords: dict[str, Any]) -> None:
    """It is the default: nothing but the training forward is run."""
    inputs, target = images()
    model = cnn()
    plain = copy.deepcopy(model)
    torch.manual_seed(11)
    features = plain[:-1](inputs)
    torch.manual_seed(11)
    logits, stats = class_explanation_stats(model, inputs, target, method="head", **keywords)
    assert logits.equal(plain[-1](features))
    assert_close(stats, by_definition(features, model[-1].weight, target), 1e-12)
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value), name


def test_inputs_of_any_dtype_and_a_view_of_the_output() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.last = nn.Linear(6, 3)

        def features(self, tokens: Tensor) -> Tensor:
            return self.embedding(tokens).mean(1, keepdim=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.last(input=self.features(tokens)).squeeze(1)

    model = Text().double()
    tokens, target = torch.arange(20).reshape(4, 5) % 11, torch.tensor([0, 1, 2, 0])
    _, stats = class_explanation_stats(model, tokens, target, method="head")
    features = model.features(tokens).squeeze(1)
    assert_close(stats, by_definition(features, model.last.weight, target), 1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_parametrized_weight_is_the_one_of_the_pass(mode: Any) -> None:
    inputs, target = images()
    model = cnn()
    parametrizations.spectral_norm(model[-1])
    plain = copy.deepcopy(model)
    plain[3].p = model[3].p = 0.0
    _, stats = class_explanation_stats(model, inputs, target, method="head", mode=mode)
    explained = plain.train(mode == "train")
    features = explained[:-1](inputs)
    with torch.nn.utils.parametrize.cached():
        explained[-1](features)
        assert_close(stats, by_definition(features, explained[-1].weight, target), 1e-12)


class Scaled(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.linear(inputs)
        return logits.mul_(2) if self.in_place else logits * 2


class LowRank(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + inputs.sum()


def replaced_output() -> nn.Module:
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda module, args, output: output + 1)
    return model


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Scaled(in_place=False), "'linear' with output float32.*processed further"),
        (Scaled(in_place=True), "changed in place"),
        (LowRank(4, 3), "no Linear layer ran"),
        (replaced_output(), "the model itself with output"),
        (nn.Conv1d(2, 3, 2), "no Linear layer ran"),
    ],
    ids=["scaled", "in place", "subclass", "hook", "no linear"],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_another_end_of_the_model_is_an_error(model: nn.Module, found: str, mode: Any) -> None:
    inputs = torch.ones(2, 4)
    if isinstance(model, nn.Conv1d):
        model = nn.Sequential(nn.Unflatten(1, (2, 2)), model, nn.Flatten())
    before = {id(m): len(m._forward_hooks) for m in model.modules()}
    with pytest.raises(ValueError, match=rf"(?s){found}.*method='exact'.*linear_introspective"):
        class_explanation_stats(model, inputs, torch.tensor([0, 1]), method="head", mode=mode)
    assert {id(m): len(m._forward_hooks) for m in model.modules()} == before
