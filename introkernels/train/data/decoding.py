"""Pictures of image files as one tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from introkernels.train.data.images import DataError

SIZE_OF_MIXED = 64
"""Height and width that pictures of different sizes are brought to."""


class PictureError(DataError):
    """A picture that can't be read; the message names it."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Name a picture in what reading it raises.

    Raises:
        PictureError: the picture is damaged, or so large (`PIL.Image.MAX_IMAGE_PIXELS`) that it may
            be made to fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    # A damaged picture can raise nearly anything.
    except Exception as error:
        reason = str(error).rstrip(".")
        raise PictureError(f"{name} can't be read ({reason}); delete or replace it") from error


def stack_pictures(pictures: Iterable[Image.Image], image_size: int | None = None) -> Tensor:
    """RGB pictures of one size: uint8 ``[N, 3, height, width]``.

    Args:
        pictures: in any mode, at least one.
        image_size: height and width of the result. None keeps pictures that all have one size,
            and means 64 for others. A picture of another size is scaled until it covers the
            square, and what juts out is cut off on both sides alike.
    """
    target = None if image_size is None else (image_size, image_size)
    fixed = image_size is not None
    arrays: list[NDArray[np.uint8]] = []
    for picture in pictures:
        target = target or picture.size
        if picture.size != target and not fixed:
            target, fixed = (SIZE_OF_MIXED, SIZE_OF_MIXED), True
            arrays = [_array(Image.fromarray(array), target) for array in arrays]
        arrays.append(_array(picture.convert("RGB"), target))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _array(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    if picture.size != size:
        picture = ImageOps.fit(picture, size, Image.Resampling.BICUBIC)
    return np.asarray(picture)
