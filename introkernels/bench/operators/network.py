"""A small network whose weights are given, for explanations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 2
PADDING = 1


class Network(nn.Module):
    """Two 3×3 convolutions of stride 2 with rectifiers, the mean over all pixels, a linear layer.

    Args:
        conv1: ``[16, 3, 3, 3]``.
        conv2: ``[32, 16, 3, 3]``.
        head: ``[C, 32]``.
    """

    def __init__(self, conv1: Tensor, conv2: Tensor, head: Tensor) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv1, conv2, head

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(F.conv2d(images, self.conv1, stride=STRIDE, padding=PADDING))
        maps = F.relu(F.conv2d(maps, self.conv2, stride=STRIDE, padding=PADDING))
        return F.linear(maps.mean((2, 3)), self.head)
