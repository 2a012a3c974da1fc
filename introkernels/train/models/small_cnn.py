"""A small convolutional network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from introkernels.train.classifier import Classifier


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
