from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from introkernels.train.methods import METHODS
from introkernels.train.models import MODELS
from introkernels.train.resnet import BasicBlock, ResNet

CIFAR, DIGITS = (3, 32, 32), (1, 8, 8)


@pytest.mark.parametrize("shape", [CIFAR, DIGITS, (2, 9, 7)])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_a_linear_layer_over_features(name, shape):
    torch.manual_seed(0)
    model = MODELS[name](shape, 7).eval()
    inputs = torch.randn(4, *shape)
    features = model.features(inputs)
    assert features.shape == (4, model.head.in_features)
    torch.testing.assert_close(
        model(inputs), F.linear(features, model.head.weight, model.head.bias)
    )
    assert model(inputs).shape == (4, 7)
    assert model(inputs).std(dim=0).min() > 1e-4


# He et al. 2016, table 6: 0.27 M parameters for 20 layers, 0.46 M for 32, 0.85 M for 56.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_resnets_have_the_layers_and_parameters_of_the_paper(depth, millions):
    model = ResNet(CIFAR, 10, depth)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_resnet20_halves_the_image_twice_and_has_as_many_parameters_as_worked_out_by_hand():
    model = MODELS["resnet20"](CIFAR, 10)
    stages = (6 * 16 * 16 * 9) + (16 * 32 + 5 * 32 * 32) * 9 + (32 * 64 + 5 * 64 * 64) * 9
    norms = 2 * (16 + 6 * (16 + 32 + 64))
    expected = 3 * 16 * 9 + stages + norms + 64 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == expected
    maps = model.blocks(torch.randn(1, 16, 32, 32))
    assert maps.shape == (1, 64, 8, 8)


def test_a_shortcut_takes_every_other_pixel_and_fills_new_channels_with_zeros():
    block = BasicBlock(2, 6, stride=2).eval()
    for weight in (block.norm2.weight, block.norm2.bias):
        nn.init.zeros_(weight)
    inputs = torch.rand(3, 2, 5, 4)
    outputs = block(inputs)
    assert torch.equal(outputs[:, 2:4], inputs[:, :, ::2, ::2])
    assert not outputs[:, [0, 1, 4, 5]].any()


@pytest.mark.parametrize("depth", [2, 18, 21, -4])
def test_a_depth_that_no_such_network_has_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth must be 6n . 2 with n at least 1, got {depth}"):
        ResNet(CIFAR, 10, depth)


@pytest.mark.parametrize("name", METHODS)
def test_resnet20_trains_a_step_by_every_method(name):
    torch.manual_seed(0)
    model = MODELS["resnet20"](DIGITS, 10).train()
    inputs, target = torch.rand(8, *DIGITS), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first = METHODS[name]().loss(model, inputs, target).loss
    first.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    optimizer.step()
    # One training forward: explanations leave BatchNorm's running statistics alone.
    assert model.norm.num_batches_tracked == 1
    assert METHODS[name]().loss(model, inputs, target).loss < first
