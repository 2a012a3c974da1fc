"""The residual network of 18 layers, in its form for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from introkernels.train.classifier import Classifier
from introkernels.train.models.initialisation import initialise_convolutions

_WIDTHS = (64, 128, 256, 512)
_BLOCKS = 2


class ProjectionBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut (option B of He et al. 2016).

    The shortcut is the identity, or a 1×1 convolution with BatchNorm where the block changes the
    number of channels.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if width != channels:
            self.shortcut.append(nn.Conv2d(channels, width, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(width))

    def forward(self, inputs: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(inputs)))))
        return F.relu(residual + self.shortcut(inputs))


class ResNet18(Classifier):
    """ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
    arXiv:1512.03385, table 1) as it is commonly used on CIFAR.

    For small images the first convolution is 3×3 without a stride and no maximum follows it. Then
    four stages of two blocks with 64, 128, 256 and 512 channels, of which all but the first halve
    height and width, the mean over all pixels, and a linear layer.

    Args:
        input_shape: channels, height and width of an image.
        classes: the number of logits.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(input_shape[0], _WIDTHS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTHS[0])
        self.blocks = nn.Sequential()
        channels = _WIDTHS[0]
        for width in _WIDTHS:
            for _ in range(_BLOCKS):
                self.blocks.append(ProjectionBlock(channels, width, 1 if width == channels else 2))
                channels = width
        self.head = nn.Linear(channels, classes)
        initialise_convolutions(self)

    def features(self, inputs: Tensor) -> Tensor:
        maps: Tensor = self.blocks(F.relu(self.norm(self.conv(inputs))))
        return maps.mean(dim=(2, 3))
