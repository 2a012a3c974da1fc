"""Calls that class_explanation_stats refuses, and how it says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from explain_models import CLASSES, cnn, images
from torch import Tensor, nn

from introkernels.explain import METHODS, Gradient, class_explanation_stats


def call(**changes: Any) -> None:
    inputs, target = images()
    arguments: dict[str, Any] = {"model": cnn(), "inputs": inputs, "target": target}
    arguments |= changes
    class_explanation_stats(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": torch.sin}, TypeError, r"model must be a torch\.nn\.Module, got .*sin"),
        (
            {"inputs": [1.0]},
            TypeError,
            r"inputs must be a torch\.Tensor or a tuple that holds one, got \[1\.0\] \(list\)",
        ),
        ({"inputs": [1.0], "method": "head"}, TypeError, r"inputs must be a torch\.Tensor"),
        ({"inputs": ()}, TypeError, "a tuple that holds one, got "),
        ({"inputs": (None, 2)}, TypeError, "a tuple that holds one, got None.*, 2"),
        (
            {"inputs": torch.ones(6, 2, 6, 6, dtype=torch.int64)},
            TypeError,
            r"inputs must be floating .*got int64\[6, 2, 6, 6\] on cpu; at=.*method='head'",
        ),
        ({"inputs": torch.ones(6, 2, dtype=torch.complex64)}, TypeError, "got complex64"),
        ({"inputs": torch.tensor(1.0)}, ValueError, r"inputs must have shape \[B, \*S\]"),
        ({"target": torch.zeros(6) > 0}, TypeError, r"target must be int64, got bool\[6\]"),
        (
            {"target": torch.zeros(6)},
            ValueError,
            r"target must have shape \[6, C\] .* got float32\[6\].*indices are int64 \[6\]",
        ),
        ({"target": [0] * 6}, TypeError, r"target must be a torch\.Tensor"),
        (
            {"target": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            r"target must have shape \[6\].*got int64\[5\]",
        ),
        (
            {"target": torch.zeros(6, 1, dtype=torch.int64)},
            ValueError,
            r"target must have shape \[6\].*got int64\[6, 1\]",
        ),
        (
            {"target": torch.tensor([0, 1, CLASSES, 0, 0, 0])},
            IndexError,
            r"target\[2\] is 5, outside \[0, 5\)",
        ),
        ({"target": torch.tensor([0, -1, 0, 0, 0, 0])}, IndexError, r"target\[1\] is -1"),
        (
            {"method": "sketchy"},
            ValueError,
            "method must be one of 'exact', 'projection', 'sketch', 'head', got 'sketchy'",
        ),
        ({"method": None}, ValueError, "method must be one of .* got None"),
        ({"mode": "test"}, ValueError, "mode must be one of 'auto', 'eval', 'train', got 'test'"),
        (
            {"jvp": "reverse"},
            ValueError,
            "jvp must be one of 'auto', 'forward', 'double_backward', 'finite_difference', got",
        ),
        (
            {"explainer": "lime"},
            ValueError,
            "explainer must be one of 'gradient_x_input', .*'lime'",
        ),
        ({"explainer": Gradient}, ValueError, "or an object of one of their classes, got <class"),
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"probes": 8.0}, TypeError, r"probes must be an int, got 8\.0"),
        ({"generator": 7}, TypeError, r"generator must be a torch\.Generator, got 7"),
        ({"at": "3", "method": "head"}, ValueError, "at must be None with method='head'.* got '3'"),
        ({"at": "77"}, ValueError, "at must name a module of the model, such as '7', .*got '77'"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"chunk": 1.5}, TypeError, "chunk must be an int, got 1.5"),
        ({"top_k": 0}, ValueError, r"top_k must be in \[1, 4\].*got 0"),
        ({"top_k": CLASSES}, ValueError, r"top_k must be in \[1, 4\].*got 5"),
        ({"top_k": True}, TypeError, "top_k must be an int, got True"),
        ({"center": 1}, TypeError, "center must be True or False, got 1"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        (
            {"model": nn.Flatten(0)},
            ValueError,
            r"model must return logits of shape \[6, C\] .*got float64\[432\] on cpu",
        ),
        ({"model": nn.Flatten(2)}, ValueError, r"got float64\[6, 2, 36\]"),
        ({"model": nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (12, 36)))}, ValueError, "36"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_calls(
    changes: dict[str, Any], error: type[Exception], message: str, training: bool
) -> None:
    model = changes.get("model", cnn())
    if isinstance(model, nn.Module):
        model.train(training)
    with pytest.raises(error, match=message):
        call(**(changes | {"model": model}))


def test_target_on_another_device() -> None:
    target = torch.zeros(6, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"target must be on the device of inputs \(cpu\)"):
        call(target=target)


class Answer(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, inputs: Tensor) -> Any:
        return self.answer(inputs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: (x, x), "tuple"),
        (lambda x: {"logits": x}, "dict"),
        (lambda x: x.flatten(1).long(), "int64"),
        (lambda x: x.flatten(1)[:, :0], r"float64\[6, 0\]"),
    ],
)
def test_outputs_that_are_no_logits(answer: Any, got: str, method: Any) -> None:
    with pytest.raises(ValueError, match=rf"model must return logits .*got {got}"):
        call(model=Answer(answer), method=method)


def test_lazy_models_are_refused_and_stay_lazy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))
    with pytest.raises(ValueError, match=r"lazy parameter '1\.weight': run one forward pass"):
        call(model=model)
    assert nn.parameter.is_lazy(model[1].weight)


@pytest.mark.parametrize("changes", [{"top_k": CLASSES}, {"target": torch.full((6,), 9)}])
@pytest.mark.parametrize("method", ["exact", "projection", "sketch"])
def test_a_refused_call_changes_nothing(changes: dict[str, Any], method: str) -> None:
    """The explained pass comes first; only that of ``"head"`` is the training forward itself."""
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, IndexError)):
        call(model=model, method=method, **changes)
    for name, value in before.items():
        assert model.state_dict()[name].equal(value), name
    assert all(module.training for module in model.modules())
