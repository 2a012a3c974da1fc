from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from introkernels.train.methods import BY_EXPLANATION, METHODS
from introkernels.train.models import MODELS, VGG, WideResNet, check_model, make_model
from introkernels.train.models.resnet import BasicBlock, ResNet
from introkernels.train.models.resnet18 import ProjectionBlock
from introkernels.train.models.wide_resnet import PreActivationBlock

CIFAR, DIGITS = (3, 32, 32), (1, 8, 8)
# The deepest of each kind are as right as their shallower relatives, and slow.
SHALLOW = [name for name in MODELS if name not in ("resnet56", "wrn_40_2", "vgg13")]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def layers(model, *kinds):
    return [module for module in model.modules() if isinstance(module, kinds)]


# VGG has no form for images of less than 8 pixels.
@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in SHALLOW for shape in (CIFAR, DIGITS)]
    + [(name, (2, 9, 7)) for name in SHALLOW if name != "vgg8"],
)
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


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_are_independent_in_evaluation_mode(name):
    torch.manual_seed(0)
    model = make_model(name, (3, 8, 8), 5).eval()
    inputs = torch.randn(3, 3, 8, 8)
    together = model(inputs)
    assert together.shape == (3, 5)
    alone = torch.cat([model(row[None]) for row in inputs])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = MODELS[name](DIGITS, 10).train()
    F.cross_entropy(model(torch.rand(8, *DIGITS)), torch.arange(8)).backward()
    # A bias before BatchNorm is the one thing that can't matter, but for rounding.
    before_norm = {
        f"{path}.bias"
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and isinstance(model, VGG)
    }
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert path in before_norm or parameter.grad.abs().sum() > 0, path


# Parameters in millions. ResNets: He et al. 2016, table 6; the others as the distillation
# literature gives them for CIFAR-100.
@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("resnet20", 10, 0.27),
        ("resnet32", 10, 0.46),
        ("resnet56", 10, 0.85),
        ("resnet18", 10, 11.17),
        ("resnet18", 100, 11.22),
        ("wrn_16_2", 100, 0.70),
        ("wrn_40_2", 100, 2.26),
        ("vgg8", 100, 3.97),
        ("vgg13", 100, 9.46),
    ],
)
def test_networks_have_the_parameters_of_the_literature(name, classes, millions):
    assert round(parameters(MODELS[name](CIFAR, classes)) / 1e6, 2) == millions


def test_resnet18_has_exactly_the_parameters_commonly_reported():
    assert parameters(MODELS["resnet18"](CIFAR, 10)) == 11_173_962


def test_mlp_has_as_many_parameters_as_worked_out_by_hand():
    expected = (3072 * 128 + 128) + (128 * 128 + 128) + (128 * 10 + 10)
    assert parameters(MODELS["mlp"](CIFAR, 10)) == expected


def test_wide_resnet_has_as_many_parameters_as_worked_out_by_hand():
    # WRN-16-2: two blocks a stage with 32, 64 and 128 channels after 16.
    convolutions = 3 * 16 + (16 * 32 + 3 * 32 * 32) + (32 * 64 + 3 * 64 * 64)
    convolutions += 64 * 128 + 3 * 128 * 128
    projections = 16 * 32 + 32 * 64 + 64 * 128
    norms = 2 * ((16 + 3 * 32) + (32 + 3 * 64) + (64 + 3 * 128) + 128)
    expected = 9 * convolutions + projections + norms + 128 * 100 + 100
    assert parameters(MODELS["wrn_16_2"](CIFAR, 100)) == expected


@pytest.mark.parametrize("stages", [(1, 1, 1, 1, 1), (2, 2, 2, 2, 2)])
def test_vgg_has_as_many_parameters_as_worked_out_by_hand(stages):
    channels, expected = 3, 512 * 100 + 100
    for width, count in zip((64, 128, 256, 512, 512), stages, strict=True):
        for _ in range(count):
            expected += channels * width * 9 + width + 2 * width
            channels = width
    # The names count three linear layers.
    name = f"vgg{sum(stages) + 3}"
    assert parameters(MODELS[name](CIFAR, 100)) == expected


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_thin_resnets_have_as_many_layers_as_their_names_say(depth):
    assert len(layers(MODELS[f"resnet{depth}"](CIFAR, 10), nn.Conv2d, nn.Linear)) == depth


