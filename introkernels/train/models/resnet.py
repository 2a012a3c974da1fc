"""Thin residual networks for small images: He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, arXiv:1512.03385, section 4.2.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from introkernels.train.classifier import Classifier
from introkernels.train.models.initialisation import initialise_convolutions

_WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut without parameters (option A).

    Where the block has a stride and more channels, the shortcut takes every other pixel and fills
    the new channels with zeros.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, inputs: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(inputs)))))
        return F.relu(residual + self._shortcut(inputs))

    def _shortcut(self, inputs: Tensor) -> Tensor:
        if self.stride == 1:
            return inputs
        before = self.new_channels // 2
        pixels = inputs[:, :, :: self.stride, :: self.stride]
        return F.pad(pixels, (0, 0, 0, 0, before, self.new_channels - before))


class ResNet(Classifier):
    """The network of He et al. for CIFAR-10: ``depth = 6n + 2`` layers with weights.

    A 3×3 convolution, three stages of n basic blocks with 16, 32 and 64 channels, of which the
    second and third halve height and width, the mean over all pixels, and a linear layer.

    Args:
        input_shape: channels, height and width of an image.
        classes: the number of logits.
        depth: 20, 32, 44, 56, 110, ...

    Raises:
        ValueError: for a depth that is not ``6n + 2`` with n at least 1.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int, depth: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6n + 2 with n at least 1, got {depth}")
        self.conv = nn.Conv2d(input_shape[0], _WIDTHS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTHS[0])
        channels, stages = _WIDTHS[0], []
        for width in _WIDTHS:
            for _ in range(blocks):
                stages.append(BasicBlock(channels, width, 1 if width == channels else 2))
                channels = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        initialise_convolutions(self)

    def features(self, inputs: Tensor) -> Tensor:
        maps: Tensor = self.blocks(F.relu(self.norm(self.conv(inputs))))
        return maps.mean(dim=(2, 3))
