"""Explanation passes see one and the same model, and write to nothing of the caller's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from explain_models import (
    CLASSES,
    assert_close,
    images,
    token_transformer,
    tokens,
    transformer,
    vectors,
)
from torch import Tensor, nn

from introkernels.explain import class_explanation_stats


def rows_of(width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(6, width, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.arange(6) % CLASSES


def test_passes_after_the_training_forward_have_the_buffers_it_started_from() -> None:
    """A power iteration of the training forward changes the weight that comes of its buffers."""
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(
        normed(nn.Linear(20, 30)), nn.Tanh(), normed(nn.Linear(30, CLASSES))
    ).double()
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    inputs, target = rows_of(20)
    expected = plain(inputs)
    _, exact = class_explanation_stats(other, inputs, target, mode="train")
    logits, stats = class_explanation_stats(
        model, inputs, target, mode="train", method="projection"
    )
    assert logits.equal(expected)
    assert (stats.dots - exact.dots).norm() <= 1e-12 * exact.dots.norm()
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value), name


class Shifting(nn.Module):
    """Adds 1 to its input in place, and twice that to its second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.0)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor, counter: Tensor) -> Tensor:
        inputs += 1
        counter += 2
        return self.last(self.dropout(torch.tanh(self.first(inputs)) * counter))


@pytest.mark.parametrize(
    "keywords",
    [
        {"method": "exact"},
        {"method": "exact", "at": "first"},
        {"method": "projection", "at": "first"},
        {"method": "sketch"},
        {"method": "exact", "explainer": "integrated_gradients"},
        {"method": "head", "mode": "eval"},
    ],
)
def test_only_the_training_forward_writes_to_the_arguments(keywords: dict[str, Any]) -> None:
    inputs, target = rows_of(8)
    counter = torch.ones((), dtype=torch.int64)
    model = Shifting().double()
    expected = model(inputs.clone(), counter.clone())
    mine = inputs.clone()
    logits, _ = class_explanation_stats(model, (mine, counter), target, **keywords)
    assert logits.equal(expected)
    assert mine.equal(inputs + 1)
    assert counter.item() == 3


@pytest.mark.parametrize("method", ["exact", "projection", "sketch", "head"])
@pytest.mark.parametrize("training", [False, True])
def test_tokens_and_masks_made_in_inference_mode(method: Any, training: bool) -> None:
    model = token_transformer().train(training)
    at = None if method == "head" else "embedding"
    with torch.inference_mode():
        inputs, target = tokens()
        padding = inputs == 3
        logits, stats = class_explanation_stats(
            model, (inputs, padding), target, method=method, at=at
        )
    assert not logits.requires_grad
    _, expected = class_explanation_stats(
        model.eval(), (inputs.clone(), padding.clone()), target.clone(), method=method, at=at
    )
    if method != "head" or not training:
        assert (stats.dots - expected.dots).norm() <= 1e-12 * expected.dots.norm()


def test_finite_differences_are_of_the_function_that_has_the_gradients() -> None:
    """Without gradients, an encoder's fast path zeroes the outputs at padding."""
    inputs, target = vectors()
    padding = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    padding[:, 3:] = True
    model = transformer()
    _, exact = class_explanation_stats(model, (inputs, padding), target)
    _, stats = class_explanation_stats(
        model, (inputs, padding), target, method="projection", jvp="finite_difference"
    )
    assert (stats.dots - exact.dots).norm() <= 1e-6 * exact.dots.norm()


def test_the_strongest_classes_are_those_of_the_function_that_has_the_gradients() -> None:
    """The logits that integrated gradients choose classes by are computed without gradients."""
    inputs, target = vectors(rows=40)
    padding = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    padding[:, 2:] = True
    model = transformer()
    _, local = class_explanation_stats(model, (inputs, padding), target, top_k=1)
    _, stats = class_explanation_stats(
        model, (inputs, padding), target, top_k=1, explainer="integrated_gradients"
    )
    assert stats.class_index is not None
    assert local.class_index is not None
    assert stats.class_index.equal(local.class_index)


