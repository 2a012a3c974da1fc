"""Networks to train, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from introkernels.train.classifier import Classifier
from introkernels.train.models import external
from introkernels.train.models.mlp import MLP
from introkernels.train.models.resnet import ResNet
from introkernels.train.models.resnet18 import ResNet18
from introkernels.train.models.small_cnn import SmallCNN
from introkernels.train.models.vgg import VGG
from introkernels.train.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "MODELS",
    "VGG",
    "Classifier",
    "ResNet",
    "ResNet18",
    "SmallCNN",
    "WideResNet",
    "check_model",
    "make_model",
]

MODELS: dict[str, Callable[[tuple[int, int, int], int], Classifier]] = {
    "mlp": MLP,
    "small_cnn": SmallCNN,
    "resnet20": partial(ResNet, depth=20),
    "resnet32": partial(ResNet, depth=32),
    "resnet56": partial(ResNet, depth=56),
    "resnet18": ResNet18,
    "wrn_16_2": partial(WideResNet, depth=16, factor=2),
    "wrn_40_2": partial(WideResNet, depth=40, factor=2),
    "vgg8": partial(VGG, depth=8),
    "vgg13": partial(VGG, depth=13),
}
"""Every built-in network by name: made from the shape of an input and the number of classes."""


def check_model(name: str) -> None:
    """Nothing, if `make_model` knows the name.

    Args:
        name: a key of `MODELS`, or ``"timm:NAME"`` or ``"torchvision:NAME"`` for a network of
            that package, which must be installed.

    Raises:
        ValueError: it doesn't; the message lists the names there are, or says what to install.
    """
    library, separator, network = name.partition(":")
    if separator and library in external.LIBRARIES:
        external.LIBRARIES[library].check(network)
    elif name not in MODELS:
        elsewhere = ", ".join(f"{library}:NAME" for library in external.LIBRARIES)
        raise ValueError(
            f"model: got {name!r}, expected one of {', '.join(MODELS)}, or {elsewhere} for a "
            "network of that package"
        )


def make_model(name: str, input_shape: tuple[int, int, int], classes: int) -> Classifier:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name: what `check_model` allows.
        input_shape: channels, height and width of an image.
        classes: the number of logits.

    Raises:
        ValueError: `check_model` refuses the name, or the network has no form for such images.
    """
    check_model(name)
    if name in MODELS:
        return MODELS[name](input_shape, classes)
    library, _, network = name.partition(":")
    return external.LIBRARIES[library].make(network, input_shape, classes)
