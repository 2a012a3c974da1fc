"""Models with several inputs, and explanations at the output of a module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explain_models import (
    CLASSES,
    TOKENS,
    WIDTH,
    assert_close,
    cnn,
    dense_stats,
    images,
    resnet,
    token_transformer,
    tokens,
    transformer,
    vectors,
)
from torch import Tensor, nn

from introkernels.explain import IntegratedGradients, class_explanation_stats
from introkernels.types import ExplanationStats

METHODS = ["exact", "projection", "sketch"]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def assert_method_close(
    stats: ExplanationStats, expected: ExplanationStats, method: str, tolerance: float = 1e-12
) -> None:
    """Only the dots of other methods than exact are exact."""
    if method != "exact":
        stats = stats._replace(sq_norms=expected.sq_norms)
    assert_close(stats, expected, tolerance)


class Two(nn.Module):
    """Takes images and vectors, and tokens or a number that are not explained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.of_images = nn.Linear(72, 6)
        self.of_vectors = nn.Linear(TOKENS * WIDTH, 6)
        self.of_tokens = nn.Embedding(11, 6)
        self.last = nn.Linear(6, CLASSES)

    def forward(
        self, pixels: Tensor, tokens: Tensor, vectors: Tensor, scale: float = 1.0
    ) -> Tensor:
        hidden = self.of_images(pixels.flatten(1)) * self.of_tokens(tokens).mean(1)
        return self.last((scale * hidden + self.of_vectors(vectors.flatten(1)).sin()).tanh())


