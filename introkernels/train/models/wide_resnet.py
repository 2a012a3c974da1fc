"""Wide residual networks: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016,
arXiv:1605.07146.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from introkernels.train.classifier import Classifier
from introkernels.train.models.initialisation import initialise_convolutions

_WIDTHS = (16, 32, 64)


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3×3 convolution, twice, beside a shortcut; nothing after the sum.

    Where the block changes the number of channels, the shortcut is a 1×1 convolution, and it too
    starts from the block's first BatchNorm and ReLU.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.projection = (
            nn.Conv2d(channels, width, 1, stride, bias=False) if width != channels else None
        )

    def forward(self, inputs: Tensor) -> Tensor:
        activated = F.relu(self.norm1(inputs))
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return residual + (inputs if self.projection is None else self.projection(activated))


class WideResNet(Classifier):
    """WRN-d-k for CIFAR: ``depth = 6n + 4``, k times the channels of a thin residual network.

    A 3×3 convolution with 16 channels, three stages of n blocks with 16k, 32k and 64k channels,
    of which the second and third halve height and width, BatchNorm and ReLU, the mean over all
    pixels, and a linear layer. Without dropout.

    Args:
        input_shape: channels, height and width of an image.
        classes: the number of logits.
        depth: d: 10, 16, 22, 28, 40, ...
        factor: k, at least 1.

    Raises:
        ValueError: for a depth that is not ``6n + 4`` with n at least 1, or a factor below 1.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], classes: int, depth: int, factor: int
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6n + 4 with n at least 1, got {depth}")
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        channels = _WIDTHS[0]
        self.conv = nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        for stage, thin in enumerate(_WIDTHS):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(PreActivationBlock(channels, factor * thin, stride))
                channels = factor * thin
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, classes)
        initialise_convolutions(self)

    def features(self, inputs: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.blocks(self.conv(inputs))))
        return maps.mean(dim=(2, 3))