@pytest.mark.parametrize("explainer", ["gradient", "gradient_x_input"])
@pytest.mark.parametrize(("largest", "width"), [(1e-3, 20), (4e4, 1)])
def test_tangents_at_the_ends_of_half_precision(explainer: str, largest: float, width: int) -> None:
    """Products of these float16 numbers underflow, or lie next to the largest one, 65504."""
    inputs, target = rows_of(width)
    torch.manual_seed(0)
    model = nn.Linear(width, CLASSES)
    model.weight.data.mul_(largest / model.weight.abs().max())
    model, half = model.half(), (inputs * min(largest, 1)).half()
    _, exact = class_explanation_stats(model, half, target, explainer=explainer)
    _, stats = class_explanation_stats(
        model, half, target, explainer=explainer, method="projection", jvp="forward"
    )
    # Each product of the layer is rounded, and its sum once more.
    assert (stats.dots - exact.dots).norm() <= 2 * 2**-11 * exact.dots.norm()


def test_what_forward_mode_does_not_see_as_a_constant_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                norm = inputs.norm(dim=1, keepdim=True)
            return self.linear(inputs / norm)

    inputs, target = rows_of(8)
    model = Scaled().double()
    with pytest.raises(ValueError, match=r"torch\.no_grad\(\) \(only jvp='double_backward'"):
        class_explanation_stats(model, inputs, target, method="projection")
    _, exact = class_explanation_stats(model, inputs, target)
    _, stats = class_explanation_stats(
        model, inputs, target, method="projection", jvp="double_backward"
    )
    assert (stats.dots - exact.dots).norm() <= 1e-12 * exact.dots.norm()


class RoundedInSmallRows(torch.autograd.Function):
    """The identity, with a tangent that is off by half its size in rows of small numbers."""

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        context.save_for_forward(*inputs)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0]

    @staticmethod
    def jvp(context: Any, *tangents: Any) -> Any:
        (inputs,) = context.saved_tensors
        return tangents[0] * torch.where(inputs.abs().amax(1, keepdim=True) < 0.1, 1.5, 1)


@pytest.mark.parametrize("small", [1, 6])
def test_one_rows_rounding_does_not_refuse_the_batch(small: int) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.linear(RoundedInSmallRows.apply(inputs))

    inputs, target = rows_of(8)
    inputs[:small] /= 1000
    model = Rounded().double()
    if small < len(inputs):
        class_explanation_stats(model, inputs, target, method="projection", jvp="forward")
        return
    with pytest.raises(ValueError, match="two ways to compute the target's disagree"):
        class_explanation_stats(model, inputs, target, method="projection", jvp="forward")


class Tanh(nn.Module):
    """Writes to what it gets; a second time gives other numbers, unlike ReLU."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.tanh_()


@pytest.mark.parametrize("norm", [False, True])
def test_outputs_kept_from_pass_to_pass_are_not_those_that_the_model_wrote_to(norm: bool) -> None:
    inputs, target = images()
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)] if norm else [nn.Conv2d(2, 4, 3)]
    model = nn.Sequential(*layers, Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)).double().eval()
    of_each_way = [
        class_explanation_stats(
            model, inputs, target, method="sketch", jvp=jvp, generator=torch.Generator()
        )[1]
        for jvp in ("forward", "double_backward")
    ]
    assert_close(of_each_way[0], of_each_way[1], 1e-12)


def test_running_out_of_memory_is_no_missing_derivative() -> None:
    class Large(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            if torch.autograd.forward_ad.unpack_dual(inputs).tangent is not None:
                raise torch.OutOfMemoryError("no memory left")
            return super().forward(inputs)

    inputs, target = rows_of(8)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        class_explanation_stats(Large(8, CLASSES).double(), inputs, target, method="projection")
