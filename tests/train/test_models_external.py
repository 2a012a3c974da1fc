from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from introkernels.train.models import check_model, make_model


class PooledNetwork(nn.Module):
    """A network of timm's without its classifier, perhaps with a hidden layer after the pooling."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)
        self.num_features = 6
        self.hidden = nn.Linear(6, hidden) if hidden else nn.Identity()
        if hidden:
            self.head_hidden_size = hidden

    def forward(self, inputs):
        return self.hidden(self.conv(inputs).mean(dim=(2, 3)))


class TorchvisionNetwork(nn.Module):
    """A network of torchvision's, whose classifier is the last of several linear layers."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes))

    def forward(self, inputs):
        return self.classifier(self.conv(inputs).mean(dim=(2, 3)))


class ConvolutionalClassifier(nn.Module):
    """A network that ends in a convolution, as SqueezeNet does."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 3)

    def forward(self, inputs):
        return self.conv(inputs).mean(dim=(2, 3))


class WithAuxiliaryOutputs(TorchvisionNetwork):
    def forward(self, inputs):
        return SimpleNamespace(logits=super().forward(inputs))


@pytest.fixture
def timm(monkeypatch):
    module = ModuleType("timm")
    hidden = {"tiny": 0, "with_hidden_layer": 9}
    module.is_model = lambda name: name in hidden

    def create_model(name, *, pretrained, num_classes, in_chans):
        assert pretrained is False
        assert num_classes == 0
        return PooledNetwork(in_chans, hidden[name])

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.fixture
def torchvision(monkeypatch):
    package, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    classes_of = {
        "tiny": TorchvisionNetwork,
        "convolutional": ConvolutionalClassifier,
        "auxiliary": WithAuxiliaryOutputs,
    }

    def list_models(module):
        assert module is models
        return list(classes_of)

    def get_model(name, *, weights, num_classes):
        assert weights is None
        return classes_of[name](num_classes)

    models.list_models, models.get_model = list_models, get_model
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("network", "width"), [("tiny", 6), ("with_hidden_layer", 9)])
def test_a_network_of_timm_gets_a_linear_head(timm, network, width, channels):
    torch.manual_seed(0)
    model = make_model(f"timm:{network}", (channels, 8, 8), 4).eval()
    inputs = torch.randn(5, channels, 8, 8)
    features = model.features(inputs)
    assert features.shape == (5, width)
    torch.testing.assert_close(
        model(inputs), F.linear(features, model.head.weight, model.head.bias)
    )
    assert model(inputs).shape == (5, 4)


def test_a_network_of_torchvision_is_taken_apart_before_its_last_layer(torchvision):
    torch.manual_seed(0)
    model = make_model("torchvision:tiny", (3, 8, 8), 4)
    torch.manual_seed(0)
    whole = TorchvisionNetwork(4)
    inputs = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(model(inputs), whole(inputs))
    assert model.features(inputs).shape == (5, 5)
    assert model.head.out_features == 4
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters())
    model(inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("channels", [1, 4])
def test_torchvision_takes_three_channels(torchvision, channels):
    with pytest.raises(ValueError, match=f"images of 3 channels, got {channels}"):
        make_model("torchvision:tiny", (channels, 8, 8), 4)


def test_a_network_without_a_linear_last_layer_is_refused(torchvision):
    with pytest.raises(ValueError, match="torchvision:convolutional doesn't end in a linear layer"):
        make_model("torchvision:convolutional", (3, 8, 8), 4)


def test_a_network_with_auxiliary_outputs_is_refused_at_its_first_use(torchvision):
    model = make_model("torchvision:auxiliary", (3, 8, 8), 4)
    with pytest.raises(TypeError, match="gives a SimpleNamespace, expected a tensor"):
        model(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_names_are_looked_up_in_the_package(timm, torchvision, package):
    check_model(f"{package}:tiny")
    for name in (f"{package}:", f"{package}:unheard_of"):
        for ask in (check_model, lambda name: make_model(name, (3, 8, 8), 4)):
            with pytest.raises(
                ValueError, match=f"{package} has no network '{name[len(package) + 1 :]}'"
            ):
                ask(name)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_without_the_package_the_message_says_what_to_install(monkeypatch, package):
    for module in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{package}:resnet50 needs .* `pip install {package}`"):
        check_model(f"{package}:resnet50")
    with pytest.raises(ValueError, match=f"`pip install {package}`"):
        make_model(f"{package}:resnet50", (3, 32, 32), 10)
