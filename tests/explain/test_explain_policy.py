"""What explaining a model does to it: nothing, beside the training forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain_models import CLASSES, assert_close, cnn, images
from torch import Tensor, nn

from introkernels.explain import JVPS, METHODS, class_explanation_stats
from introkernels.types import ExplanationStats


class Stateful(nn.Module):
    """Changes all it can at each forward pass, whatever its mode, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("filled_later", None)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.in_place += 1
        self.replaced = self.replaced + 1
        self.filled_later = torch.ones(2)
        self.last_seen = inputs.shape
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(1))
        return F.dropout(inputs, 0.3, training=True)


class TrainOnly(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("not in eval mode")
        return inputs


def model_with_state() -> nn.Sequential:
    model = cnn()
    model.insert(0, Stateful())
    model[5].eval()  # flags differ: the second convolution is in eval mode
    return model


def state(model: nn.Module) -> dict[str, Any]:
    modules = dict(model.named_modules())
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: module.training for name, module in modules.items()},
        "attributes": {
            name: {k: v for k, v in vars(module).items() if isinstance(v, (int, tuple))}
            for name, module in modules.items()
        },
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for name, module in modules.items()
        },
        "grad": [parameter.grad for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "rng": torch.get_rng_state(),
        "autocast cache": torch.is_autocast_cache_enabled(),
    }


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got.keys() == wanted.keys()
    assert got["tensors"].keys() == wanted["tensors"].keys()
    for name, value in wanted["tensors"].items():
        assert got["tensors"][name].equal(value), name
    assert got["rng"].equal(wanted["rng"])
    for key in wanted.keys() - {"tensors", "rng"}:
        assert got[key] == wanted[key], key


@pytest.mark.parametrize(
    "keywords",
    [
        *({"method": method, "mode": "eval"} for method in METHODS),
        *({"method": method, "mode": "eval", "top_k": 2} for method in METHODS),
        {"method": "exact", "mode": "train"},
        {"method": "head", "mode": "train"},
        {"method": "sketch", "explainer": "smoothgrad"},
        {"method": "exact", "explainer": "integrated_gradients", "mode": "train"},
        {"method": "sketch", "at": "5"},
        *({"method": "sketch", "jvp": jvp} for jvp in JVPS[1:]),
    ],
    ids=str,
)
def test_the_call_leaves_what_a_training_forward_leaves(keywords: dict[str, Any]) -> None:
    inputs, target = images()
    model = model_with_state()
    plain = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = plain(inputs)
    F.cross_entropy(expected, target).backward()
    wanted = state(plain)
    torch.manual_seed(5)
    logits, _ = class_explanation_stats(model, inputs, target, **keywords)
    assert logits.equal(expected)
    assert not inputs.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    F.cross_entropy(logits, target).backward()
    for got, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is not None
        assert got.grad.equal(reference.grad)
        got.grad = reference.grad = None
    wanted["grad"] = [None for _ in wanted["grad"]]
    assert_same(state(model), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_the_explanation_pass_never_writes_to_buffers(method: Any) -> None:
    inputs, target = images()
    model = model_with_state()
    model[2].momentum = 0.0
    buffers = dict(model.named_buffers())
    versions = {name: buffer._version for name, buffer in buffers.items()}
    plain = copy.deepcopy(model)
    plain_versions = {name: buffer._version for name, buffer in plain.named_buffers()}
    plain_buffers = dict(plain.named_buffers())
    plain(inputs)
    class_explanation_stats(model, inputs, target, method=method, mode="eval")
    for name, buffer in buffers.items():
        moved = plain_buffers[name]._version - plain_versions[name]
        assert buffer._version - versions[name] == moved, name
        if name != "0.replaced":
            assert model.get_buffer(name) is buffer


@pytest.mark.parametrize("method", METHODS)
def test_an_error_in_the_explanation_pass_leaves_the_model_as_it_was(method: Any) -> None:
    inputs, target = images()
    model = model_with_state()
    model.insert(4, TrainOnly())
    buffers = dict(model.named_buffers())
    before = state(model)
    with pytest.raises(RuntimeError, match="not in eval mode"):
        class_explanation_stats(model, inputs, target, method=method, mode="eval")
    assert_same(state(model), before)
    assert model[0].filled_later is None
    assert not hasattr(model[0], "last_seen")
    assert not hasattr(model[0], "late")
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]