def test_projections_do_not_count_in_the_name_of_resnet18():
    model = MODELS["resnet18"](CIFAR, 10)
    wide = [c for c in layers(model, nn.Conv2d) if c.kernel_size != (1, 1)]
    assert len(wide) + len(layers(model, nn.Linear)) == 18
    assert len(layers(model, nn.Conv2d)) - len(wide) == 3


@pytest.mark.parametrize("depth", [16, 40])
def test_wide_resnets_have_as_many_convolutions_as_their_names_say(depth):
    # The paper counts the three projections, and the linear layer not: 6n + 4.
    assert len(layers(MODELS[f"wrn_{depth}_2"](CIFAR, 10), nn.Conv2d)) == depth


@pytest.mark.parametrize(
    ("name", "shape"),
    [("resnet20", (64, 8, 8)), ("resnet18", (512, 4, 4)), ("wrn_16_2", (128, 8, 8))],
)
def test_stages_halve_the_image_as_often_as_the_paper_says(name, shape):
    model = MODELS[name](CIFAR, 10)
    assert model.blocks(model.conv(torch.randn(1, *CIFAR))).shape == (1, *shape)


def test_vgg_halves_the_image_three_times():
    model = MODELS["vgg8"](CIFAR, 10)
    assert model.layers(torch.randn(2, *CIFAR)).shape == (2, 512, 4, 4)


def test_vgg_activates_after_every_convolution():
    torch.manual_seed(0)
    model = MODELS["vgg13"](CIFAR, 10).eval()
    maps = inputs = torch.randn(2, *CIFAR)
    for number, conv in enumerate(layers(model, nn.Conv2d), start=1):
        # A fresh BatchNorm in evaluation mode divides by sqrt(1 + eps).
        maps = F.conv2d(maps, conv.weight, conv.bias, padding=1) / (1 + 1e-5) ** 0.5
        maps = maps.clamp_min(0)
        if number in (2, 4, 6):
            maps = maps.unflatten(3, (-1, 2)).amax(dim=4).unflatten(2, (-1, 2)).amax(dim=3)
    expected = maps.flatten(2).mean(dim=2)
    torch.testing.assert_close(model.features(inputs), expected, rtol=1e-4, atol=1e-5)


def test_mlp_is_two_activated_layers_over_all_pixels():
    torch.manual_seed(0)
    model = MODELS["mlp"](DIGITS, 10)
    inputs = torch.randn(4, *DIGITS)
    first, second = model.hidden1, model.hidden2
    hidden = (inputs.reshape(4, 64) @ first.weight.T + first.bias).clamp_min(0)
    expected = (hidden @ second.weight.T + second.bias).clamp_min(0)
    torch.testing.assert_close(model.features(inputs), expected)


def test_resnet20_has_as_many_parameters_as_worked_out_by_hand():
    stages = (6 * 16 * 16 * 9) + (16 * 32 + 5 * 32 * 32) * 9 + (32 * 64 + 5 * 64 * 64) * 9
    norms = 2 * (16 + 6 * (16 + 32 + 64))
    expected = 3 * 16 * 9 + stages + norms + 64 * 10 + 10
    assert parameters(MODELS["resnet20"](CIFAR, 10)) == expected


