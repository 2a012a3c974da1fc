"""VGG networks for small images."""

from __future__ import annotations

from torch import Tensor, nn

from introkernels.train.classifier import Classifier
from introkernels.train.models.initialisation import initialise_convolutions

_STAGES = {
    8: ((64,), (128,), (256,), (512,), (512,)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
}
_POOLED_STAGES = 3
_SMALLEST = 2**_POOLED_STAGES


class VGG(Classifier):
    """VGG (Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", ICLR 2015, arXiv:1409.1556) in the form that the distillation literature trains
    on CIFAR (Tian et al., "Contrastive Representation Distillation", ICLR 2020,
    arXiv:1910.10699).

    Five stages of 3×3 convolutions, each with BatchNorm and ReLU; a 2×2 maximum after each of the
    first three; the mean over all pixels; one linear layer in place of VGG's three. The names
    still count all three: VGG-8 has five convolutions, VGG-13 ten.

    Args:
        input_shape: channels, height and width of an image, height and width at least 8.
        classes: the number of logits.
        depth: 8 or 13.

    Raises:
        ValueError: for another depth or smaller images.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int, depth: int) -> None:
        super().__init__()
        if depth not in _STAGES:
            raise ValueError(f"depth must be one of {', '.join(map(str, _STAGES))}, got {depth}")
        channels, height, width = input_shape
        if min(height, width) < _SMALLEST:
            raise ValueError(
                f"input_shape: VGG needs images of at least {_SMALLEST} × {_SMALLEST} pixels, "
                f"got {height} × {width}"
            )
        self.layers = nn.Sequential()
        for stage, widths in enumerate(_STAGES[depth]):
            for out_channels in widths:
                self.layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
                self.layers.append(nn.BatchNorm2d(out_channels))
                self.layers.append(nn.ReLU())
                channels = out_channels
            if stage < _POOLED_STAGES:
                self.layers.append(nn.MaxPool2d(2))
        self.head = nn.Linear(channels, classes)
        initialise_convolutions(self)

    def features(self, inputs: Tensor) -> Tensor:
        maps: Tensor = self.layers(inputs)
        return maps.mean(dim=(2, 3))
