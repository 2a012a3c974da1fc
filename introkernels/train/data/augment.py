"""Random changes to a batch of images, on its device and without a loop over images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_SHIFT = 1
_PADDING = 4


def none(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return images


def shift(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Move every image by -1, 0 or 1 pixels along each axis; zeros move in."""
    return _crop(images, _SHIFT, generator)


def crop_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Move every image by up to 4 pixels along each axis, zeros moving in, and mirror half of
    them: the augmentation of He et al., CVPR 2016, arXiv:1512.03385, section 4.2.
    """
    return _flip(_crop(images, _PADDING, generator), generator)


def crop_flip_cutout(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """`crop_flip`, and a square of zeros in every image.

    DeVries & Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
    arXiv:1708.04552: its centre is any pixel, and what lies outside the image is cut off. Its side
    is half the image's shorter one: the paper's 16 pixels for CIFAR-10.
    """
    return _cutout(crop_flip(images, generator), generator)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "none": none,
    "shift": shift,
    "crop_flip": crop_flip,
    "crop_flip_cutout": crop_flip_cutout,
}
"""Every augmentation by name.

Each takes images ``[B, channels, height, width]`` of a floating dtype and a generator on their
device, or None for that device's default one, and gives images of the same shape, dtype and
device; the given ones stay as they are. Zeros that move in are the mean colour of normalised
images.
"""


def _crop(images: Tensor, padding: int, generator: torch.Generator | None) -> Tensor:
    """A random window of each image's own size, out of the image padded with zeros."""
    batch, _, height, width = images.shape
    down, right = torch.randint(
        2 * padding + 1, (2, batch), generator=generator, device=images.device
    )
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, down, right]


def _flip(images: Tensor, generator: torch.Generator | None) -> Tensor:
    coin = torch.randint(2, (len(images), 1, 1, 1), generator=generator, device=images.device)
    return torch.where(coin.bool(), images.flip(3), images)


def _cutout(images: Tensor, generator: torch.Generator | None) -> Tensor:
    batch, _, height, width = images.shape
    side = min(height, width) // 2

    def inside(length: int) -> Tensor:
        centre = torch.randint(length, (batch, 1), generator=generator, device=images.device)
        offset = torch.arange(length, device=images.device) - centre + side // 2
        return (offset >= 0) & (offset < side)

    hole = inside(height)[:, None, :, None] & inside(width)[:, None, None, :]
    return images.masked_fill(hole, 0)