def test_a_shortcut_takes_every_other_pixel_and_fills_new_channels_with_zeros():
    block = BasicBlock(2, 6, stride=2).eval()
    for weight in (block.norm2.weight, block.norm2.bias):
        nn.init.zeros_(weight)
    inputs = torch.rand(3, 2, 5, 4)
    outputs = block(inputs)
    assert torch.equal(outputs[:, 2:4], inputs[:, :, ::2, ::2])
    assert not outputs[:, [0, 1, 4, 5]].any()


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (6, 2)])
def test_a_projecting_block_without_its_residual_is_its_shortcut(width, stride):
    torch.manual_seed(0)
    block = ProjectionBlock(4, width, stride).eval()
    nn.init.zeros_(block.norm2.weight)
    inputs = torch.randn(3, 4, 6, 6)
    shortcut = inputs
    if width != 4:
        # A fresh BatchNorm in evaluation mode divides by sqrt(1 + eps).
        weight = block.shortcut[0].weight[:, :, 0, 0]
        projected = torch.einsum("oc,bchw->bohw", weight, inputs[:, :, ::2, ::2])
        shortcut = projected / (1 + block.shortcut[1].eps) ** 0.5
    torch.testing.assert_close(block(inputs), shortcut.clamp_min(0))


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (6, 1), (6, 2)])
def test_a_preactivated_block_without_its_residual_is_its_shortcut(width, stride):
    torch.manual_seed(0)
    block = PreActivationBlock(4, width, stride).eval()
    nn.init.zeros_(block.conv2.weight)
    inputs = torch.randn(3, 4, 6, 6)
    shortcut = inputs
    if width != 4:
        activated = inputs.clamp_min(0) / (1 + block.norm1.eps) ** 0.5
        weight = block.projection.weight[:, :, 0, 0]
        shortcut = torch.einsum("oc,bchw->bohw", weight, activated[:, :, ::stride, ::stride])
    # Nothing follows the sum: negative values stay.
    torch.testing.assert_close(block(inputs), shortcut)


def test_a_preactivated_block_normalises_and_activates_before_each_convolution():
    torch.manual_seed(0)
    block = PreActivationBlock(4, 4, 1).double().train()
    inputs = torch.randn(5, 4, 6, 6, dtype=torch.float64)

    def activated(maps):
        mean = maps.mean(dim=(0, 2, 3), keepdim=True)
        variance = ((maps - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        return ((maps - mean) / (variance + 1e-5).sqrt()).clamp_min(0)

    middle = F.conv2d(activated(inputs), block.conv1.weight, padding=1)
    expected = inputs + F.conv2d(activated(middle), block.conv2.weight, padding=1)
    torch.testing.assert_close(block(inputs), expected)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "wrn_16_2", "vgg8"])
def test_convolutions_begin_with_the_variance_of_he(name):
    torch.manual_seed(0)
    for conv in layers(MODELS[name](CIFAR, 10), nn.Conv2d):
        weight = conv.weight
        variance = 2 / (conv.out_channels * conv.kernel_size[0] ** 2)
        # Five standard deviations of a variance of as many normal numbers.
        tolerance = 5 * (2 / weight.numel()) ** 0.5
        assert weight.square().mean().item() == pytest.approx(variance, rel=tolerance)


@pytest.mark.parametrize("depth", [2, 18, 21, -4])
def test_a_depth_that_no_such_network_has_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth must be 6n . 2 with n at least 1, got {depth}"):
        ResNet(CIFAR, 10, depth)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WideResNet(CIFAR, 10, 20, 2), "depth must be 6n . 4 with n at least 1, got 20"),
        (lambda: WideResNet(CIFAR, 10, 4, 2), "depth must be 6n . 4 with n at least 1, got 4"),
        (lambda: WideResNet(CIFAR, 10, 16, 0), "factor must be at least 1, got 0"),
        (lambda: VGG(CIFAR, 10, 16), "depth must be one of 8, 13, got 16"),
        (lambda: VGG((3, 7, 32), 10, 8), "at least 8 × 8 pixels, got 7 × 32"),
        (lambda: make_model("vgg13", (1, 32, 5), 10), "at least 8 × 8 pixels, got 32 × 5"),
    ],
)
def test_what_a_network_has_no_form_for_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["resnet", "", "timm", "keras:resnet50", "small_cnn:"])
def test_unknown_names_list_what_there_is(name):
    for ask in (lambda: check_model(name), lambda: make_model(name, CIFAR, 10)):
        with pytest.raises(ValueError, match="model: got") as caught:
            ask()
        for text in (repr(name), *MODELS, "timm:NAME", "torchvision:NAME"):
            assert text in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_built_in_names_are_known(name):
    check_model(name)


@pytest.mark.parametrize("name", ["standard", *BY_EXPLANATION.values()])
def test_resnet20_trains_a_step_by_every_kind_of_explanation(name):
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