def two_inputs() -> tuple[tuple[Any, ...], Tensor]:
    return (images()[0], tokens()[0], vectors()[0], 0.5), images()[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
def test_floating_inputs_are_explained_as_one_vector(method: Any, center: bool, jvp: Any) -> None:
    inputs, target = two_inputs()
    model = Two().double()
    pixels, ids, sequence, scale = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (pixels, sequence)]
    logits = model(leaves[0], ids, leaves[1], scale)
    explanations = torch.stack(
        [
            torch.cat(
                [
                    (gradient * leaf).flatten(1)
                    for gradient, leaf in zip(
                        torch.autograd.grad(logits[:, c].sum(), leaves, retain_graph=True),
                        leaves,
                        strict=True,
                    )
                ],
                1,
            ).detach()
            for c in range(CLASSES)
        ],
        1,
    )
    found, stats = class_explanation_stats(
        model, inputs, target, method=method, center=center, jvp=jvp
    )
    assert found.equal(logits)
    assert_method_close(stats, dense_stats(explanations, target, center), method)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_different_precision(method: Any) -> None:
    (pixels, ids, sequence, _), target = two_inputs()

    class Mixed(Two):
        def forward(self, pixels: Tensor, tokens: Tensor, vectors: Tensor, scale: float) -> Tensor:
            return super().forward(pixels.double(), tokens, vectors, scale)

    model = Mixed().double()
    rounded = pixels.float()
    keywords: dict[str, Any] = {"method": method, "generator": seeded()}
    _, expected = class_explanation_stats(
        model, (rounded.double(), ids, sequence, 1.0), target, **keywords
    )
    keywords["generator"] = seeded()
    _, stats = class_explanation_stats(model, (rounded, ids, sequence, 1.0), target, **keywords)
    assert stats.dots.dtype == torch.float64
    # Gradients to float32 inputs are rounded to float32.
    assert_close(stats, expected, 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_tuple_of_one_is_the_tensor_itself(method: Any) -> None:
    inputs, target = images()
    results = [
        class_explanation_stats(cnn(), given, target, method=method, generator=seeded())[1]
        for given in (inputs, (inputs,))
    ]
    assert results[0].dots.equal(results[1].dots)
    assert results[0].sq_norms.equal(results[1].sq_norms)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_is_passed_on(method: Any) -> None:
    inputs, target = vectors()
    padding = torch.arange(TOKENS) >= torch.tensor([[5], [4], [3], [5], [2], [1]])
    model = transformer().eval()
    _, masked = class_explanation_stats(model, (inputs, padding), target, method=method)
    _, plain = class_explanation_stats(model, (inputs, None), target, method=method)
    assert not masked.dots.allclose(plain.dots)
    _, exact = class_explanation_stats(model, (inputs, padding), target)
    assert_method_close(masked, exact, method)


@pytest.mark.parametrize("method", METHODS)
def test_one_baseline_for_each_explained_input(method: Any) -> None:
    inputs, target = two_inputs()
    pixels, _, sequence, _ = inputs
    model = Two().double()
    explainer = IntegratedGradients(2, (pixels.flip(-1), 0.25))
    _, stats = class_explanation_stats(model, inputs, target, method=method, explainer=explainer)
    _, expected = class_explanation_stats(
        model,
        inputs,
        target,
        explainer=IntegratedGradients(2, (pixels.flip(-1), torch.full_like(sequence, 0.25))),
    )
    assert_method_close(stats, expected, method)
    _, other = class_explanation_stats(
        model, inputs, target, explainer=IntegratedGradients(2, (0.25, pixels.mean()))
    )
    assert not other.dots.allclose(expected.dots)


def test_inputs_that_are_unused_add_nothing() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = cnn()

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.model(first)

    inputs, target = images()
    _, expected = class_explanation_stats(cnn(), inputs, target)
    for jvp in ("forward", "double_backward"):
        for method in ("exact", "projection"):
            _, stats = class_explanation_stats(
                First(), (inputs, inputs.exp()), target, method=method, jvp=jvp
            )
            assert_method_close(stats, expected, method)


@pytest.mark.parametrize("at", ["0", "3", "3.norms.0", "5.convolutions.1", "6", "7"])
@pytest.mark.parametrize("method", METHODS)
def test_the_rest_of_the_model_explained_at_a_module(at: str, method: Any) -> None:
    inputs, target = images()
    model = resnet().eval()
    caught: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        caught.append(output)

    handle = model.get_submodule(at).register_forward_hook(keep)
    logits = model(inputs)
    handle.remove()
    (features,) = caught
    explanations = torch.stack(
        [
            (torch.autograd.grad(logits[:, c].sum(), features, retain_graph=True)[0] * features)
            .flatten(1)
            .detach()
            for c in range(CLASSES)
        ],
        1,
    )
    found, stats = class_explanation_stats(resnet(), inputs, target, method=method, at=at)
    assert found.requires_grad
    assert_method_close(stats, dense_stats(explanations, target), method)


def test_the_features_of_the_head_are_what_the_head_explains() -> None:
    inputs, target = images()
    model = cnn().eval()
    _, at_features = class_explanation_stats(model, inputs, target, at="6")
    _, head = class_explanation_stats(model, inputs, target, method="head")
    assert_close(head, at_features, 1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("explainer", ["gradient", "integrated_gradients", "smoothgrad"])
def test_tokens_with_every_explainer(method: Any, explainer: str) -> None:
    """A token model at its embedding is the model of vectors at what the embedding gives."""
    inputs, target = tokens()
    model = token_transformer().eval()
    keywords: dict[str, Any] = {"explainer": explainer, "method": method, "probes": 2}
    _, stats = class_explanation_stats(
        model, inputs, target, at="embedding", generator=seeded(), **keywords
    )
    embedded = model.embedding(inputs).detach()
    model.embedding = nn.Identity()
    _, expected = class_explanation_stats(model, embedded, target, generator=seeded(), **keywords)
    assert_close(stats, expected, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_logits_train_what_is_before_the_module(method: Any) -> None:
    inputs, target = tokens()
    for training in (False, True):
        model = token_transformer().train(training)
        logits, _ = class_explanation_stats(model, inputs, target, method=method, at="embedding")
        logits.sum().backward()
        assert model.embedding.weight.grad is not None
        assert model.embedding.weight.grad.norm() > 0
        assert not model.embedding._forward_hooks


class Overwriting(nn.Module):
    """Writes to its input, so that a pass that got another's would start from another."""

    def __init__(self) -> None:
        super().__init__()
        self.model = cnn()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs.mul_(1.5).add_(0.1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("explainer", ["gradient_x_input", "integrated_gradients", "smoothgrad"])
@pytest.mark.parametrize("jvp", ["forward", "double_backward", "finite_difference"])
def test_a_model_that_writes_to_its_input(method: Any, explainer: str, jvp: Any) -> None:
    class Plain(Overwriting):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs * 1.5 + 0.1)

    inputs, target = images()
    keywords: dict[str, Any] = {"method": method, "explainer": explainer, "probes": 2, "jvp": jvp}
    _, expected = class_explanation_stats(
        Plain().eval(), inputs, target, generator=seeded(), **keywords
    )
    _, stats = class_explanation_stats(
        Overwriting().eval(), inputs.clone(), target, generator=seeded(), **keywords
    )
    assert_close(stats, expected, 1e-9 if jvp == "finite_difference" else 1e-12)


class Recurring(nn.Module):
    """Runs one module twice, another one never, and has modules with outputs of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(WIDTH, WIDTH).double()
        self.never = nn.Linear(WIDTH, WIDTH).double()
        self.recurrent = nn.GRU(WIDTH, CLASSES, batch_first=True).double()
        self.named = Named()
        self.counted = Counted()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.named(self.twice(self.twice(inputs)))["hidden"]
        return self.recurrent(hidden)[0][:, -1] + self.counted(hidden)


class Named(nn.Module):
    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"hidden": inputs}


class Counted(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs > 0).sum((1, 2))[:, None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("recurrant", r"at must name a module of the model, such as 'recurrent'.*got 'recurrant'"),
        ("", r"at must name a module of the model, such as 'twice'.*got ''"),
        ("twice", "at='twice' must name a module that runs once in a forward pass"),
        ("never", "at='never' names a module that did not run"),
        ("named", "at='named' must name a module that returns a tensor or a tuple, got dict"),
        ("counted", r"the output of at='counted' must hold a floating tensor \[6, \*S\].*int64"),
    ],
)
def test_modules_that_cannot_be_explained(method: Any, at: str, message: str) -> None:
    inputs, target = vectors()
    model = Recurring()
    with pytest.raises(ValueError, match=message):
        class_explanation_stats(model, inputs, target, method=method, at=at)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_module_with_a_tuple_as_output(method: Any) -> None:
    """Of a recurrent layer's outputs, the one with the batch first is explained."""
    inputs, target = vectors()
    model = Recurring()
    _, stats = class_explanation_stats(model, inputs, target, method=method, at="recurrent")
    output = model.recurrent(model.twice(model.twice(inputs)))[0][:, -1].detach()
    # Each class is one feature of the last output: explanations of different classes share nothing.
    own = output.square()
    is_target = nn.functional.one_hot(target, CLASSES)
    torch.testing.assert_close(stats.dots, own * is_target, rtol=1e-12, atol=1e-14)
    if method == "exact":
        torch.testing.assert_close(stats.sq_norms, own, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((), TypeError, "inputs must be a torch.Tensor or a tuple that holds one"),
        ((1, None), TypeError, "inputs must be a torch.Tensor or a tuple that holds one, got 1"),
        ((tokens()[0],), TypeError, r"inputs must be floating.*at='name of a module'"),
        ((tokens()[0], torch.ones(3, 2)), TypeError, "inputs must be floating"),
    ],
)
def test_tuples_without_anything_to_explain(
    inputs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        class_explanation_stats(transformer(), inputs, tokens()[1])


def test_the_head_is_not_explained_at_a_module() -> None:
    inputs, target = images()
    with pytest.raises(ValueError, match="at must be None with method='head'"):
        class_explanation_stats(cnn(), inputs, target, method="head", at="6")
