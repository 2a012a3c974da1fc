"""Tangents of layers that are linear in their input, against PyTorch's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from explain_models import CLASSES, cnn, images, resnet
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from introkernels.explain import class_explanation_stats
from introkernels.explain.forward_mode import LinearLayers


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def level() -> Iterator[None]:
    with torch.no_grad(), forward_ad.dual_level():
        yield


def dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(primal.clone(), tangent.clone())


def random_like(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)


def assert_same_tangent(layer: nn.Module, inputs: Tensor, layers: LinearLayers) -> None:
    """With and without the mode, in value and tangent, for two tangents one after the other."""
    for seed in (1, 2):
        tangent = random_like(inputs, seed)
        with level():
            plain = forward_ad.unpack_dual(layer(dual(inputs, tangent)))
            with layers:
                cheap = forward_ad.unpack_dual(layer(dual(inputs, tangent)))
            torch.testing.assert_close(cheap.primal, plain.primal, rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(cheap.tangent, plain.tangent, rtol=1e-12, atol=1e-13)
            assert plain.tangent.norm() > 0


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(2, 3, 3, stride=2), (2, 2, 7)),
    "2d": (nn.Conv2d(2, 3, 3, dilation=2), (2, 2, 7, 7)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (2, 2, 5)),
    "transposed 2d": (nn.ConvTranspose2d(2, 4, 3, groups=2), (2, 2, 5, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, bias=False), (2, 2, 3, 4, 3)),
    "no bias": (nn.Conv2d(2, 3, 3, bias=False), (2, 2, 5, 5)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "same": (nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 5, 5)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5)),
    "circular": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5)),
    "no batch dimension": (nn.Conv2d(2, 3, 3), (2, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_convolutions(name: str) -> None:
    layer, shape = LAYERS[name]
    inputs = random_like(torch.empty(shape, dtype=torch.float64), 0)
    assert_same_tangent(layer.double(), inputs, LinearLayers())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 4)])
def test_batch_norm(training: bool, affine: bool, shape: tuple[int, ...]) -> None:
    kind: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    layer = kind[len(shape)](3, affine=affine, eps=0.1).double().train(training)
    layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([0.3, 1.0, 4.0]))
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    assert_same_tangent(layer, random_like(torch.empty(shape).double(), 0), LinearLayers())


def test_batch_norm_without_running_statistics() -> None:
    layer = nn.BatchNorm1d(3, track_running_stats=False).double().eval()
    assert_same_tangent(layer, random_like(torch.empty(6, 3).double(), 0), LinearLayers())


def test_keyword_arguments() -> None:
    class Keywords(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            weight = torch.arange(12.0, dtype=inputs.dtype).reshape(3, 2, 2)
            return F.conv1d(input=inputs, weight=weight, bias=None, padding=1, stride=2)

    assert_same_tangent(Keywords(), random_like(torch.empty(2, 2, 6).double(), 0), LinearLayers())


@pytest.mark.parametrize("which", ["weight", "bias", "weight alone"])
def test_tangents_of_other_arguments_are_not_lost(which: str) -> None:
    """A weight made from the input, as in dynamic convolutions, has a tangent as well."""

    class Dynamic(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            weight = torch.arange(12.0, dtype=inputs.dtype).reshape(3, 2, 2)
            if which == "bias":
                return F.conv1d(inputs, weight, inputs.flatten()[:3])
            own = weight * inputs.mean()
            if which == "weight":
                return F.conv1d(inputs, own)
            return F.conv1d(torch.ones_like(inputs.detach()), own)

    assert_same_tangent(Dynamic(), random_like(torch.empty(2, 2, 6).double(), 0), LinearLayers())


def test_batch_norm_with_a_weight_made_from_the_input() -> None:
    class Conditional(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            mean, var = torch.zeros(3).double(), torch.ones(3).double()
            return F.batch_norm(inputs, mean, var, weight=inputs.mean(0))

    assert_same_tangent(Conditional(), random_like(torch.empty(5, 3).double(), 0), LinearLayers())


@pytest.mark.parametrize("in_place", [False, True])
def test_outputs_that_are_kept_are_not_those_that_the_model_changed(in_place: bool) -> None:
    # An ELU changes its own output once more, which a ReLU doesn't.
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.ELU(inplace=in_place), nn.BatchNorm1d(3), nn.ELU(inplace=in_place)
    )
    model = model.double().eval()
    assert_same_tangent(model, random_like(torch.empty(2, 2, 6).double(), 0), LinearLayers())


def test_a_layer_that_runs_twice_has_two_outputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.convolution(self.convolution(inputs).tanh())

    assert_same_tangent(
        Twice().double(), random_like(torch.empty(2, 2, 6).double(), 0), LinearLayers()
    )


def test_without_tangents_nothing_is_different() -> None:
    layer = nn.Conv1d(2, 3, 2)
    inputs = random_like(torch.empty(2, 2, 6), 0)
    with LinearLayers():
        output = layer(inputs)
    assert output.requires_grad
    assert output.equal(layer(inputs))


@pytest.mark.parametrize("probes", [1, 4])
def test_a_product_costs_a_tangent_once_outputs_are_known(probes: int) -> None:
    inputs, target = images()
    model, convolutions, norms, overwritten = resnet().eval(), 5, 5, 2
    with Counted() as counted:
        class_explanation_stats(model, inputs, target, method="sketch", probes=probes)
    products = 1 + probes
    # The explained pass is the training forward of a model in eval mode. Outputs are computed once
    # more for the products, and again for each where an in-place ReLU overwrote them. A tangent
    # takes a convolution, and no BatchNorm.
    assert counted.calls["aten::convolution"] == 2 * convolutions + convolutions * products
    of_norms = sum(
        calls
        for name, calls in counted.calls.items()
        if "batch_norm" in name and "backward" not in name
    )
    assert of_norms == 2 * norms - overwritten + overwritten * products


def test_under_autocast_tangents_have_the_dtype_of_the_outputs() -> None:
    inputs, target = images(torch.float32)
    model = cnn(torch.float32).eval()
    _, expected = class_explanation_stats(model, inputs, target)
    for method in ("projection", "sketch"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, stats = class_explanation_stats(model, inputs, target, method=method)
        assert logits.dtype == torch.bfloat16
        assert logits.shape == (len(inputs), CLASSES)
        assert stats.dots.dtype == torch.float32
        # Eight bits, through a few layers.
        assert (stats.dots - expected.dots).norm() < 0.05 * expected.dots.norm()
