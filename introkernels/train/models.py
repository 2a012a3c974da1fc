"""Networks to train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from introkernels.train.classifier import Classifier
from introkernels.train.resnet import ResNet


class SmallCNN(Classifier):
    """Two 3×3 convolutions, one 2×2 maximum, two linear layers; no normalisation, no dropout."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * (height // 2) * (width // 2), 64)
        self.head = nn.Linear(64, classes)

    def features(self, inputs: Tensor) -> Tensor:
        maps = F.relu(self.conv2(F.relu(self.conv1(inputs))))
        return F.relu(self.hidden(F.max_pool2d(maps, 2).flatten(1)))


MODELS: dict[str, Callable[[tuple[int, int, int], int], Classifier]] = {
    "small_cnn": SmallCNN,
    "resnet20": partial(ResNet, depth=20),
}
"""Every network by name: made from the shape of an input and the number of classes."""
