"""The loss modules: the functions, with their keywords remembered."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from helpers.cases import BUILDERS, Case, introspective_case
from helpers.oracle import evaluate
from torch import Tensor, nn

import introkernels as ik

MODULES: dict[str, type[nn.Module]] = {
    "introspective_loss": ik.IntrospectiveLoss,
    "linear_introspective_loss": ik.LinearIntrospectiveLoss,
    "linear_distillation_loss": ik.LinearDistillationLoss,
    "similarity_loss": ik.SimilarityLoss,
    "distillation_loss": ik.DistillationLoss,
}
KEYWORDS: dict[str, Any] = {
    "temperature": 2.5,
    "similarity_temperature": 0.3,
    "ce_weight": 0.4,
    "kl_weight": 0.8,
    "similarity": "projection",
    "label_mode": "split",
    "non_target_mass": 0.25,
    "center": True,
    "ignore_index": -7,
    "label_smoothing": 0.05,
    "reduction": "sum",
}
# All that a call takes beside the tensors of the batch.
CALL_ONLY = {"class_index", "row_weight"}


def class_weight_name(function: str) -> str:
    return "class_weight" if function.startswith("linear") else "weight"


def keywords_of(function: str) -> dict[str, Any]:
    """Values of :data:`KEYWORDS` that the function takes, none of them its default."""
    parameters = inspect.signature(getattr(ik, function)).parameters
    return {name: value for name, value in KEYWORDS.items() if name in parameters}


def case_of(function: str, **keywords: Any) -> Case:
    """A case without the keywords that its builder leaves in, which belong to the module."""
    case = BUILDERS[function](6, 5, ignored=1, ignore_index=-7, **keywords)
    return Case(function, case.tensors, {}, case.differentiable)


def call(module: nn.Module, case: Case) -> Any:
    return module(*case.arguments())


@pytest.mark.parametrize("function", MODULES)
def test_keywords_and_defaults_are_those_of_the_function(function: str) -> None:
    def keywords(signature: inspect.Signature) -> dict[str, Any]:
        return {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if parameter.kind == inspect.Parameter.KEYWORD_ONLY
        }

    of_function = keywords(inspect.signature(getattr(ik, function)))
    of_module = keywords(inspect.signature(MODULES[function].__init__))
    assert of_module == {n: v for n, v in of_function.items() if n not in CALL_ONLY}


@pytest.mark.parametrize("function", MODULES)
def test_defaults_are_those_of_the_specification(function: str) -> None:
    expected = {
        "temperature": 4.0, "similarity_temperature": 1.0, "ce_weight": 0.7, "kl_weight": 0.3,
        "similarity": "cosine", "label_mode": "softmax", "non_target_mass": 0.1, "center": False,
        "weight": None, "class_weight": None, "ignore_index": -100, "label_smoothing": 0.0,
        "reduction": "mean", "class_index": None, "return_parts": False,
        "divergence": "forward_kl", "beta": 0.5, "row_weight": None,
    }  # fmt: skip
    for functions in (ik, ik.reference):
        for name, parameter in inspect.signature(getattr(functions, function)).parameters.items():
            if parameter.kind == inspect.Parameter.KEYWORD_ONLY:
                assert parameter.default == expected[name], name


@pytest.mark.parametrize("function", MODULES)
def test_result_and_gradients_are_those_of_the_function(backend: str, function: str) -> None:
    case, class_weights = case_of(function), torch.rand(5) + 0.1
    keywords = keywords_of(function) | {class_weight_name(function): class_weights}
    expected = evaluate(case.with_keywords(**keywords))

    leaves = [case[name].requires_grad_() for name in case.differentiable]
    loss = call(MODULES[function](**keywords), case)
    assert torch.equal(loss, expected.loss)
    for grad, name in zip(torch.autograd.grad(loss, leaves), case.differentiable, strict=True):
        assert torch.equal(grad, expected.grads[name])


def test_explained_classes_are_an_argument_of_the_call(backend: str) -> None:
    case = introspective_case(6, 5, explained=3)
    loss = ik.IntrospectiveLoss()(*case.arguments(), case.keywords["class_index"])
    assert torch.equal(loss, ik.introspective_loss(*case.arguments(), **case.keywords))


@pytest.mark.parametrize("function", MODULES)
def test_keywords_are_attributes_that_may_change(backend: str, function: str) -> None:
    case, module = case_of(function), MODULES[function](ignore_index=-7)
    for name, value in keywords_of(function).items():
        assert hasattr(module, name)
        setattr(module, name, value)
    expected = getattr(ik, function)(*case.arguments(), **keywords_of(function))
    assert torch.equal(call(module, case), expected)


@pytest.mark.parametrize("function", MODULES)
def test_attribute_changed_to_a_bad_value_is_explained_by_the_call(function: str) -> None:
    module = MODULES[function]()
    module.temperature = -1.0
    with pytest.raises(ValueError, match=r"temperature must be in \[0.05, 100\], got -1.0"):
        call(module, case_of(function))


BAD_KEYWORDS: list[tuple[str, Any, type[Exception]]] = [
    ("temperature", 0.0, ValueError),
    ("temperature", "4", TypeError),
    ("similarity_temperature", -1.0, ValueError),
    ("ce_weight", -0.1, ValueError),
    ("kl_weight", float("nan"), ValueError),
    ("similarity", "dot", ValueError),
    ("label_mode", "hard", ValueError),
    ("non_target_mass", 1.5, ValueError),
    ("center", 1, TypeError),
    ("ignore_index", 0.5, TypeError),
    ("label_smoothing", -0.1, ValueError),
    ("reduction", "batchmean", ValueError),
    ("return_parts", "yes", TypeError),
]


@pytest.mark.parametrize("function", MODULES)
@pytest.mark.parametrize(("name", "value", "error"), BAD_KEYWORDS)
def test_bad_keyword_raises_in_the_constructor(
    function: str, name: str, value: Any, error: type[Exception]
) -> None:
    parameters = inspect.signature(MODULES[function].__init__).parameters
    if name in parameters:
        with pytest.raises(error, match=f"{name} must"):
            MODULES[function](**{name: value})
    else:
        with pytest.raises(TypeError, match=name):
            MODULES[function](**{name: value})


@pytest.mark.parametrize("function", MODULES)
def test_bad_class_weights_raise_in_the_constructor(function: str) -> None:
    name = class_weight_name(function)
    for bad in ([1.0, 2.0], torch.arange(5)):
        with pytest.raises(TypeError, match=f"{name} must be"):
            MODULES[function](**{name: bad})


@pytest.mark.parametrize("function", MODULES)
def test_positional_keywords_are_refused(function: str) -> None:
    with pytest.raises(TypeError, match="positional"):
        MODULES[function](4.0)


@pytest.mark.parametrize("function", MODULES)
def test_class_weights_are_a_buffer(function: str) -> None:
    name, class_weights = class_weight_name(function), torch.rand(5)
    module = MODULES[function](**{name: class_weights})
    assert dict(module.named_buffers()).keys() == {name}
    assert not list(module.parameters())
    assert torch.equal(module.state_dict()[name], class_weights)
    assert getattr(module.to(torch.float64), name).dtype == torch.float64
    assert getattr(module.to("meta"), name).device.type == "meta"

    other = MODULES[function](**{name: torch.zeros(5)})
    other.load_state_dict({name: class_weights})
    assert torch.equal(getattr(other, name), class_weights)
    assert MODULES[function]().state_dict() == {}


@pytest.mark.parametrize("function", MODULES)
def test_class_weights_may_be_replaced(backend: str, function: str) -> None:
    name, class_weights = class_weight_name(function), torch.rand(5) + 0.1
    case, module = case_of(function), MODULES[function](ignore_index=-7)
    setattr(module, name, class_weights)
    expected = getattr(ik, function)(*case.arguments(), ignore_index=-7, **{name: class_weights})
    assert torch.equal(call(module, case), expected)
    assert name in module.state_dict()


@pytest.mark.parametrize("function", MODULES)
def test_representation_shows_every_keyword(function: str) -> None:
    keywords = keywords_of(function)
    text = repr(MODULES[function](**keywords))
    assert text.startswith(MODULES[function].__name__ + "(")
    for name, value in keywords.items():
        assert f"{name}={value!r}" in text


@pytest.mark.parametrize("function", MODULES)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_the_same_loss(backend: str, function: str, way: str) -> None:
    keywords = keywords_of(function) | {class_weight_name(function): torch.rand(5) + 0.1}
    module = MODULES[function](**keywords).eval()
    module.kl_weight = 0.55
    if way == "deepcopy":
        copied = copy.deepcopy(module)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    case = case_of(function)
    assert torch.equal(call(copied, case), call(module, case))
    assert copied.kl_weight == 0.55
    assert not copied.training
    copied.kl_weight = 0.1
    assert module.kl_weight == 0.55


def parts_add_up(parts: ik.LossParts, ce_weight: float, kl_weight: float, T: float) -> None:
    recomputed = ce_weight * parts.ce.double() + kl_weight * T**2 * parts.kl.double()
    torch.testing.assert_close(parts.loss.double(), recomputed, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("function", MODULES)
def test_parts(backend: str, function: str, reduction: str) -> None:
    """Hard and soft loss apart, unweighted, for logs; the loss is what the call alone gives."""
    case = case_of(function)
    leaf = case[case.differentiable[0]].requires_grad_()
    keywords = keywords_of(function) | {"reduction": reduction, "label_smoothing": 0.0}
    parts = call(MODULES[function](**keywords, return_parts=True), case)
    assert isinstance(parts, ik.LossParts)
    parts_add_up(parts, 0.4, 0.8, 2.5)
    assert parts.loss.shape == parts.ce.shape == parts.kl.shape
    assert parts.loss.dtype == parts.ce.dtype == parts.kl.dtype == torch.float32
    assert (parts.loss.requires_grad, parts.ce.requires_grad, parts.kl.requires_grad) == (
        True, False, False,
    )  # fmt: skip
    assert torch.equal(parts.loss, call(MODULES[function](**keywords), case))
    (grad,) = torch.autograd.grad(parts.loss.sum(), leaf)
    assert grad.abs().max() > 0


@pytest.mark.parametrize("function", ["introspective_loss", "similarity_loss", "distillation_loss"])
def test_cross_entropy_part_is_that_of_torch(backend: str, function: str) -> None:
    """Nothing is added to it in silence, and it does not depend on the loss's weights."""
    case, class_weights = case_of(function), torch.rand(5) + 0.1
    keywords = {"ignore_index": -7, "label_smoothing": 0.1, "weight": class_weights}
    expected = torch.nn.functional.cross_entropy(case["logits"], case["target"], **keywords)
    for ce_weight in (0.0, 0.3, 1.0):
        module = MODULES[function](ce_weight=ce_weight, return_parts=True, **keywords)
        parts = call(module, case)
        torch.testing.assert_close(parts.ce, expected, rtol=1e-6, atol=0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)
        self.criterion = ik.DistillationLoss(weight=torch.rand(5))

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        logits = self.layer(inputs)
        return self.criterion(logits, torch.zeros_like(logits), target)


def test_loss_inside_of_a_model(backend: str) -> None:
    model, inputs, target = Model(), torch.randn(4, 7), torch.arange(4)
    model(inputs, target).backward()
    assert model.layer.weight.grad is not None
    assert "criterion.weight" in model.state_dict()
    assert [name for name, _ in model.named_parameters()] == ["layer.weight", "layer.bias"]
    double = model.double()
    assert double(inputs.double(), target).dtype == torch.float64
