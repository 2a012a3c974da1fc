"""Explaining under autocast, without gradients, and inside what others wrap around a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain_models import CLASSES, assert_close, cnn, images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from introkernels.explain import JVPS, METHODS, class_explanation_stats, similarities


def explain(model: nn.Module, inputs: Tensor, target: Tensor, **keywords: Any) -> Any:
    """class_explanation_stats with the same random signs at each call."""
    generator = torch.Generator().manual_seed(1)
    return class_explanation_stats(model, inputs, target, generator=generator, **keywords)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_without_gradient_mode(method: Any, training: bool, context: Any) -> None:
    inputs, target = images()
    model = cnn().train(training)
    keywords: dict[str, Any] = {"method": method, "mode": "eval"}
    _, expected = explain(copy.deepcopy(model), inputs, target, **keywords)
    with context():
        # Made here, so that they are inference tensors under inference_mode.
        inputs, target = inputs.clone(), target.clone()
        logits, stats = explain(model, inputs, target, **keywords)
    assert not logits.requires_grad
    assert_close(stats, expected, 1e-13)


@pytest.mark.parametrize("method", ["exact", "projection", "sketch"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_the_caller_through_the_inputs(method: Any, training: bool) -> None:
    inputs, target = images()
    model = cnn().train(training)
    source = inputs.clone().requires_grad_()
    seen: list[Tensor] = []
    scaled = source * 2
    scaled.register_hook(seen.append)
    logits, stats = explain(model, scaled, target, method=method, chunk=2)
    assert seen == []
    assert source.grad is None
    logits.sum().backward()
    assert len(seen) == 1
    assert source.grad is not None
    assert source.grad.equal(2 * seen[0])
    _, expected = explain(cnn().eval(), inputs * 2, target, method=method)
    assert_close(stats, expected, 1e-13)


@pytest.mark.parametrize("jvp", JVPS)
@pytest.mark.parametrize("method", ["exact", "projection", "sketch"])
def test_a_model_that_writes_to_its_input_does_not_write_to_the_callers(
    method: Any, jvp: Any
) -> None:
    inputs, target = torch.tensor([[1.0, -2.0]]), torch.tensor([0])
    model = nn.Sequential(nn.ReLU(inplace=True)).eval()
    _, stats = class_explanation_stats(model, inputs, target, method=method, jvp=jvp)
    assert inputs.tolist() == [[1.0, -2.0]]
    assert stats.dots.tolist() == [[1.0, 0.0]]
    assert stats.sq_norms.tolist() == [[1.0, 1.0 if method == "projection" else 0.0]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_reaches_the_explanation_and_not_the_training(method: Any, training: bool) -> None:
    inputs, target = images(torch.float32)
    model = cnn(torch.float32).train(training)
    model[3].p = 0.0
    plain = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(inputs)
    F.cross_entropy(expected.float(), target).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, stats = explain(model, inputs, target, method=method)
    assert logits.dtype == torch.bfloat16
    assert logits.equal(expected)
    assert stats.dots.dtype == torch.float32
    F.cross_entropy(logits.float(), target).backward()
    for got, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is not None
        assert got.grad.equal(reference.grad)
    if not training:
        _, in_float32 = explain(copy.deepcopy(plain), inputs, target, method=method)
        # Another network than the float32 one, and close to it.
        assert not stats.dots.equal(in_float32.dots)
        if method != "sketch":  # whose differences of random numbers are further from each other
            assert_close(stats, in_float32, 0.05)
        error = similarities(stats, target) - similarities(in_float32, target)
        assert error.square().mean().sqrt() < 0.05


class InFloat32(nn.Module):
    """Leaves autocast for its one layer, and remembers whether weights cast here would stay."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(72, CLASSES)
        self.caches: list[bool] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.caches.append(torch.is_autocast_cache_enabled())
        with torch.autocast("cpu", enabled=False):
            return self.linear(F.dropout(torch.tanh(inputs.flatten(1)), 0.2, self.training))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_ends_with_the_forward_pass(method: Any, training: bool) -> None:
    inputs, target = images(torch.float32)
    model = InFloat32().train(training)
    keywords: dict[str, Any] = {"method": method, "mode": "eval", "probes": 2}
    _, expected = explain(model, inputs, target, **keywords)
    model.caches.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, stats = explain(model, inputs, target, **keywords)
    assert stats.dots.equal(expected.dots)
    assert stats.sq_norms.equal(expected.sq_norms)
    # Only the training forward may fill the cache.
    products = {"exact": 0, "projection": 1, "sketch": 3, "head": 0}[method]
    if training:
        assert model.caches == [False] * (1 + products) + [True]
    else:
        assert model.caches == [True] + [False] * products


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("exact", "eval"),
        ("exact", "train"),
        ("projection", "eval"),
        ("sketch", "eval"),
        ("head", "eval"),
        ("head", "train"),
    ],
)
def test_a_compiled_model_is_explained_uncompiled(method: Any, mode: Any) -> None:
    compilations = 0

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    inputs, target = images()
    model = cnn()
    model[3].p = 0.0
    keywords: dict[str, Any] = {"method": method, "mode": mode, "chunk": 2}
    _, expected = explain(copy.deepcopy(model), inputs, target, **keywords)
    compiled = torch.compile(model, backend=backend)
    logits, stats = explain(compiled, inputs, target, **keywords)
    # The training forward of mode "eval" is not explained, so it is compiled.
    assert compilations == (1 if mode == "eval" else 0)
    assert_close(stats, expected, 1e-13)
    logits.sum().backward()
    assert model[0].weight.grad is not None
    compiled(inputs)
    assert compilations == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["exact", "projection", "sketch"])
