"""Which Jacobian-vector products a model supports, and what happens where it lacks some."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from explain_models import CLASSES, WIDTH, transformer, vectors
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from introkernels.explain import class_explanation_stats
from introkernels.types import ExplanationStats


class Square(torch.autograd.Function):
    """Has no forward mode; may be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class SquareOnce(Square):
    """Has neither."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function], residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.residual = residual
        self.last = nn.Linear(WIDTH, CLASSES).double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.function.apply(inputs.sin())
        return self.last((hidden + inputs if self.residual else hidden).sum(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = nn.LSTM(WIDTH, 7, batch_first=True)
        self.last = nn.Linear(7, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.recurrent(inputs)[0][:, -1])


def dots(model: nn.Module, dtype: torch.dtype = torch.float64, **keywords: Any) -> Tensor:
    return class_explanation_stats(model, *vectors(dtype), **keywords)[1].dots


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert expected.norm() > 0
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("method", ["projection", "sketch"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_function_without_forward_mode_takes_double_backward(method: Any, residual: bool) -> None:
    model = Custom(Square, residual)
    with pytest.warns(UserWarning, match=r"takes 'double_backward' .*forward: .*jvp function"):
        found = dots(model, method=method)
    assert_close(found, dots(model), 1e-12)


@pytest.mark.parametrize("method", ["projection", "sketch"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_function_with_neither_takes_finite_differences(method: Any, residual: bool) -> None:
    """A derivative of ``once_differentiable`` is not missed but absent from a second one."""
    model = Custom(SquareOnce, residual)
    with pytest.warns(
        UserWarning, match=r"takes 'finite_difference' .*double_backward: .*once_differentiable"
    ):
        found = dots(model, method=method)
    assert_close(found, dots(model), 1e-9)


def test_one_warning_says_it_however_many_products() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dots(Custom(Square), method="sketch", probes=5, explainer="integrated_gradients")
    assert len([w for w in caught if "jvp='auto'" in str(w.message)]) == 1


def test_usual_models_get_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="jvp")
        dots(transformer(), method="sketch")


def test_a_way_that_was_asked_for_raises_what_pytorch_says() -> None:
    with pytest.raises(NotImplementedError, match="You must implement the jvp function"):
        dots(Custom(Square), method="projection", jvp="forward")
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dots(Custom(SquareOnce), method="projection", jvp="double_backward")


@pytest.mark.parametrize("training", [False, True])
def test_fused_recurrence(training: bool) -> None:
    """In float32 the CPU runs a fused LSTM, which has no forward mode."""
    model = Recurrent().train(training)
    expected = dots(model, torch.float32)
    with pytest.warns(UserWarning, match=r"forward: .*mkldnn_rnn_layer"):
        found = dots(model, torch.float32, method="projection")
    assert_close(found, expected, 1e-5)
    found = dots(model, torch.float32, method="projection", jvp="finite_difference")
    assert_close(found, expected, 1e-3)
    assert_close(dots(model.double(), method="projection"), dots(model.double()), 1e-12)


class Attention(TorchDispatchMode):
    """Counts calls of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += func._schema.name == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("jvp", ["forward", "double_backward"])
def test_fused_attention_is_used_where_it_can_be_and_agrees(jvp: Any) -> None:
    model = transformer().eval()
    with Attention() as attention:
        expected = dots(model)
    # The explained pass of a model in eval mode is its training forward.
    assert attention.fused >= 2
    with Attention() as projected:
        found = dots(model, method="projection", jvp=jvp)
    assert projected.fused == attention.fused
    assert_close(found, expected, 1e-12)
    with Attention() as after:
        model(vectors()[0])
    assert after.fused > 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_running_out_of_memory_is_not_another_way() -> None:
    class Exhausted(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            if torch.autograd.forward_ad._current_level >= 0:
                raise torch.OutOfMemoryError("no memory")
            return inputs.flatten(1)

    inputs, target = vectors()
    with pytest.raises(torch.OutOfMemoryError):
        class_explanation_stats(Exhausted(), inputs, target, method="projection")


def test_errors_of_the_model_name_every_way() -> None:
    class Failing(nn.Module):
        calls = 0

        def forward(self, inputs: Tensor) -> Tensor:
            type(self).calls += 1
            if self.calls > 1:
                raise RuntimeError("tired")
            return inputs.flatten(1)

    inputs, target = vectors()
    with pytest.raises(RuntimeError, match=r"forward: tired; double.*: tired; finite.*: tired"):
        class_explanation_stats(Failing(), inputs, target, method="projection")
    assert torch.autograd.forward_ad._current_level == -1


def test_statistics_are_detached_whatever_the_way() -> None:
    inputs, target = vectors()
    for jvp in ("forward", "double_backward", "finite_difference"):
        logits, stats = class_explanation_stats(
            transformer(), inputs, target, method="sketch", jvp=jvp
        )
        assert isinstance(stats, ExplanationStats)
        assert not stats.dots.requires_grad
        assert not stats.sq_norms.requires_grad
        assert torch.autograd.forward_ad.unpack_dual(logits).tangent is None
        assert logits.requires_grad
