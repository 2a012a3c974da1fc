"""Explaining under autocast, without gradients, and inside what others wrap around a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain_models import CLASSES, assert_close, cnn, images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from introkernels.explain import class_explanation_stats

METHODS = ["exact", "head"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_without_gradient_mode(method: Any, training: bool, context: Any) -> None:
    inputs, target = images()
    model = cnn().train(training)
    _, expected = class_explanation_stats(copy.deepcopy(model), inputs, target, method=method)
    with context():
        # Made here, so that they are inference tensors under inference_mode.
        inputs, target = inputs.clone(), target.clone()
        logits, stats = class_explanation_stats(model, inputs, target, method=method)
    assert not logits.requires_grad
    assert_close(stats, expected, 1e-13)


def test_gradients_reach_the_caller_through_the_inputs() -> None:
    inputs, target = images()
    for training in (False, True):
        model = cnn().train(training)
        source = inputs.clone().requires_grad_()
        seen: list[Tensor] = []
        scaled = source * 2
        scaled.register_hook(seen.append)
        logits, stats = class_explanation_stats(model, scaled, target, chunk=2)
        assert seen == []
        assert source.grad is None
        logits.sum().backward()
        assert len(seen) == 1
        assert source.grad is not None
        assert source.grad.equal(2 * seen[0])
        _, expected = class_explanation_stats(cnn().eval(), inputs * 2, target)
        assert_close(stats, expected, 1e-13)


def test_a_model_that_writes_to_its_input_does_not_write_to_the_callers() -> None:
    inputs, target = torch.tensor([[1.0, -2.0]]), torch.tensor([0])
    model = nn.Sequential(nn.ReLU(inplace=True)).eval()
    _, stats = class_explanation_stats(model, inputs, target)
    assert inputs.tolist() == [[1.0, -2.0]]
    assert stats.sq_norms.tolist() == [[1.0, 0.0]]


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
        logits, stats = class_explanation_stats(model, inputs, target, method=method)
    assert logits.dtype == torch.bfloat16
    assert logits.equal(expected)
    assert stats.dots.dtype == torch.float32
    F.cross_entropy(logits.float(), target).backward()
    for got, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is not None
        assert got.grad.equal(reference.grad)
    _, in_float32 = class_explanation_stats(
        copy.deepcopy(plain), inputs, target, method=method, mode="train"
    )
    if not training:
        # Another network than the float32 one, and close to it.
        assert not stats.dots.equal(in_float32.dots)
        assert_close(stats, in_float32, 0.05)


class InFloat32(nn.Module):
    """Leaves autocast for its one layer, and remembers whether weights cast here would stay."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(72, CLASSES)
        self.caches: list[bool] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.caches.append(torch.is_autocast_cache_enabled())
        with torch.autocast("cpu", enabled=False):
            return self.linear(torch.tanh(inputs.flatten(1)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_ends_with_the_forward_pass(method: Any, training: bool) -> None:
    inputs, target = images(torch.float32)
    model = InFloat32().train(training)
    _, expected = class_explanation_stats(model, inputs, target, method=method)
    model.caches.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, stats = class_explanation_stats(model, inputs, target, method=method)
    assert stats.dots.equal(expected.dots)
    assert stats.sq_norms.equal(expected.sq_norms)
    assert model.caches == ([False, True] if training else [True])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_compiled_model_is_explained_uncompiled(mode: Any) -> None:
    compilations = 0

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    inputs, target = images()
    model = cnn()
    model[3].p = 0.0
    _, expected = class_explanation_stats(copy.deepcopy(model), inputs, target, mode=mode)
    compiled = torch.compile(model, backend=backend)
    logits, stats = class_explanation_stats(compiled, inputs, target, mode=mode, chunk=2)
    # The training forward of mode "eval" is not explained, so it is compiled.
    assert compilations == (1 if mode == "eval" else 0)
    assert_close(stats, expected, 1e-13)
    logits.sum().backward()
    assert model[0].weight.grad is not None
    compiled(inputs)
    assert compilations == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model() -> None:
    inputs, target = images()
    model = torch.jit.script(cnn())
    plain = cnn()
    plain(inputs)
    _, expected = class_explanation_stats(cnn(), inputs, target)
    _, stats = class_explanation_stats(model, inputs, target)
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
    model = nn.Sequential(nn.Flatten(), Merging(72, CLASSES).double())
    class_explanation_stats(model, inputs, target)
    assert all(module.training for module in model.modules())


def test_activation_checkpoints_are_recomputed_in_the_explained_state() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, inputs: Tensor) -> Tensor:
            result = checkpoint(self.inner, inputs, use_reentrant=False)
            assert isinstance(result, Tensor)
            return result

    inputs, target = images()
    _, expected = class_explanation_stats(cnn(), inputs, target)
    model = Checkpointed(cnn())
    plain = copy.deepcopy(model)
    plain(inputs)
    _, stats = class_explanation_stats(model, inputs, target)
    assert_close(stats, expected, 1e-13)
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value), name


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_distributed_model(tmp_path: Path, mode: Any) -> None:
    passes: list[str] = []
    inputs, target = images()
    model = cnn()
    model[3].p = 0.0
    _, expected = class_explanation_stats(copy.deepcopy(model), inputs, target, mode=mode)
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(inputs), target).backward()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        distributed = nn.parallel.DistributedDataParallel(model)
        distributed.register_forward_hook(lambda *arguments: passes.append("distributed"))
        logits, stats = class_explanation_stats(distributed, inputs, target, mode=mode)
        F.cross_entropy(logits, target).backward()
    finally:
        torch.distributed.destroy_process_group()
    # The wrapper sees the training forward only: its own would broadcast the buffers once more.
    assert passes == ["distributed"]
    assert_close(stats, expected, 1e-13)
    for got, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, reference.grad, rtol=1e-12, atol=1e-14)
    for got, reference in zip(model.buffers(), plain.buffers(), strict=True):
        assert got.equal(reference)