class ForwardOnly(torch.autograd.Function):
    """The identity, for a forward pass without a tangent of its own."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


class Identity(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        result = ForwardOnly.apply(inputs)
        assert isinstance(result, Tensor)
        return result


@pytest.mark.parametrize("method", ["projection", "sketch"])
def test_an_error_in_a_product_leaves_the_model_as_it_was(method: Any) -> None:
    inputs, target = images()
    model = model_with_state()
    model.insert(4, Identity())
    before = state(model)
    with pytest.raises(RuntimeError, match="jvp"):
        class_explanation_stats(model, inputs, target, method=method, jvp="forward")
    assert_same(state(model), before)
    assert not hasattr(model[0], "late")


@pytest.mark.parametrize("method", METHODS)
def test_shared_buffers_stay_shared(method: Any) -> None:
    class Reader(nn.Module):
        def __init__(self, buffer: Tensor) -> None:
            super().__init__()
            self.register_buffer("counter", buffer)

        def forward(self, inputs: Tensor) -> Tensor:
            self.counter += 1
            return inputs * self.counter.clone()

    counter = torch.zeros((), dtype=torch.float64)
    last = nn.Linear(2, 2, bias=False).double()
    nn.init.eye_(last.weight)
    model = nn.Sequential(Reader(counter), Reader(counter), last)
    inputs, target = torch.ones(1, 2, dtype=torch.float64), torch.tensor([0])
    _, stats = class_explanation_stats(model, inputs, target, method=method)
    # The second reader sees the count of the first one: z = x * 1 * 2.
    assert stats.dots.tolist() == [[4.0, 0.0]]
    assert stats.sq_norms.tolist() == [[4.0, 4.0]]
    assert model[0].counter is model[1].counter is counter
    assert counter == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_the_explanation_pass_leaves_cuda_random_numbers(method: Any) -> None:
    inputs, target = images()
    model = model_with_state().cuda()
    torch.cuda.manual_seed(5)
    expected = copy.deepcopy(model)(inputs.cuda())
    torch.cuda.manual_seed(5)
    logits, _ = class_explanation_stats(
        model, inputs.cuda(), target.cuda(), method=method, mode="eval"
    )
    assert logits.equal(expected)


def test_train_mode_explains_the_training_forward_itself() -> None:
    """One dropout mask, batch statistics, and gradients of the logits summed over the rows."""
    inputs, target = images()
    model = cnn()
    plain = copy.deepcopy(model)
    torch.manual_seed(9)
    leaf = inputs.clone().requires_grad_()
    expected = plain(leaf)
    explanations = torch.stack(
        [
            (torch.autograd.grad(expected[:, c].sum(), leaf, retain_graph=True)[0] * inputs)
            for c in range(CLASSES)
        ],
        1,
    ).flatten(2)
    logit_of_target = expected.gather(1, target[:, None]).sum()
    of_target = torch.autograd.grad(logit_of_target, leaf, retain_graph=True)[0] * inputs
    dots = torch.einsum("bcd,bd->bc", explanations, of_target.flatten(1))
    sq_norms = explanations.square().sum(-1)
    own = of_target.flatten(1).square().sum(1, keepdim=True)
    F.cross_entropy(expected, target).backward()

    torch.manual_seed(9)
    logits, stats = class_explanation_stats(model, inputs, target, mode="train")
    assert logits.equal(expected)
    wanted = ExplanationStats(
        dots.scatter(1, target[:, None], own), sq_norms.scatter(1, target[:, None], own)
    )
    assert_close(stats, wanted, 1e-12)
    F.cross_entropy(logits, target).backward()
    for got, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert got.grad is not None
        assert got.grad.equal(reference.grad)
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value), name

    torch.manual_seed(9)
    _, again = class_explanation_stats(model, inputs, target, mode="train")
    assert again.dots.equal(stats.dots)
    assert again.sq_norms.equal(stats.sq_norms)
    _, other_mask = class_explanation_stats(model, inputs, target, mode="train")
    assert not other_mask.dots.equal(stats.dots)


def test_ignored_rows_have_no_part_in_the_coupled_gradients_of_train_mode() -> None:
    inputs, target = images()
    model = cnn()
    model[3].p = 0.0
    target[0] = -100
    _, stats = class_explanation_stats(copy.deepcopy(model), inputs, target, mode="train")
    leaf = inputs.clone().requires_grad_()
    logits = model(leaf)
    (gradient,) = torch.autograd.grad(logits[1:, 2].sum(), leaf)
    expected = (gradient * inputs).flatten(1).square().sum(1)
    others = target[1:] != 2
    torch.testing.assert_close(stats.sq_norms[1:, 2][others], expected[1:][others])
    assert stats.sq_norms[0].eq(0).all()
