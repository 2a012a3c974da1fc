"""Generated images whose classes are alike in a known way."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from introkernels.train.data.images import Dataset, LabelledImages

_SUPERCLASSES, _CLASSES_EACH = 5, 4
_IMAGES_EACH = 200
_CHANNELS, _SIDE = 3, 16
_CELLS = 5
_OWN_SHARE = 0.6
_SHIFT = 2
_NOISE = 2.5
_SEED = 20240101


def synthetic(_directory: Path) -> Dataset:
    """4000 images of 3 × 16 × 16 numbers (float32), 20 classes in 5 superclasses of 4.

    A class's prototype is its superclass's pattern plus 0.6 times a pattern of its own. The 25
    patterns are smooth random fields, made orthogonal, with mean 0 and variance 1: prototypes of
    one superclass correlate by ``1 / (1 + 0.6²) = 0.735``, others by 0. An image is its class's
    prototype, moved around the edges by up to 2 pixels along each axis, times an amplitude uniform
    in [0.5, 1.5], plus normal noise of standard deviation 2.5 in every number. The network
    `small_cnn`, trained on 30 images of each class, gets about 82 % of others right. Always the
    same images; no files are needed.
    """
    generator = torch.Generator().manual_seed(_SEED)
    classes = _SUPERCLASSES * _CLASSES_EACH
    superclasses = torch.arange(classes) // _CLASSES_EACH
    shared, own = _patterns(_SUPERCLASSES + classes, generator).split([_SUPERCLASSES, classes])
    prototypes = shared[superclasses] + _OWN_SHARE * own

    labels = torch.arange(classes).repeat(_IMAGES_EACH)
    amplitude = 0.5 + torch.rand(len(labels), 1, 1, 1, generator=generator)
    images = amplitude * _moved(prototypes[labels], generator)
    images += _NOISE * torch.randn(images.shape, generator=generator)
    return Dataset(
        LabelledImages(images, labels),
        tuple(f"{s}{'abcd'[c]}" for s in range(_SUPERCLASSES) for c in range(_CLASSES_EACH)),
        f"A synthetic data set: {len(labels)} generated images of {_SIDE} × {_SIDE} pixels in "
        f"{classes} classes, which share patterns in {_SUPERCLASSES} superclasses.",
        superclasses=tuple(superclasses.tolist()),
        synthetic=True,
    )


def _patterns(count: int, generator: torch.Generator) -> Tensor:
    """Smooth images with mean 0 and variance 1, each orthogonal to the others."""
    coarse = torch.randn(count, _CHANNELS, _CELLS, _CELLS, generator=generator)
    smooth = F.interpolate(coarse, size=(_SIDE, _SIDE), mode="bicubic", align_corners=True)
    centred = smooth - smooth.mean(dim=(1, 2, 3), keepdim=True)
    orthonormal: Tensor = torch.linalg.qr(centred.flatten(1).T).Q
    return orthonormal.T.reshape(smooth.shape) * math.sqrt(smooth[0].numel())


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved around its edges."""
    batch = len(images)
    down, right = torch.randint(-_SHIFT, _SHIFT + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(_SIDE) - down) % _SIDE
    columns = (torch.arange(_SIDE) - right) % _SIDE
    pixels = images.permute(0, 2, 3, 1)
    moved = pixels[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()