def test_a_scripted_model(method: Any) -> None:
    inputs, target = images()
    model = torch.jit.script(cnn())
    plain = cnn()
    plain(inputs)
    _, expected = explain(cnn(), inputs, target, method=method)
    _, stats = explain(model, inputs, target, method=method)
    assert_close(stats, expected, 1e-13)
    assert all(module.training for module in model.modules())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-14, atol=1e-15)


def test_train_and_eval_of_the_model_are_not_called() -> None:
    """They may do more than set flags, such as merge low-rank weights, which nothing undoes."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("train() was called")

    inputs, target = images()
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), Merging(72, CLASSES).double())
    for method in METHODS:
        class_explanation_stats(model, inputs, target, method=method, mode="eval")
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("method", ["exact", "projection", "sketch"])
def test_activation_checkpoints_are_recomputed_in_the_explained_state(method: Any) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, inputs: Tensor) -> Tensor:
            result = checkpoint(self.inner, inputs, use_reentrant=False)
            assert isinstance(result, Tensor)
            return result

    inputs, target = images()
    _, expected = explain(cnn(), inputs, target, method=method)
    model = Checkpointed(cnn())
    plain = copy.deepcopy(model)
    plain(inputs)
    _, stats = explain(model, inputs, target, method=method)
    assert_close(stats, expected, 1e-13)
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value), name


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("method", "mode", "training"),
    [
        ("exact", "eval", True),
        ("exact", "train", True),
        ("projection", "eval", True),
        ("sketch", "eval", True),
        ("sketch", "eval", False),
        ("head", "train", True),
    ],
)
def test_a_distributed_model(method: Any, mode: Any, training: bool) -> None:
    passes: list[str] = []
    keywords: dict[str, Any] = {"method": method, "mode": mode}
    inputs, target = images()
    model = cnn().train(training)
    model[3].p = 0.0
    _, expected = explain(copy.deepcopy(model), inputs, target, **keywords)
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(inputs), target).backward()
    distributed = nn.parallel.DistributedDataParallel(model)
    distributed.register_forward_hook(lambda *arguments: passes.append("distributed"))
    logits, stats = explain(distributed, inputs, target, **keywords)
    F.cross_entropy(logits, target).backward()
    # The wrapper sees the training forward only: its own would broadcast the buffers once more.
    assert passes == ["distributed"]
    assert_close(stats, expected, 1e-13)
    for got, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, reference.grad, rtol=1e-12, atol=1e-14)
    for got, reference in zip(model.buffers(), plain.buffers(), strict=True):
        assert got.equal(reference)
