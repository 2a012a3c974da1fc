"""Networks of other packages as classifiers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from introkernels.train.classifier import Classifier


class ExternalClassifier(Classifier):
    """A linear head over what another package's network computes.

    Args:
        network: gives features ``[B, width]`` for inputs ``[B, channels, height, width]``.
        head: the linear layer over them.
    """

    def __init__(self, network: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.network = network
        self.head = head

    def features(self, inputs: Tensor) -> Tensor:
        outputs = self.network(inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the network gives a {type(outputs).__name__}, expected a tensor of features; "
                "networks with auxiliary outputs can't be used"
            )
        return outputs


@dataclass(frozen=True)
class Library:
    """How to reach the networks of a package.

    Attributes:
        module: what to import.
        package: what to install.
        knows: whether the imported module has a network of that name.
        build: the classifier, from the imported module, the network's name, the shape of an input
            and the number of classes.
    """

    module: str
    package: str
    knows: Callable[[ModuleType, str], bool]
    build: Callable[[ModuleType, str, tuple[int, int, int], int], Classifier]

    def check(self, network: str) -> None:
        """Raises ValueError if the package isn't installed or has no such network."""
        if not self.knows(self._load(network), network):
            raise ValueError(f"model: {self.package} has no network {network!r}")

    def make(self, network: str, input_shape: tuple[int, int, int], classes: int) -> Classifier:
        return self.build(self._load(network), network, input_shape, classes)

    def _load(self, network: str) -> ModuleType:
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise ValueError(
                f"model: {self.package}:{network} needs the package {self.package}, which can't be "
                f"imported ({error}); `pip install {self.package}`"
            ) from error


def _timm_knows(timm: ModuleType, name: str) -> bool:
    return bool(timm.is_model(name))


def _of_timm(
    timm: ModuleType, name: str, input_shape: tuple[int, int, int], classes: int
) -> Classifier:
    network = timm.create_model(name, pretrained=False, num_classes=0, in_chans=input_shape[0])
    # Some networks, MobileNetV3 for one, have a hidden layer after the pooling: the features that
    # are left without the classifier are then not as wide as the pooled ones.
    width = getattr(network, "head_hidden_size", None) or network.num_features
    return ExternalClassifier(network, nn.Linear(width, classes))


def _torchvision_knows(models: ModuleType, name: str) -> bool:
    return name in models.list_models(module=models)


def _of_torchvision(
    models: ModuleType, name: str, input_shape: tuple[int, int, int], classes: int
) -> Classifier:
    channels = input_shape[0]
    if channels != 3:
        raise ValueError(
            f"input_shape: torchvision:{name} takes images of 3 channels, got {channels}"
        )
    network = models.get_model(name, weights=None, num_classes=classes)
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    head = network.get_submodule(linear[-1]) if linear else None
    if not isinstance(head, nn.Linear) or head.out_features != classes:
        raise ValueError(f"model: torchvision:{name} doesn't end in a linear layer")
    network.set_submodule(linear[-1], nn.Identity())
    return ExternalClassifier(network, head)


LIBRARIES = {
    "timm": Library("timm", "timm", _timm_knows, _of_timm),
    "torchvision": Library(
        "torchvision.models", "torchvision", _torchvision_knows, _of_torchvision
    ),
}
"""Packages of networks by the prefix of their networks' names."""
